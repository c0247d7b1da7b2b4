"""Attention over short nodes: all of them in one padded product, instead of a call for each.

input   queries, keys and values of a layer, and the layout
does    brings each node's queries, and the keys that they see, together as one entry of a batch;
        one softmax over all of them, the backward pass written out
output  the same numbers as the meetings of attention.py
who     attention.py, on CPU, where the layout says that it costs less

A call of a kernel costs as much as some eight thousand pairs of query and key: of rows of twenty
tokens the calls are nearly all. Computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from truetune.compute.layout import MOST_KEYS, Layout

# Pairs of query and key that a kernel's call costs, forward and backward (docs/log.md).
_CALL = 8000


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of N nodes stand in a padded batch of Q queries and K keys a node.

    Attributes:
        queries_NQ, keys_NK: index in the sequence; any token where there is none.
        is_query_NQ: float, 1 where there is one.
        unseen_NQK: float, -inf where a query does not see the key, else 0.
        tokens_T: where each token's query is in N x Q.
    """

    queries_NQ: torch.Tensor
    keys_NK: torch.Tensor
    is_query_NQ: torch.Tensor
    unseen_NQK: torch.Tensor
    tokens_T: torch.Tensor


def places(layout: Layout, window: int | None) -> Places | None:
    """Made once for all layers of a batch that have this window; None where meetings cost less."""
    key = "gathered", window
    if key not in layout.made:
        # A model without numbers is computed inside a mode; its indices have numbers all the same.
        with _disable_current_modes():
            layout.made[key] = _places(layout, window) if _pays(layout, window) else None
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


def _places(layout: Layout, window: int | None) -> Places:
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
    is_query_NQ = q < lengths
    return Places(
        queries_NQ=starts + offsets_NQ,
        keys_NK=torch.tensor(paths),
        is_query_NQ=is_query_NQ.float(),
        unseen_NQK=torch.zeros(seen_NQK.shape).masked_fill_(~seen_NQK, -torch.inf),
        tokens_T=is_query_NQ.flatten().nonzero()[:, 0],
    )


class Gathered(torch.autograd.Function):
    """(T, H, D) from queries (H, T, D), keys and values (G, T, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: torch.Tensor,
        k_GTD: torch.Tensor,
        v_GTD: torch.Tensor,
        at: Places,
        scale: float,
    ) -> torch.Tensor:
        groups = len(k_GTD)
        q, k, v = (
            _padded_queries(q_HTD, at, groups),
            _padded_keys(k_GTD, at),
            _padded_keys(v_GTD, at),
        )
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        # The heads that share keys, and all groups, see alike.
        nodes, num_q, num_k = at.unseen_NQK.shape
        scores.view(nodes, -1, num_q, num_k).add_(at.unseen_NQK[:, None])
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.at, ctx.scale, ctx.dtype, ctx.groups = at, scale, q_HTD.dtype, groups
        return _tokens(torch.bmm(p, v), at, groups).to(q_HTD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        at, groups = ctx.at, ctx.groups
        grad = _padded_queries(grad_THD.transpose(0, 1), at, groups)
        nodes, num_q = at.is_query_NQ.shape
        grad.view(nodes, -1, num_q, grad.shape[-1]).mul_(at.is_query_NQ[:, None, :, None])
        of_p = torch.bmm(grad, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(ctx.scale)
        of_q = _tokens(torch.bmm(of_scores, k), at, groups).transpose(0, 1)
        of_k = _summed(torch.bmm(of_scores.transpose(1, 2), q), at)
        of_v = _summed(torch.bmm(p.transpose(1, 2), grad), at)
        return of_q.to(ctx.dtype), of_k.to(ctx.dtype), of_v.to(ctx.dtype), None, None


def _padded_queries(t_HTD: torch.Tensor, at: Places, groups: int) -> torch.Tensor:
    """(N G, H / G x Q, D), in float32."""
    nodes, num_q = at.queries_NQ.shape
    rows = t_HTD.transpose(0, 1).index_select(0, at.queries_NQ.flatten()).float()
    by_group = rows.view(nodes, num_q, groups, -1, rows.shape[-1]).permute(0, 2, 3, 1, 4)
    return by_group.reshape(nodes * groups, -1, rows.shape[-1])


def _padded_keys(t_GTD: torch.Tensor, at: Places) -> torch.Tensor:
    """(N G, K, D), in float32."""
    nodes, num_k = at.keys_NK.shape
    rows = t_GTD.transpose(0, 1).index_select(0, at.keys_NK.flatten()).float()
    return (
        rows.view(nodes, num_k, *rows.shape[1:]).transpose(1, 2).reshape(-1, num_k, rows.shape[-1])
    )


def _tokens(padded: torch.Tensor, at: Places, groups: int) -> torch.Tensor:
    """(T, H, D) of what `_padded_queries` makes."""
    nodes, num_q = at.queries_NQ.shape
    width = padded.shape[-1]
    by_token = padded.view(nodes, groups, -1, num_q, width).permute(0, 3, 1, 2, 4)
    return by_token.reshape(nodes * num_q, -1, width).index_select(0, at.tokens_T)


def _summed(padded: torch.Tensor, at: Places) -> torch.Tensor:
    """(G, T, D) of what `_padded_keys` makes: a token's keys are seen by several nodes."""
    nodes, num_k = at.keys_NK.shape
    rows = padded.view(nodes, -1, num_k, padded.shape[-1]).transpose(1, 2).flatten(0, 1)
    total = rows.new_zeros(len(at.tokens_T), *rows.shape[1:])
    return total.index_add_(0, at.keys_NK.flatten(), rows).transpose(0, 1)
