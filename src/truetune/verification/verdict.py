"""The result of verification: a list of checks with their numbers, saved as verify.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from truetune.compare import Agreement, Reading, distance
from truetune.findings import Finding
from truetune.verification.record import Record

State = Literal["passed", "failed", "not-checked"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: files, record, opens, contract, rows, logits, rounding, merge.
        state: passed, failed, or not-checked with the reason in `what`.
        what: one sentence.
        numbers: what was measured.
        fix: the next command, where it failed.
    """

    name: str
    state: State
    what: str
    numbers: dict[str, Any] = field(default_factory=dict)
    fix: str = ""


@dataclass(frozen=True)
class Verdict:
    """All checks of an artifact."""

    artifact: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed. A check that could not be made does not count as failed."""
        return all(check.state != "failed" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of verify.json."""
        return {
            "passed": self.passed,
            "artifact": self.artifact,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }

    def findings(self) -> list[Finding]:
        """An error for each check that failed."""
        return [
            Finding(
                code="verify-failed",
                level="error",
                what=f"{check.name}: {check.what}",
                where=check.numbers.get("where") or self.artifact,
                why=check.numbers.get("why", ""),
                fix=check.fix,
            )
            for check in self.checks
            if check.state == "failed"
        ]


@dataclass(frozen=True)
class Tolerance:
    """How far apart two models may be that differ by a cast only.

    Attributes:
        relative: mean difference of logits, in units of their spread (standard deviation).
        greedy: share of positions where both take the same token, counted over many.
        loss: nats per token.
    """

    relative: float
    greedy: float
    loss: float

    def least_greedy(self, positions: int) -> float:
        """The share that must be met at so many positions: three standard deviations of a count
        below `greedy`, so that few positions raise no alarm by chance."""
        chance = math.sqrt(self.greedy * (1 - self.greedy) / max(positions, 1))
        return max(self.greedy - 3 * chance, 0.0)


# By the type the weights were saved in. What merging and reloading cost where nothing is wrong,
# what two computations of one model in bfloat16 differ by (2 to 3 % of the tokens), and what a
# merge into 4-bit weights costs (relative 0.6, 77 % of the tokens), is measured in docs/log.md.
TOLERANCES = {
    "float32": Tolerance(relative=1e-4, greedy=0.9999, loss=1e-4),
    "float16": Tolerance(relative=2e-2, greedy=0.98, loss=2e-2),
    "bfloat16": Tolerance(relative=0.1, greedy=0.95, loss=0.1),
}


# Times what rounding by chance costs, that a merged model may be apart: it is rounded as often, and
# computes in other steps (docs/log.md).
_MERGED = 3.0


def tolerance_of(floor: Agreement) -> Tolerance:
    """What a cast may cost, from what one of the same size did cost this very model."""
    others = max(1 - floor.greedy, 1 / max(floor.num_positions, 1))
    return Tolerance(
        relative=_MERGED * (floor.relative or 0.0),
        greedy=max(1 - _MERGED * others, 0.0),
        loss=_MERGED * (floor.mean_difference or 0.0),
    )


def judge(
    name: str, found: Agreement, dtype: str, what: str, floor: Agreement | None = None
) -> Check:
    """A check from two models' agreement.

    Args:
        dtype: that the weights were saved in.
        what: the comparison in words: "merged against the adapter".
        floor: what rounding to that type costs this model, where it was measured.
    """
    allowed = TOLERANCES.get(dtype, TOLERANCES["bfloat16"])
    if floor is not None:
        allowed = tolerance_of(floor)
    over = []
    if found.relative is not None and found.relative > allowed.relative:
        over.append(
            f"logits differ by {found.relative:.2g} of their spread on average, but "
            f"{allowed.relative:.2g} is allowed"
        )
    least = allowed.least_greedy(found.num_positions)
    if found.greedy < least:
        over.append(
            f"the same token is predicted at {100 * found.greedy:.1f} % of the positions, but "
            f"{100 * least:.1f} % is required"
        )
    if abs(found.loss - found.reference_loss) > allowed.loss:
        over.append(f"the loss went from {found.reference_loss:.4f} to {found.loss:.4f}")
    return Check(
        name,
        "failed" if over else "passed",
        f"{what}: {'; '.join(over)}" if over else what,
        {
            **dataclasses.asdict(found),
            "relative": found.relative,
            "dtype": dtype,
            "tolerance": {**dataclasses.asdict(allowed), "least_greedy": least},
        },
        fix="do not serve it; train or merge again, and report it if the error remains"
        if over
        else "",
    )


