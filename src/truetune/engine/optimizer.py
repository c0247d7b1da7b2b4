"""Optimisers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OPTIMIZERS = ("adamw", "sgd")


def build_optimizer(
    name: str,
    named_parameters: Sequence[tuple[str, torch.nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """An optimiser over two groups: matrices, which decay, and the rest, which does not.

    AdamW's betas are (0.9, 0.999) and its eps 1e-8 (Loshchilov and Hutter 2019, and the default
    of every peer); SGD has no momentum.

    Raises:
        ValueError: an unknown name.
    """
    import torch

    decayed = [p for _, p in named_parameters if p.ndim >= 2]
    others = [p for _, p in named_parameters if p.ndim < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, weight_decay), (others, 0.0))
        if params
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    raise ValueError(f"unknown optimiser {name!r}; known: {', '.join(OPTIMIZERS)}")
