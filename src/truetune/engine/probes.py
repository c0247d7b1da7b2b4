"""The facts of a step and the probes that judge them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from truetune.findings import Finding


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What a step knows about itself.

    Attributes:
        step: 1 for the first.
        loss: mean over the supervised tokens of the step, in nats.
        learning_rate: used by this step.
        grad_norm: L2 norm over all trainable parameters, before clipping.
        num_tokens: unpadded tokens of the step's rows, each row whole.
        num_supervised: targets of the step.
        seconds: wall time, fetch to optimizer end (0.0 when asked before the optimizer).
        rows: indices of the step's examples.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised: int
    seconds: float
    rows: tuple[int, ...]


Probe = Callable[[StepFacts], Finding | None]


def non_finite(facts: StepFacts) -> Finding | None:
    """Loss or gradient is NaN or infinite: an optimizer step would destroy every weight."""
    if math.isfinite(facts.loss) and math.isfinite(facts.grad_norm):
        return None
    what = "loss" if not math.isfinite(facts.loss) else "gradient norm"
    value = facts.loss if what == "loss" else facts.grad_norm
    return Finding(
        code="non-finite",
        level="error",
        what=f"{what} is {value} at step {facts.step}; no weight was changed by this step",
        where="rows " + ", ".join(map(str, facts.rows)),
        why="a learning rate that is too high, float16 overflow, or a broken weight or row",
        fix="lower --learning-rate, or use --dtype float32; the last checkpoint is intact",
    )
