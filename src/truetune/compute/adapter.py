"""LoRA on a frozen layer in one autograd function that saves few tensors.

input   a model with peft's LoRA layers (peft itself is not imported)
does    computes y = x W^T + b + s drop(x) A^T B^T in one function, without a gradient of W. It
        keeps x, which layers on the same input share, and the product of shape (T, r), and
        computes the rest again in the backward pass
output  the same numbers as peft's own forward, tested on each kind of layer before it is used

The dropout mask is drawn again in the backward pass; it depends on the tokens (dropout.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from truetune.compute.dropout import dropped, salt


class FourBits:
    """The frozen weight of a bitsandbytes layer, which is dequantised for one product at a time."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as (O, D), for O outputs and D inputs."""
        from bitsandbytes.functional import dequantize_4bit

        weight = self.layer.weight
        made: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return made.to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_OD: torch.Tensor | FourBits,
        bias_O: torch.Tensor | None,
        a_RD: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
        p: float,
        states_T: torch.Tensor | None,
    ) -> torch.Tensor:
        scaling = scaling / (1 - p)
        a, b = a_RD.to(x_TD.dtype), b_OR.to(x_TD.dtype)
        packed = weight_OD if isinstance(weight_OD, FourBits) else None
        if isinstance(weight_OD, FourBits):
            weight_OD = weight_OD.dense(x_TD.dtype)
        y_TO = F.linear(x_TD, weight_OD, bias_O)
        xa_TR = _without(x_TD, p, states_T) @ a.t()
        y_TO.addmm_(xa_TR, b.t(), alpha=scaling)
        kept_OD = None if packed else weight_OD
        ctx.save_for_backward(x_TD, kept_OD, a_RD, b_OR, xa_TR, states_T)
        ctx.scaling, ctx.p, ctx.packed = scaling, p, packed
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_OD, a_RD, b_OR, xa_TR, states_T = ctx.saved_tensors
        a, b = a_RD.to(x_TD.dtype), b_OR.to(x_TD.dtype)
        of_b = (grad_TO.t() @ xa_TR).to(b_OR.dtype).mul_(ctx.scaling)
        inner_TR = (grad_TO @ b).mul_(ctx.scaling)
        mask_TD = None if states_T is None else dropped(states_T, x_TD.shape[1], ctx.p)
        kept_TD = x_TD if mask_TD is None else x_TD.masked_fill(mask_TD, 0)
        of_a = (inner_TR.t() @ kept_TD).to(a_RD.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = inner_TR @ a
            if mask_TD is not None:
                of_x.masked_fill_(mask_TD, 0)
            of_x.addmm_(grad_TO, ctx.packed.dense(x_TD.dtype) if ctx.packed else weight_OD)
        return of_x, None, None, of_a, of_b, None, None, None


def _without(x_TD: torch.Tensor, p: float, states_T: torch.Tensor | None) -> torch.Tensor:
    if states_T is None:
        return x_TD
    return x_TD.masked_fill(dropped(states_T, x_TD.shape[1], p), 0)


@dataclass(frozen=True)
class Draw:
    """The numbers that determine the dropout mask of one layer in one step.

    Attributes:
        keys_T: (T,) int64, the keys of the batch's tokens (see `token_keys`).
    """

    seed: int
    step: int
    layer: int
    keys_T: torch.Tensor

    def states(self, count: int) -> torch.Tensor:
        """Return the states of the generator for `count` tokens: (count,) int64."""
        # A layer that sees only some tokens, such as an expert, has no keys for them in its order.
        # Its states follow from the order.
        keys = self.keys_T
        if len(keys) != count:
            keys = self.keys_T.sum() + torch.arange(count, device=self.keys_T.device)
        return keys + salt(self.seed, self.step, self.layer)


def _fast_forward(layer: Any, adapter: str) -> Callable[[torch.Tensor], torch.Tensor]:
    base, a, b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    packed = FourBits(base) if _is_four_bits(base) else None

    def forward(x: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        device = x.device.type
        compute = _computed_in(base, x.dtype)
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        bias = None if base.bias is None else base.bias.to(compute)
        p = getattr(dropout, "p", 0.0) if layer.training else 0.0
        states_T = None
        if p:
            if draw is None:
                raise ValueError("dropout needs a batch whose tokens have keys")
            states_T = draw.states(x.numel() // x.shape[-1])
        with torch.autocast(device, enabled=False):
            y_TO = _LoraLinear.apply(
                x.to(compute).reshape(-1, x.shape[-1]).contiguous(),
                packed or base.weight.to(compute),
                bias,
                a.weight,
                b.weight,
                layer.scaling[adapter],
                p,
                states_T,
            )
        y = y_TO.view(*x.shape[:-1], -1)
        return y.to(x.dtype) if packed else y

    return forward


def _is_four_bits(base: Any) -> bool:
    """Return whether a layer is a 4-bit layer of bitsandbytes."""
    # By name, because bitsandbytes is an extra and takes a second to import.
    return type(base).__name__ == "Linear4bit" and hasattr(base.weight, "quant_state")


def _computed_in(base: Any, given: torch.dtype) -> torch.dtype:
    """Return the dtype of a layer's product without autocast."""
    asked: torch.dtype | None = getattr(base, "compute_dtype", None)
    return asked if asked is not None and _is_four_bits(base) else given


def find_adapters(model: torch.nn.Module) -> dict[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Return the LoRA layers for which the fast forward equals their own, with that forward."""
    proved: dict[Any, bool] = {}
    found: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}
    layer: Any
    for layer in model.modules():
        adapter = _plain_adapter(layer)
        if adapter is None:
            continue
        fast = _fast_forward(layer, adapter)
        kind = (
            type(layer),
            layer.base_layer.weight.shape,
            layer.base_layer.bias is None,
            layer.lora_A[adapter].weight.shape,
            layer.scaling[adapter],
        )
        if kind not in proved:
            proved[kind] = _is_equal(layer, adapter, fast)
        if proved[kind]:
            found[layer] = fast
    return found


def plain_adapters(model: torch.nn.Module) -> dict[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Return the LoRA layers that `find_adapters` would test, for a model of fake tensors."""
    layers = ((layer, _plain_adapter(layer)) for layer in model.modules())
    return {layer: _fast_forward(layer, name) for layer, name in layers if name is not None}


def _plain_adapter(layer: Any) -> str | None:
    """Return the name of the only adapter on a frozen linear layer; None for other layers."""
    if not all(hasattr(layer, name) for name in ("base_layer", "lora_A", "lora_B", "scaling")):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = (
        len(active) == 1
        and (type(layer.base_layer) is torch.nn.Linear or _is_four_bits(layer.base_layer))
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and not layer.merged
        and not layer.disable_adapters
    )
    return active[0] if plain else None


def _is_equal(layer: Any, adapter: str, fast: Callable[..., torch.Tensor]) -> bool:
    """Return whether outputs and gradients equal those of the layer's own forward, without dropout.

    B is replaced by random numbers, because it starts as zeros.
    """
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(b.device)

    swapped = {f"lora_B.{adapter}.weight": (normal(*b.shape) * 0.1).to(b.dtype).requires_grad_()}
    base = layer.base_layer
    dtype = _computed_in(base, base.weight.dtype if base.weight.is_floating_point() else b.dtype)
    x = normal(1, 3, a.shape[1]).to(dtype).requires_grad_()
    trained = [swapped.get(n, p) for n, p in layer.named_parameters() if p.requires_grad]
    before, was_training = layer.forward, layer.training
    layer.eval()
    results = []
    try:
        with torch.enable_grad():
            for forward in (before, fast):
                layer.forward = forward
                y = torch.func.functional_call(layer, swapped, (x,))
                loss = y.float().square().sum()
                grads = torch.autograd.grad(loss, [x, *trained], allow_unused=True)
                results.append([y, *grads])
    finally:
        del layer.forward
        layer.train(was_training)
    return all(_same(own, other, x.dtype) for own, other in zip(*results, strict=True))


def _same(own: torch.Tensor | None, other: torch.Tensor | None, computed: torch.dtype) -> bool:
    """Return whether two tensors (or None) have the same dtype and differ by rounding only."""
    if own is None or other is None:
        return own is other
    limit = 1e-4 if computed == torch.float32 else 3e-2
    apart = (own.float() - other.float()).norm()
    return own.dtype == other.dtype and bool(apart <= limit * own.float().norm() + 1e-12)


@contextlib.contextmanager
def fast_adapters(
    layers: Mapping[torch.nn.Module, Callable[..., torch.Tensor]],
    keys_T: torch.Tensor | None = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> Iterator[None]:
    """Let the layers use their fast forward inside the context, also when they are recomputed.

    Args:
        keys_T: (T,) int64, the keys of the batch's tokens; required for dropout.
        seed, step: these also determine the dropout mask.
    """
    for number, (layer, forward) in enumerate(layers.items()):
        draw = None if keys_T is None else Draw(seed, step, number, keys_T)
        layer.forward = functools.partial(forward, draw=draw)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
