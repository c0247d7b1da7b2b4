"""AdamW on weights held in bfloat16, without losing what float32 would keep.

input   bfloat16 weights and gradients
does    a float32 number is 32 bits, of which bfloat16 is the upper half: the lower half of every
        weight is kept beside it as an int16, so that the two are the float32 master weight, in 4
        bytes instead of 6 (Kalamkar et al. 2020, Split-SGD-BF16)
output  the same weights, bit for bit, as torch's AdamW on float32 masters given the same gradients

A remainder in bfloat16 (Kahan) takes the same two bytes and keeps 16 of the 24 bits of precision;
stochastic rounding takes none and adds noise of half a unit in the last place to every weight at
every step. Both moments stay float32: a mean over a thousand steps moves by less than bfloat16
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from truetune.compute.private import fused_adamw_

# Weights that exist in float32 at one time: on CPU what stays in the cache, on CUDA what keeps the
# kernels long and few (256 MB).
_CHUNK, _CHUNK_CUDA = 2**20, 2**26


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on bfloat16 weights; weights of other types as they are.

    Args:
        params: parameters, or groups of them with `lr` and `weight_decay`.
        lr, betas, eps, weight_decay: as torch's AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            for pieces in _bunches(present):
                self._update(pieces, group)
        return loss

    def _update(self, pieces: Sequence[_Piece], group: dict[str, Any]) -> None:
        wholes, gradients, means, squares, steps = [], [], [], [], []
        parts = []
        for parameter, part in pieces:
            state = self._state(parameter)
            if not part.start:
                state["step"] += 1
            assert parameter.grad is not None
            weight = parameter.view(-1)[part]
            low = state["low"].view(-1)[part] if "low" in state else None
            whole = weight if low is None else joined(weight, low)
            parts.append((whole, weight, low))
            wholes.append(whole)
            gradients.append(parameter.grad.reshape(-1)[part].to(whole.dtype))
            means.append(state["exp_avg"].view(-1)[part])
            squares.append(state["exp_avg_sq"].view(-1)[part])
            steps.append(state["step"])
        fused_adamw_(wholes, gradients, means, squares, steps, group)
        for whole, weight, low in parts:
            if low is not None:
                split_(whole, weight, low)

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        return state


_Piece = tuple[torch.nn.Parameter, slice]


def _bunches(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[_Piece]]:
    """Pieces of parameters that are updated in one call: together no more weights than a chunk,
    all of one type and device."""
    bunch: list[_Piece] = []
    kind, filled = None, 0
    for parameter in parameters:
        most = _CHUNK_CUDA if parameter.is_cuda else _CHUNK
        for start in range(0, parameter.numel(), most):
            part = slice(start, min(start + most, parameter.numel()))
            size = part.stop - start
            if bunch and (filled + size > most or kind != (parameter.dtype, parameter.device)):
                yield bunch
                bunch, filled = [], 0
            bunch.append((parameter, part))
            kind, filled = (parameter.dtype, parameter.device), filled + size
    if bunch:
        yield bunch


def joined(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 numbers whose nearest bfloat16 is `high` and whose rest is `low` (int16)."""
    bits = high.view(torch.int16).to(torch.int32) * 2**16 + low
    return bits.view(torch.float32)


def split_(whole: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Write float32 numbers into their nearest bfloat16, ties away from zero, and the rest."""
    bits = whole.view(torch.int32)
    # Cut to the upper 16 bits after adding half of their unit: -2^15 to 2^15 - 1 is left.
    upper = (bits + 2**15) >> 16
    low.copy_(bits - upper * 2**16)
    high.view(torch.int16).copy_(upper)
