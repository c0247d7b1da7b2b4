"""When memory runs out: how it is recognised, and what a second try starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError for devices and a RuntimeError of its allocator for the CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def get_random_state() -> list[torch.Tensor]:
    """Of the CPU, then of each CUDA device."""
    import torch

    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_cuda]


def set_random_state(state: list[torch.Tensor]) -> None:
    """As `get_random_state` gave it; states of devices that are not here are left out."""
    import torch

    torch.set_rng_state(state[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1 : 1 + torch.cuda.device_count()])
