"""Attention over a packed sequence by FlexAttention: blocks that nobody sees are skipped.

For what the variable-length kernel does not take on CUDA: soft caps, float32, wide heads. Which
blocks are seen is counted from the layout; no mask of the sequence's square is made. Lengths are
rounded up to whole blocks, so that a kind of layer is compiled for one length and then for all.
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

# Queries and keys of a block, as FlexAttention has them.
BLOCK = 128
# Kinds of layers (windows, soft caps, with and without gradients), twice each: torch's own limit
# of 8 is met by a model with two windows, and what is beyond it is computed with all scores at
# once, without a word.
_MOST_COMPILED = 64


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, fullgraph=True)


def rule(layout: Layout, window: int | None, device: torch.device) -> Any:
    """FlexAttention's mask function of a layout.

    Nodes stand depth first, so a token is seen by those after it and before the end of its
    node's descendants. What fills the last block sees nothing and is not seen.
    """
    ends = [end for end, n in zip(layout.ends, layout.lengths, strict=True) for _ in range(n)]
    filling = [0] * (_whole_blocks(layout.num_tokens) - layout.num_tokens)
    seen_until = sent(torch.tensor(ends + filling), device)
    positions = sent(torch.tensor(layout.positions + filling), device)

    def sees(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (k <= q) & (q < seen_until[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    return sees


def _whole_blocks(length: int) -> int:
    """At least two: torch compiles sizes of one anew."""
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
    """(T, H, D) from query (1, H, T, D), key and value (1, G, T, D).

    Raises:
        TruetuneError: torch has compiled it for more kinds of layers than it takes.
    """

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        assert softcap
        return softcap * torch.tanh(score / softcap)

    # Compiled for CUDA; elsewhere plain, which is slow and the same.
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
    """Made once for all layers of a batch that have this window."""
    key = "flex", window, device
    if key not in layout.made:
        layout.made[key] = block_mask(layout, window, device)
    made: BlockMask = layout.made[key]
    return made


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """What `create_block_mask` makes of the rule, which it asks of every pair of tokens."""
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
    """Of each block of queries: how many blocks of keys there are, and which, those first."""
    order = torch.argsort(blocks_QK.int(), dim=-1, descending=True, stable=True)
    return blocks_QK.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _seen_pairs(layout: Layout, window: int | None) -> torch.Tensor:
    """(blocks of queries, blocks of keys): how many pairs of tokens of each two see."""
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
        """Pairs with k <= q + shift."""
        last = q_to + shift - k_from
        return _sum_to(last, width) - _sum_to(q_from + shift - k_from, width)

    pairs = up_to(shift[region])
    if window is not None:
        pairs -= up_to(shift[region] - window)
    counts = torch.zeros(count * count, dtype=torch.int64)
    counts.index_add_(0, block_q * count + block_k, pairs)
    return counts.view(count, count)


def _sum_to(last: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Sum of the numbers up to `last`, each no less than 0 and no more than `most`."""
    rising = torch.minimum(last.clamp(min=0), most)
    return rising * (rising + 1) // 2 + (last - most).clamp(min=0) * most


def _regions(layout: Layout, window: int | None) -> Iterator[tuple[int, int, int, int, int]]:
    """(q0, q1, k0, k1, shift): queries [q0, q1) see keys of [k0, k1) with k <= q + shift, and
    within a window k > q + shift - window."""
    for node, (start, stop) in enumerate(zip(layout.starts, layout.starts[1:], strict=False)):
        if window is None:
            yield start, layout.ends[node], start, stop, 0
            continue
        for seen in (*layout.ancestors(node), node):
            k0, k1 = layout.starts[seen], layout.starts[seen + 1]
            shift = (layout.depths[node] - start) - (layout.depths[seen] - k0)
            yield start, stop, k0, k1, shift
