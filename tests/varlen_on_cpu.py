"""The variable-length kernel's contract by torch's CPU flash attention, sequence by sequence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from truetune.compute.cuda.varlen import Placed

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def seen(at: Placed, num_q: int, num_k: int) -> torch.Tensor:
    """(Q, K), bool: aligned at the last query and the last key."""
    q = torch.arange(num_q)[:, None] + num_k - num_q
    k = torch.arange(num_k)
    if not at.call.causal:
        return torch.ones(num_q, num_k, dtype=torch.bool)
    return (k <= q) & (k > q - (at.call.window or num_k + num_q))


class OnCpu:
    """As `Flash`, and it counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, q: Any, k: Any, v: Any, at: Placed, scale: float) -> Any:
        self.calls += 1
        outs, lses = [], []
        for (a, b), (c, d) in spans(at):
            parts = batched(q[a:b], k[c:d], v[c:d])
            out, lse = _flash(*parts, 0.0, False, attn_mask=mask(at, b - a, d - c), scale=scale)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].view(q.shape[1], b - a))
        return torch.cat(outs).to(q.dtype), torch.cat(lses, 1).float()

    def backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, at: Placed, scale: float
    ) -> Any:
        made = []
        heads, groups = q.shape[1], k.shape[1]
        for (a, b), (c, d) in spans(at):
            g, o = (t[a:b].transpose(0, 1)[None].float() for t in (grad, out))
            of_q, of_k, of_v = _flash_backward(
                g, *batched(q[a:b], k[c:d], v[c:d]), o, lse[None, :, a:b].contiguous(), 0.0, False,
                attn_mask=mask(at, b - a, d - c), scale=scale,
            )  # fmt: skip
            shared = [t[0].unflatten(0, (groups, heads // groups)).sum(1) for t in (of_k, of_v)]
            made.append([t.transpose(0, 1) for t in (of_q[0], *shared)])
        return tuple(torch.cat(parts).to(q.dtype) for parts in zip(*made, strict=True))


def batched(q: Any, k: Any, v: Any) -> list[torch.Tensor]:
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    return [t.transpose(0, 1)[None].float() for t in (q, k, v)]


def mask(at: Placed, num_q: int, num_k: int) -> torch.Tensor:
    shown = seen(at, num_q, num_k)
    return torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)


def spans(at: Placed) -> Any:
    return zip(pairwise(at.cum_q.tolist()), pairwise(at.cum_k.tolist()), strict=True)
