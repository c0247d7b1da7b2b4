"""How much a CUDA device holds while a batch goes through a model and back: asked of the allocator,
in passes that are computed as the loop computes them.

Watching every operation (alive.py) puts a mode around the model in which compiled attention
refuses to run; and the allocator's own count has what kernels take inside an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from truetune.compute.packing import PackedBatch, pack
from truetune.compute.route import Route
from truetune.contract.example import SFTExample

# Tokens of the two batches, or one row and two where rows are longer: beyond what kernels and the
# allocator round up to.
_SMALL, _LARGE = 512, 1024


def batches(longest: int) -> list[PackedBatch]:
    """Three, each row with one target, so that the head's logits take next to nothing. The first is
    there for what libraries keep from their first call on; the last is about twice as large."""
    length = min(max(longest - 1, 1), _SMALL)
    row = SFTExample([t % 7 for t in range(length + 1)], [0] * length + [1])
    few, many = _SMALL // length, _LARGE // length
    return [pack([row], [0] * count, min_shared=None) for count in (few, few, many)]


class _Peaks:
    """The most bytes held since the last look, each time beyond what was held at the start."""

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
    """As `alive_bytes`: the most bytes before the head; from the head to the loss; and backward, up
    to each parameter's gradient.

    The allocator's counts are the host's: nothing waits for the device.
    """
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
    """What the driver has, and what torch keeps of what it freed."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
