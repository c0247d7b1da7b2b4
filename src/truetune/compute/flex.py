"""Attention over a packed sequence on CUDA, by FlexAttention: blocks that nobody sees are skipped.

The rule of who sees whom is tested on CPU against the layout; speed on a GPU is not measured yet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from truetune.compute.layout import Layout


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def rule(layout: Layout, window: int | None, device: torch.device) -> Any:
    """FlexAttention's mask function of a layout.

    Nodes stand depth first, so a token is seen by those after it and before the end of its
    node's descendants.
    """
    ends = [end for end, n in zip(layout.ends, layout.lengths, strict=True) for _ in range(n)]
    seen_until = torch.tensor(ends, device=device)
    positions = torch.tensor(layout.positions, device=device)

    def sees(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (k <= q) & (q < seen_until[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    return sees


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """(T, H, D) from query (1, H, T, D), key and value (1, G, T, D)."""

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        assert softcap
        return softcap * torch.tanh(score / softcap)

    # Compiled for CUDA; elsewhere plain, which is slow and the same.
    call = _compiled() if query.is_cuda else flex_attention
    out = call(
        query,
        key,
        value,
        score_mod=capped if softcap else None,
        block_mask=_blocks(layout, window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def _blocks(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Made once for all layers of a batch that have this window."""
    key = "flex", window
    if key not in layout.made:
        length = layout.num_tokens
        made = create_block_mask(rule(layout, window, device), None, None, length, length, device)
        layout.made[key] = made
    return layout.made[key]
