"""Copies to a device that do not make the host wait for it."""

from __future__ import annotations

from truetune.system.lazy import torch


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device. A copy from pageable memory waits for all work that the device was
    given before; one from pinned memory takes its place in the queue."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
