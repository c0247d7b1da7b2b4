"""Measure the peak memory of a forward and a backward pass on a CUDA device.

The passes are computed as in training, and the allocator reports the peaks. Watching every
operation (alive.py) would need a torch mode in which compiled attention does not run. The
allocator's count also includes the memory that kernels use inside an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from truetune.compute.packing import PackedBatch, pack
from truetune.compute.route import Route
from truetune.contract.example import SFTExample

# Tokens of the two batches (of one row and two rows if rows are longer). They are large compared
# with the sizes to which kernels and the allocator round up.
_SMALL, _LARGE = 512, 1024


def batches(longest: int) -> list[PackedBatch]:
    """Return three batches; the last is about twice as large as the others.

    The first one is for memory that libraries keep from their first call on.
    """
    # Each row has one target, so that the head's logits take hardly any memory.
    length = min(max(longest - 1, 1), _SMALL)
    row = SFTExample([t % 7 for t in range(length + 1)], [0] * length + [1])
    few, many = _SMALL // length, _LARGE // length
    return [pack([row], [0] * count, min_shared=None) for count in (few, few, many)]


class _Peaks:
    """The peak of allocated bytes since the last look, minus the bytes allocated at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device) - self.start
        torch.cuda.reset_peak_memory_stats(self.device)
        return max(int(peak), 0)


def peak_bytes(
    route: Route, batch: PackedBatch, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[list[int], list[int], list[int]]:
    """Return peaks in bytes, as `alive_bytes` does: before the head, from the head to the loss, and
    in the backward pass up to each parameter's gradient.
    """
    # The allocator counts on the host, so nothing waits for the device.
    parameters = [p for p in route.model.parameters() if p.requires_grad]
    device = parameters[0].device
    batch = batch.to(device)
    before, backward = list[int](), list[int]()
    peaks = _Peaks(device)
    handles: list[Any] = []
    if route.head is not None:
        handles.append(
            route.head.module.register_forward_pre_hook(lambda *_: before.append(peaks.look()))
        )
    try:
        with torch.enable_grad(), route.scope(batch):
            with autocast():
                loss = route.loss_sum(batch)
            forward = peaks.look()
            handles += [
                p.register_post_accumulate_grad_hook(lambda _: backward.append(peaks.look()))
                for p in parameters
            ]
            loss.backward()
            backward.append(peaks.look())
    finally:
        for handle in handles:
            handle.remove()
    return before[:1] or [0], [forward], backward


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device in bytes, with the memory that torch keeps for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
