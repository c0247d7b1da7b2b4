"""Attention over short nodes in one padded product, instead of one call per node.

input   queries, keys and values of a layer, and the layout
does    brings each node's queries, and the keys that they see, together as one entry of a batch;
        one softmax over all of them, the backward pass written out
output  the same numbers as the meetings of attention.py

One call of a kernel costs as much as about 8,000 pairs of query and key; for rows of twenty tokens
the calls take nearly all of the time. The computation is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from truetune.compute.layout import MOST_KEYS, Layout
from truetune.compute.private import softmax_backward, without_modes

# The cost of one kernel call, forward and backward, in pairs of query and key (docs/log.md).
_CALL = 8000


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of T tokens in a padded batch of N nodes with Q queries and K keys each.

    There are H heads in G groups that share their keys. Rows are indices into the flattened
    queries (T x H, D) and keys (T x G, D).

    Attributes:
        queries: (N G x H / G x Q,), the row of each query; for padding, that of the node's last
            token.
        keys: (N G x K,), the row of each key; for padding, any row.
        back: (T x H,), the index of each token's query in `queries`.
        unseen: (N G, H / G x Q, K) float, -inf if the query does not see the key, otherwise 0.
        is_query: (N G, H / G x Q, 1) float, 1 for queries and 0 for padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    back: torch.Tensor
    unseen: torch.Tensor
    is_query: torch.Tensor


def places(layout: Layout, window: int | None, heads: int, groups: int) -> Places | None:
    """Return the positions, which equal layers share; None if separate calls cost less."""
    key = "gathered", window, heads, groups
    if key not in layout.made:
        # A model of fake tensors runs inside a torch mode, but indices need real values.
        with without_modes():
            pays = _pays(layout, window)
            layout.made[key] = _places(layout, window, heads, groups) if pays else None
    found: Places | None = layout.made[key]
    return found


def _pays(layout: Layout, window: int | None) -> bool:
    keys = max(d + n for d, n in zip(layout.depths, layout.lengths, strict=True))
    if keys > MOST_KEYS:
        return False
    meetings = layout.meetings(window)
    met = sum(m.num_queries * sum(k1 - k0 for k0, k1 in m.keys) for m in meetings)
    padded = len(layout.lengths) * max(layout.lengths) * keys
    return padded <= met + _CALL * len(meetings)


def _places(layout: Layout, window: int | None, heads: int, groups: int) -> Places:
    starts = torch.tensor(layout.starts[:-1])[:, None]
    depths, lengths = torch.tensor(layout.depths)[:, None], torch.tensor(layout.lengths)[:, None]
    q, k = torch.arange(int(lengths.max())), torch.arange(int((depths + lengths).max()))
    offsets_NQ = torch.minimum(q, lengths - 1)
    paths = []
    for node in range(len(layout.lengths)):
        line = [*layout.ancestors(node), node]
        path = [t for a in line for t in range(layout.starts[a], layout.starts[a + 1])]
        paths.append(path + [0] * (len(k) - len(path)))
    positions_NQ1 = (depths + offsets_NQ)[:, :, None]
    seen_NQK = k <= positions_NQ1
    if window is not None:
        seen_NQK &= k > positions_NQ1 - window
    is_query_NQ = (q < lengths).float()
    unseen_NQK = torch.zeros(seen_NQK.shape).masked_fill_(~seen_NQK, -torch.inf)

    each_head, each_group = torch.arange(heads)[:, None], torch.arange(groups)[:, None]
    queries_NHQ = ((starts + offsets_NQ) * heads)[:, None] + each_head
    keys_NGK = (torch.tensor(paths) * groups)[:, None] + each_group
    standing = (is_query_NQ[:, None] > 0).expand(-1, heads, -1).flatten().nonzero()[:, 0]
    back = torch.empty_like(standing)
    back[queries_NHQ.flatten()[standing]] = standing
    nodes, num_q, _ = unseen_NQK.shape

    def for_heads(t_NQX: torch.Tensor) -> torch.Tensor:
        repeated = t_NQX[:, None].expand(-1, heads, -1, -1)
        return repeated.reshape(nodes * groups, heads // groups * num_q, -1)

    return Places(
        queries_NHQ.flatten(),
        keys_NGK.flatten(),
        back,
        for_heads(unseen_NQK),
        for_heads(is_query_NQ[:, :, None]),
    )


class Gathered(torch.autograd.Function):
    """Attention output (T, H, D) from queries (H, T, D), keys and values (G, T, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: torch.Tensor,
        k_GTD: torch.Tensor,
        v_GTD: torch.Tensor,
        at: Places,
        scale: float,
    ) -> torch.Tensor:
        q = _taken(q_HTD.transpose(0, 1), at.queries, len(at.unseen))
        k = _taken(k_GTD.transpose(0, 1), at.keys, len(at.unseen))
        v = _taken(v_GTD.transpose(0, 1), at.keys, len(at.unseen))
        scores = torch.baddbmm(at.unseen, q, k.transpose(1, 2), alpha=scale)
        # Attention weights of 0 keep padding queries out of every gradient.
        p = scores.softmax(-1).mul_(at.is_query)
        ctx.save_for_backward(q, k, v, p)
        ctx.at, ctx.scale, ctx.dtype, ctx.groups = at, scale, q_HTD.dtype, len(k_GTD)
        heads, length, width = q_HTD.shape
        out = torch.bmm(p, v).view(-1, width).index_select(0, at.back)
        return out.view(length, heads, width).to(q_HTD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        at, dtype = ctx.at, ctx.dtype
        length, _, width = grad_THD.shape
        grad = _taken(grad_THD, at.queries, len(at.unseen))
        of_p = torch.bmm(grad, v.transpose(1, 2))
        of_scores = softmax_backward(of_p, p).mul_(ctx.scale)
        of_q = torch.bmm(of_scores, k).view(-1, width).index_select(0, at.back)

        def summed(rows: torch.Tensor) -> torch.Tensor:
            """Add up the gradients of each token's keys over the nodes that see them: (G, T, D)."""
            total = rows.new_zeros(length * ctx.groups, width)
            total.index_add_(0, at.keys, rows.view(-1, width))
            return total.view(length, ctx.groups, width).transpose(0, 1).to(dtype)

        of_k = summed(torch.bmm(of_scores.transpose(1, 2), q))
        of_v = summed(torch.bmm(p.transpose(1, 2), grad))
        return of_q.view_as(grad_THD).transpose(0, 1).to(dtype), of_k, of_v, None, None


def _taken(t_TXD: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows of the flattened tensor (T x X, D) as (count, rows / count, D), in float32."""
    width = t_TXD.shape[-1]
    return t_TXD.reshape(-1, width).index_select(0, rows).view(count, -1, width).float()
