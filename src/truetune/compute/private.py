"""torch's private functions that the CPU path is built on, and one that only some devices have.
Each is asked once whether it is there and computes what it is used for; and what is done without
it, by public functions, slower and equal.

A release of torch may rename or change them without notice; `missing` says which are gone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from truetune.errors import is_out_of_memory


def flash_forward(*arguments: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash attention: output and log-sum-exp."""
    aten: Any = torch.ops.aten
    made: tuple[torch.Tensor, torch.Tensor]
    made = aten._scaled_dot_product_flash_attention_for_cpu(*arguments, **settings)
    return made


def flash_backward(*arguments: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """Its gradients of queries, keys and values."""
    aten: Any = torch.ops.aten
    made: tuple[torch.Tensor, ...]
    made = aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, **settings)
    return made


@functools.cache
def has_flash() -> bool:
    """Whether they are there, take a log-sum-exp of more keys than they were given, and are right.

    Without them attention is a softmax written out, node by node.
    """

    def right() -> bool:
        generator = torch.Generator().manual_seed(0)
        q, k, v, g = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(4))
        scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~torch.ones(5, 5).tril().bool(), -1e9)
        # A key more, whose value is 0: its share is in the log-sum-exp alone.
        whole = torch.logaddexp(scores.logsumexp(-1), torch.zeros(()))
        weights = (scores - whole[..., None]).exp()
        out = weights @ v
        part, lse = flash_forward(q, k, v, 0.0, True, attn_mask=None, scale=0.3)
        share = (lse.view(1, 2, 5) - whole).exp()[..., None]
        of_weights = g @ v.transpose(2, 3) - (g * out).sum(-1, keepdim=True)
        of_scores = weights * of_weights * 0.3
        wanted = (of_scores @ k, of_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ g)
        made = flash_backward(g, q, k, v, out, whole, 0.0, True, attn_mask=None, scale=0.3)
        pairs = zip((part * share, *made), (out, *wanted), strict=True)
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)

    return _holds(right)


@functools.cache
def _softmax_backward() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def fused(grad: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch._softmax_backward_data(grad, p, -1, p.dtype)

    def plain(grad: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        made = grad * p
        return made.sub_(p * made.sum(-1, keepdim=True))

    def right() -> bool:
        grad, p = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).softmax(-1)
        return torch.allclose(fused(grad, p), plain(grad, p), atol=1e-6)

    return fused if _holds(right) else plain


def softmax_backward(grad: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Gradient of the scores, from that of their softmax `p` over the last dimension."""
    return _softmax_backward()(grad, p)


def add_product_(total_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """total += a @ b, in place, total in float32; by one product that is never rounded to the type
    of a and b, where the device has it."""
    if a_MK.dtype == total_MN.dtype:
        total_MN.addmm_(a_MK, b_KN)
    elif _has_wide_products(a_MK.device.type, a_MK.dtype):
        _wide(total_MN, a_MK, b_KN)
    else:
        total_MN += a_MK @ b_KN


def _wide(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@functools.cache
def _has_wide_products(device: str, dtype: torch.dtype) -> bool:
    """Not every device has them, nor every release of torch."""

    def right() -> bool:
        # Sums that the type of the factors does not hold.
        a, b = (torch.full(shape, 1 + 2**-7, device=device) for shape in ((8, 16), (16, 8)))
        total = torch.full((8, 8), 1e-3, device=device)
        wanted = total + a @ b
        _wide(total, a.to(dtype), b.to(dtype))
        return torch.allclose(total, wanted, rtol=1e-5)

    return _holds(right)


def without_modes() -> AbstractContextManager[Any]:
    """Inside, tensors have numbers also where a mode around gives them none."""
    from torch.utils import _python_dispatch as dispatch

    disable = getattr(dispatch, "_disable_current_modes", None)
    return disable() if disable else contextlib.nullcontext()


def fused_adamw_(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    group: dict[str, Any],
) -> None:
    """One AdamW step, in place, in one call; `steps` counts this one already."""
    if _has_fused_adamw():
        torch._fused_adamw_(
            list(weights),
            list(gradients),
            list(means),
            list(squares),
            [],
            list(steps),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        return
    for weight, gradient, mean, square, step in zip(
        weights, gradients, means, squares, steps, strict=True
    ):
        _adamw_(weight, gradient, mean, square, float(step), group)


@functools.cache
def _has_fused_adamw() -> bool:
    def right() -> bool:
        group: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        results = []
        for fused in (True, False):
            w, g, m, s = (torch.full((3,), value) for value in (1.0, 0.5, 0.2, 0.3))
            if fused:
                lr, (beta1, beta2) = group["lr"], group["betas"]
                torch._fused_adamw_(
                    [w], [g], [m], [s], [], [torch.tensor(2.0)], lr=lr, beta1=beta1, beta2=beta2,
                    weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
                )  # fmt: skip
            else:
                _adamw_(w, g, m, s, 2.0, group)
            results.append(torch.stack([w, m, s]))
        fused_3, plain_3 = results
        return torch.allclose(fused_3, plain_3, rtol=1e-5)

    return _holds(right)


def _adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step: float,
    group: dict[str, Any],
) -> None:
    """Loshchilov and Hutter 2019, Algorithm 2."""
    beta1, beta2 = group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def _holds(claim: Callable[[], bool]) -> bool:
    """Whether it does; outside of all modes, and whatever a changed function says.

    Raises:
        RuntimeError: memory ran out, which says nothing about the function.
    """
    with without_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            return claim()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False
