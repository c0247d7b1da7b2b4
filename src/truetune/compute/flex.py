"""Attention over a packed sequence by FlexAttention, which skips blocks that no query sees.

It is used on CUDA for what the variable-length kernel does not support: soft caps, float32 and wide
heads. The visible blocks are counted from the layout; no (T, T) mask is built. Lengths are rounded
up to whole blocks, so that a kind of layer is compiled for one length and then for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from truetune.compute.cuda.copies import sent
from truetune.compute.layout import Layout
from truetune.errors import TruetuneError

# Number of queries, and of keys, in a block of FlexAttention.
BLOCK = 128
# torch compiles each kind of layer (window, soft cap, with and without gradients) twice. A model
# with two windows reaches torch's own limit of 8; beyond it, torch silently computes all scores at
# once.
_MOST_COMPILED = 64


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, fullgraph=True)


def rule(layout: Layout, window: int | None, device: torch.device) -> Any:
    """Return FlexAttention's mask function for a layout.

    It maps indices of queries and keys in the packed sequence to True if the query sees the key.
    """
    # Nodes are in depth-first order, so a token is seen by those after it, up to the end of its
    # node's descendants. The padding of the last block sees nothing and is not seen.
    ends = [end for end, n in zip(layout.ends, layout.lengths, strict=True) for _ in range(n)]
    filling = [0] * (_whole_blocks(layout.num_tokens) - layout.num_tokens)
    seen_until = sent(torch.tensor(ends + filling), device)
    positions = sent(torch.tensor(layout.positions + filling), device)

    def sees(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (k <= q) & (q < seen_until[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    return sees


def _whole_blocks(length: int) -> int:
    """Return a length rounded up to whole blocks."""
    # At least two blocks, because torch compiles again for a size of one.
    return max(-(-length // BLOCK), 2) * BLOCK


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention output (T, H, D) of T tokens and H heads of width D.

    Args:
        query: (1, H, T, D).
        key, value: (1, G, T, D), for G groups of heads that share them.
        window: largest distance to a key that is seen, plus 1; None for no limit.
        scale: factor of the scores.
        softcap: bound of the scores; None for no bound.

    Raises:
        TruetuneError: torch has compiled it for more kinds of layers than the limit allows.
    """

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        assert softcap
        return softcap * torch.tanh(score / softcap)

    # Compiled on CUDA; elsewhere without compilation, which is slow but gives the same results.
    call = _compiled() if query.is_cuda else flex_attention
    length = layout.num_tokens
    filling = _whole_blocks(length) - length
    query, key, value = (F.pad(t, (0, 0, 0, filling)) for t in (query, key, value))
    limits: dict[str, Any] = {
        "recompile_limit": _MOST_COMPILED,
        "fail_on_recompile_limit_hit": True,
    }
    try:
        with torch._dynamo.config.patch(**limits):
            out = call(
                query,
                key,
                value,
                score_mod=capped if softcap else None,
                block_mask=_blocks(layout, window, query.device),
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise TruetuneError(
            f"torch compiled the attention of this model {_MOST_COMPILED} times and stopped",
            why="beyond its limit torch would silently compute all attention scores of a layer "
            "at once",
            fix="use --no-packing, and please report the model",
            code="attention-recompiled",
        ) from error
    return out[0].transpose(0, 1)[:length]


def _blocks(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Return the block mask, which all layers of a batch with this window share."""
    key = "flex", window, device
    if key not in layout.made:
        layout.made[key] = block_mask(layout, window, device)
    made: BlockMask = layout.made[key]
    return made


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Return the mask that `create_block_mask` would build by testing every pair of tokens."""
    counts = _seen_pairs(layout, window)
    full = counts == BLOCK * BLOCK
    some = (counts > 0) & ~full
    length = _whole_blocks(layout.num_tokens)
    made: BlockMask = BlockMask.from_kv_blocks(
        *[sent(t, device) for t in (*_ordered(some), *_ordered(full))],  # type: ignore[arg-type,misc]
        BLOCK_SIZE=BLOCK,
        mask_mod=rule(layout, window, device),
        seq_lengths=(length, length),
    )
    return made


def _ordered(blocks_QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each block of queries the number of its key blocks (1, 1, blocks), and their
    indices, before those of the other blocks (1, 1, blocks, blocks)."""
    order = torch.argsort(blocks_QK.int(), dim=-1, descending=True, stable=True)
    return blocks_QK.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _seen_pairs(layout: Layout, window: int | None) -> torch.Tensor:
    """Return the number of visible pairs in each block, as (query blocks, key blocks)."""
    count = _whole_blocks(layout.num_tokens) // BLOCK
    q0, q1, k0, k1, shift = torch.tensor(list(_regions(layout, window))).t()
    # Every block of queries of a region with every block of its keys.
    first_q, first_k = q0 // BLOCK, k0 // BLOCK
    across_q, across_k = (q1 - 1) // BLOCK - first_q + 1, (k1 - 1) // BLOCK - first_k + 1
    each = across_q * across_k
    region = torch.arange(len(each)).repeat_interleave(each)
    within = torch.arange(len(region)) - (each.cumsum(0) - each)[region]
    block_q = first_q[region] + within // across_k[region]
    block_k = first_k[region] + within % across_k[region]
    q_from = torch.maximum(q0[region], block_q * BLOCK)
    q_to = torch.minimum(q1[region], (block_q + 1) * BLOCK)
    k_from = torch.maximum(k0[region], block_k * BLOCK)
    width = torch.minimum(k1[region], (block_k + 1) * BLOCK) - k_from

    def up_to(shift: torch.Tensor) -> torch.Tensor:
        """Return the number of pairs with k <= q + shift, for each entry."""
        last = q_to + shift - k_from
        return _sum_to(last, width) - _sum_to(q_from + shift - k_from, width)

    pairs = up_to(shift[region])
    if window is not None:
        pairs -= up_to(shift[region] - window)
    counts = torch.zeros(count * count, dtype=torch.int64)
    counts.index_add_(0, block_q * count + block_k, pairs)
    return counts.view(count, count)


def _sum_to(last: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return the sum of all integers up to `last`, each clipped to the range from 0 to `most`."""
    rising = torch.minimum(last.clamp(min=0), most)
    return rising * (rising + 1) // 2 + (last - most).clamp(min=0) * most


def _regions(layout: Layout, window: int | None) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (q0, q1, k0, k1, shift).

    Queries in [q0, q1) see the keys in [k0, k1) with k <= q + shift and, if there is a window,
    k > q + shift - window.
    """
    for node, (start, stop) in enumerate(zip(layout.starts, layout.starts[1:], strict=False)):
        if window is None:
            yield start, layout.ends[node], start, stop, 0
            continue
        for seen in (*layout.ancestors(node), node):
            k0, k1 = layout.starts[seen], layout.starts[seen + 1]
            shift = (layout.depths[node] - start) - (layout.depths[seen] - k0)
            yield start, stop, k0, k1, shift
