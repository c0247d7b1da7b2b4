"""The learning rate of a step, as a pure function."""

from __future__ import annotations

import math
from typing import Literal, get_args

SchedulerType = Literal["cosine", "linear", "constant"]
SCHEDULER_TYPES: tuple[SchedulerType, ...] = get_args(SchedulerType)


def learning_rate(
    step: int,
    *,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    kind: SchedulerType = "cosine",
) -> float:
    """Learning rate of a step (0-based).

    Warm-up rises linearly to max_lr at step warmup_steps - 1; then cosine (Loshchilov and Hutter
    2017, without restarts) or a line falls to min_lr at max_steps, or the rate stays.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in SCHEDULER_TYPES:
        raise ValueError(f"unknown schedule {kind!r}; known: {', '.join(SCHEDULER_TYPES)}")
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if kind == "constant":
        return max_lr
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return min_lr + share * (max_lr - min_lr)
