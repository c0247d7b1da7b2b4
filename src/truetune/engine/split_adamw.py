"""AdamW on weights held in bfloat16, without losing what float32 would keep.

input   bfloat16 weights and gradients
does    a float32 number is 32 bits, of which bfloat16 is the upper half: the lower half of every
        weight is kept beside it as an int16, so that the two are the float32 master weight, in 4
        bytes instead of 6 (Kalamkar et al. 2020, Split-SGD-BF16)
output  the same weights, bit for bit, as torch's AdamW on float32 masters given the same gradients
who     build_optimizer, for `adamw_bf16`

A remainder in bfloat16 (Kahan) takes the same two bytes and keeps 16 of the 24 bits of precision;
stochastic rounding takes none and adds noise of half a unit in the last place to every weight at
every step. Both moments stay float32: a mean over a thousand steps moves by less than bfloat16
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Weights that exist in float32 at one time.
_CHUNK = 2**20


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        state["step"] += 1
        assert parameter.grad is not None
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        means, squares = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for start in range(0, weights.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            weight = weights[part]
            split = "low" in state
            low = state["low"].view(-1)[part] if split else weight
            whole = joined(weight, low) if split else weight
            torch._fused_adamw_(
                [whole],
                [gradients[part].to(whole.dtype)],
                [means[part]],
                [squares[part]],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            if split:
                split_(whole, weight, low)


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
