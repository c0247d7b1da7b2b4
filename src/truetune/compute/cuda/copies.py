"""Copy tensors to a device without making the host wait."""

from __future__ import annotations

from truetune.system.lazy import torch


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return the tensor on a device."""
    # A copy from pageable memory waits until the device has finished all earlier work; a copy from
    # pinned memory is queued.
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