def judge_rounding(found: Agreement, dtype: str) -> Check:
    """The check of what saving the weights in a coarser type changed.

    Rounding by chance hardly changes a model. A few steps of a small learning rate, though, move
    all weights a little in one direction, by less than the type can hold.

    Args:
        found: the saved weights against the trained ones, at clear leads.
    """
    what = f"weights saved in {dtype}, compared with the trained weights in memory"
    check = judge("rounding", found, dtype, what)
    if check.state == "passed":
        return check
    why = (
        f"training changed many weights by less than {dtype} can represent, so saving them in the "
        "model's dtype undid part of it"
    )
    return replace(
        check,
        numbers={**check.numbers, "why": why},
        fix="train more steps or with a higher learning rate, or train an adapter (--lora), which "
        "is saved in float32",
    )


# Half a unit in the last place, relative: what a computation in this type rounds by at least, in
# units of the logits' spread. Two computations may differ by it where the floor happened to be 0.
_ROUNDS = {"float32": 1e-4, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# On the machine that took the record, the same shapes in the same types give the same logits: one
# floor is room enough. Another one rounds in other places: ten times the divergence, three times
# the difference.
_SAME_MACHINE, _OTHER_MACHINE = 1.0, 10.0
# The largest divergence of many positions where the mean is the least that is allowed.
_TAIL = 20.0


def judge_reading(record: Record, found: Mapping[str, Any]) -> Check:
    """The check of a saved model's predictions against the trained model's in memory.

    Args:
        record: what training left.
        found: the fresh process's answer: reading, machine, and its own floor on another machine.
    """
    reading = Reading.from_dict(found["reading"])
    same = found["machine"] == record.machine
    factor = _SAME_MACHINE if same else _OTHER_MACHINE
    floors = [record.floor, *([found["floor"]] if found["floor"] else [])]
    least = (_ROUNDS.get(record.way["dtype"], 2.0**-8) * record.reading.spread) ** 2 / 2
    mean = factor * max(least, *(floor["mean"] for floor in floors))
    largest = max(_TAIL * mean, factor * max(floor["largest"] for floor in floors))
    apart = distance(record.reading, reading, allowed=largest)
    over = []
    if not apart.mean <= mean:
        over.append(f"{apart.mean:.2g} nats apart on average, but {mean:.2g} is allowed")
    if not apart.largest <= largest:
        over.append(f"{apart.largest:.2g} nats apart at one position, but {largest:.2g} is allowed")
    if apart.flips:
        at = f"{apart.flips} position{'' if apart.flips == 1 else 's'}"
        over.append(f"a different token is the likeliest at {at} with a clear lead")
    what = f"reloaded model compared with the trained one in memory at {apart.positions} positions"
    numbers = {
        **dataclasses.asdict(apart),
        "dtype": record.way["dtype"],
        "same_machine": same,
        "floor": floors,
        "tolerance": {"mean": mean, "largest": largest},
    }
    return Check(
        "logits",
        "failed" if over else "passed",
        f"{what}: {'; '.join(over)}" if over else what,
        numbers,
        fix="do not serve it; train or merge again, and report it if the error remains"
        if over
        else "",
    )


def shown(check: Check) -> str:
    """The check in one line, with its most telling numbers."""
    numbers = check.numbers
    parts = []
    if numbers.get("bit_equal"):
        return f"{check.what}; bit-identical"
    if "tolerance" in numbers and "mean" in numbers and check.state == "passed":
        return (
            f"{check.what}; {numbers['mean']:.2g} nats apart on average, and "
            f"{numbers['tolerance']['mean']:.2g} is allowed ({numbers['dtype']})"
        )
    if numbers.get("max_difference") is not None:
        parts.append(
            f"logits differ by at most {numbers['max_difference']:.2g}, "
            f"{numbers['mean_difference']:.2g} on average"
        )
    elif "max_logprob_difference" in numbers:
        parts.append(
            f"log-probabilities differ by at most {numbers['max_logprob_difference']:.2g} nats"
        )
    if "greedy" in numbers:
        parts.append(
            f"the same token at {100 * numbers['greedy']:.1f} % of "
            f"{numbers['num_positions']:,} positions"
        )
    if check.state != "passed":
        parts = []
    return "; ".join([check.what, *parts])
