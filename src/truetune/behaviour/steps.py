"""The facts of a step and the probes that judge them.

input   StepFacts: plain numbers of a step, before the optimizer moves
does    each probe keeps what it needs of earlier steps, and looks for one thing
output  Finding, whose rows are indices of examples; one of level error stops the run before the
        step is taken
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

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


# Consecutive steps without any gradient; a single step may have rows without a target.
_DEAD_STEPS = 3


class NoGradient:
    """The gradient is exactly zero although there are targets: nothing learns."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, facts: StepFacts) -> Finding | None:
        if not facts.num_supervised:
            return None
        self.seen = self.seen + 1 if facts.grad_norm == 0 else 0
        if self.seen != _DEAD_STEPS:
            return None
        return Finding(
            "no-gradient",
            "error",
            f"the gradient was exactly zero in {_DEAD_STEPS} steps, up to step {facts.step}",
            why="the trained parameters do not affect the model's output: the adapter is frozen "
            "or disabled, or the autograd graph is broken",
            fix="check which parameters require a gradient, and that the adapter is active",
        )


# Minimum number of rows and of steps in a window: the median of fewer depends on which rows are in
# it.
_WINDOW_ROWS, _WINDOW_STEPS = 64, 5
# A loss has diverged where its median lies above the first one by a quarter and a little more, or
# above the best one by so many nats.
_ABOVE_FIRST, _NATS_ABOVE_FIRST, _NATS_ABOVE_BEST = 1.25, 0.3, 1.5
# Its mean has risen by so many standard errors besides: where easy and hard files are mixed, the
# losses of steps differ by nats, medians jump, and the best of many windows is a lucky one.
_ERRORS = 6.0


class Divergence:
    """The loss of a whole window of steps is far above where it began, or where it was.

    Args:
        rows_per_step: where the facts of steps do not name their rows.
    """

    def __init__(self, rows_per_step: int = 1) -> None:
        self.rows_per_step = rows_per_step
        self.losses: deque[float] = deque()
        # Median and mean of a window.
        self.first: tuple[float, float] | None = None
        self.best = (math.inf, math.inf)
        # The sum of the squared changes from step to step, which a trend hardly moves, and their
        # number.
        self.changes, self.num_changes = 0.0, 0
        self.reported = False

    def __call__(self, facts: StepFacts) -> Finding | None:
        if not facts.num_supervised:
            return None
        rows = len(facts.rows) or self.rows_per_step
        window = max(_WINDOW_STEPS, math.ceil(_WINDOW_ROWS / rows))
        if self.losses:
            self.changes += (facts.loss - self.losses[-1]) ** 2
            self.num_changes += 1
        self.losses.append(facts.loss)
        while len(self.losses) > window:
            self.losses.popleft()
        if len(self.losses) < window:
            return None
        now = median(self.losses), fmean(self.losses)
        if self.first is None:
            self.first = now
        before, self.best = self.best, min(self.best, now)
        # The variance of a change is twice that of a step's loss.
        by_chance = _ERRORS * math.sqrt(self.changes / 2 / self.num_changes / window)
        over_first = (
            now[0] > _ABOVE_FIRST * self.first[0] + _NATS_ABOVE_FIRST
            and now[1] > self.first[1] + by_chance
        )
        over_best = now[0] > before[0] + _NATS_ABOVE_BEST and now[1] > before[1] + by_chance
        if self.reported or not (over_first or over_best):
            return None
        self.reported = True
        reference = (
            f"{self.first[0]:.2f} at the start" if over_first else f"{before[0]:.2f} at its best"
        )
        return Finding(
            "loss-diverged",
            "error",
            f"the training loss is {now[0]:.2f} nats per token at step {facts.step} (median of "
            f"{window} steps), after {reference}",
            why=f"the learning rate is too high ({facts.learning_rate:.1e} at this step), or "
            "these rows are unlike the others",
            fix="use a third of the --learning-rate, or a larger --warmup-ratio",
        )


# Steps that say what a usual loss is; and how far above it one step has to be, in spreads and nats.
_USUAL, _FEWEST, _SPREADS, _NATS = 64, 16, 8.0, 0.5
# Normal spread from the median absolute deviation.
_MAD = 1.4826


class Spikes:
    """Single steps whose loss is far above the usual, and the rows that several have in common."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=_USUAL)
        self.rows: Counter[int] = Counter()
        self.reported: set[int] = set()

    def __call__(self, facts: StepFacts) -> Finding | None:
        if not facts.num_supervised:
            return None
        usual = list(self.losses)
        self.losses.append(facts.loss)
        if len(usual) < _FEWEST:
            return None
        middle = median(usual)
        spread = _MAD * median(abs(loss - middle) for loss in usual)
        if facts.loss <= middle + max(_SPREADS * spread, _NATS):
            return None
        self.rows.update(facts.rows)
        again = sorted({r for r in facts.rows if self.rows[r] > 1} - self.reported)
        self.reported.update(again)
        named = again or sorted(facts.rows)
        seen = "which also occurred in an earlier spike" if again else f"{len(named)} in this step"
        return Finding(
            "loss-spike",
            "note",
            f"the loss jumped to {facts.loss:.2f} at step {facts.step}, from {middle:.2f} nats "
            f"per token in the {len(usual)} steps before",
            count=max(len(named), 1),
            rows=tuple(map(str, named)),
            why=f"one of its examples is unlike the others ({seen})"
            if named
            else "one of its examples is unlike the others",
            fix="inspect the rows of that step",
        )


def usual_probes(rows_per_step: int = 1) -> tuple[Probe, ...]:
    """The probes of a step, new: each keeps what it has seen of one run.

    Args:
        rows_per_step: where the facts of steps do not name their rows.
    """
    return (non_finite, NoGradient(), Divergence(rows_per_step), Spikes())
