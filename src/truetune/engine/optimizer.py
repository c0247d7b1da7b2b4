"""Optimizers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from truetune.model.quantise import require_bitsandbytes
from truetune.recipe.settings import Recipe, setting_types
from truetune.system.lazy import torch


def build_optimizer(
    settings: Recipe,
    named_parameters: Sequence[tuple[str, torch.nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of the settings, over two groups: matrices, which decay, and the rest, which
    does not.

    AdamW's betas are (0.9, 0.999) and its eps 1e-8 (Loshchilov and Hutter 2019, and the default
    of every peer), in 8 bits as well (Dettmers et al. 2022, through bitsandbytes: matrices of 4,096
    elements or more; the paged one spills to the host's memory on CUDA); `adamw_bf16` takes weights
    in bfloat16 and is AdamW on float32 ones, see split_adamw.py; SGD has no momentum.

    Raises:
        ValueError: an unknown name.
        UsageError: bitsandbytes is missing.
    """
    name = settings.optim
    decayed = [p for _, p in named_parameters if p.ndim >= 2]
    others = [p for _, p in named_parameters if p.ndim < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, weight_decay), (others, 0.0))
        if params
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "adamw_bf16":
        from truetune.engine.split_adamw import SplitAdamW

        return SplitAdamW(groups, lr=lr)
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        require_bitsandbytes(f"--optim {name}")
        import bitsandbytes

        kind = "AdamW8bit" if name == "adamw_8bit" else "PagedAdamW8bit"
        built: torch.optim.Optimizer = getattr(bitsandbytes.optim, kind)(groups, lr=lr)
        return built
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    raise ValueError(
        f"unknown optimizer {name!r}; known: {', '.join(get_args(setting_types()['optim']))}"
    )


def optimizer_bytes(name: str, parameters: Sequence[torch.nn.Parameter]) -> int:
    """What the optimizer will keep: two moments a weight for AdamW, of one byte each in 8 bits
    (from 4,096 elements on), and the lower half of bfloat16 weights; nothing for SGD."""
    if name == "sgd":
        return 0
    if name == "adamw_bf16":
        return sum(p.numel() * (10 if p.element_size() == 2 else 8) for p in parameters)
    small = 4096 if name.endswith("8bit") else float("inf")
    return sum(2 * p.numel() * (1 if p.numel() >= small else p.element_size()) for p in parameters)


def gradient_norms(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The L2 norm of each, in float32; on a GPU by a few kernels for all of them."""
    if gradients[0].is_cuda and hasattr(torch, "_foreach_norm"):
        return list(torch._foreach_norm(list(gradients), 2, torch.float32))
    return [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
