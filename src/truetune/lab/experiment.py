"""An experiment as values: its claim, what would refute it, and the judgement of its numbers.

An experiment is declared before it is run: arms, measures, and the expectations that decide its
verdict. Judging is a pure function of declaration and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from truetune.evaluation.interval import Bootstrap, interval, score, score_difference
from truetune.system.lazy import torch

if TYPE_CHECKING:
    from truetune.lab.bench import Arm, Tuned

Verdict = Literal["reproduced", "different", "not reproduced", "not decided"]
Held = Literal["yes", "no", "not decided"]


@dataclass(frozen=True)
class Column:
    """The measurements of one arm and one seed: one number per item (a question, a document, a
    step).

    Attributes:
        values: of a share 1 or 0.
        weights: what the sum of the values is divided by; tokens of a loss, 1 of all else.
        unit: share, nats per token, tokens, sentences.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]
    unit: str

    @classmethod
    def share(cls, yes: Iterable[bool]) -> Column:
        values = tuple(float(one) for one in yes)
        return cls(values, (1.0,) * len(values), "share")

    @classmethod
    def mean(cls, values: Iterable[float], unit: str) -> Column:
        values = tuple(map(float, values))
        return cls(values, (1.0,) * len(values), unit)

    @property
    def value(self) -> float:
        return sum(self.values) / sum(self.weights)

    def text(self) -> str:
        """The items as a result keeps them: 1 and 0 of a share; else values, each with its weight
        where that is not 1, to six digits."""
        if self.unit == "share":
            return "".join(str(int(value)) for value in self.values)
        pairs = zip(self.values, self.weights, strict=True)
        return " ".join(f"{v:.6g}" if w == 1 else f"{v:.6g}/{w:g}" for v, w in pairs)

    @classmethod
    def read(cls, text: str, unit: str) -> Column:
        """What `text` wrote.

        Raises:
            ValueError: it is something else.
        """
        if unit == "share":
            if set(text) - {"0", "1"}:
                raise ValueError(f"items of a share are 0 and 1, not {text[:20]!r}")
            return cls.share(sign == "1" for sign in text)
        pairs = [item.partition("/") for item in text.split()]
        values = tuple(float(value) for value, _, _ in pairs)
        return cls(values, tuple(float(weight or 1) for _, _, weight in pairs), unit)


# Columns of an arm, by the measure; one a seed.
Columns = Mapping[str, Sequence[Column]]


@dataclass(frozen=True)
class Estimate:
    """A measure, or a difference of two, over all seeds.

    Attributes:
        low, high: 95 % over items, each with all of its seeds.
        seeds: the value of each seed alone.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]
    unit: str


def estimate(columns: Sequence[Column]) -> Estimate:
    """A measure of one arm; see `Estimate`."""
    value = sum(c.value for c in columns) / len(columns)
    seeds = tuple(c.value for c in columns)
    unit = columns[0].unit
    if unit == "share":
        # Seeds ask the same items: they are no further items, and the interval is as wide as
        # that of one seed.
        number = len(columns[0].values)
        yes = sum(sum(c.values) for c in columns) / len(columns)
        around = score(yes, number)
        return Estimate(value, min(around.low, value), max(around.high, value), seeds, unit)
    drawn = _drawn(columns)
    found = interval(drawn)
    assert found is not None
    return Estimate(value, found.low, found.high, seeds, unit)


def difference(one: Sequence[Column], other: Sequence[Column]) -> Estimate:
    """The difference of two arms, paired by seed and item.

    Raises:
        ValueError: the two did not count the same items and seeds.
    """
    pairs = list(zip(one, other, strict=True))
    if any(len(a.values) != len(b.values) for a, b in pairs):
        raise ValueError("arms that are compared need the same items")
    seeds = tuple(a.value - b.value for a, b in pairs)
    value = sum(seeds) / len(seeds)
    unit = one[0].unit
    if unit == "share":
        # The questions of one seed, on average: both right, only the one, only the other, none.
        both, first, second, neither = 0, 0, 0, 0
        for a, b in pairs:
            for x, y in zip(a.values, b.values, strict=True):
                both, first = both + (x > 0 and y > 0), first + (x > y)
                second, neither = second + (y > x), neither + (x <= 0 and y <= 0)
        around = score_difference(*(n / len(pairs) for n in (both, first, second, neither)))
        return Estimate(value, min(around.low, value), max(around.high, value), seeds, unit)
    found = interval(_drawn(one) - _drawn(other))
    assert found is not None
    return Estimate(value, found.low, found.high, seeds, unit)


def _drawn(columns: Sequence[Column]):  # type: ignore[no-untyped-def]
    """The ratio on each resampled set of items, the same sets for every arm."""
    values = torch.tensor([c.values for c in columns], dtype=torch.float64).mean(0)
    weights = torch.tensor([c.weights for c in columns], dtype=torch.float64).mean(0)
    sums = Bootstrap(len(values)).sums(torch.stack([values, weights], dim=1))
    return sums[:, 0] / sums[:, 1]


@dataclass(frozen=True)
class Expectation:
    """A part of a claim that numbers can confirm or refute.

    Attributes:
        label: the expectation in words.
        measure, arm: what is looked at.
        than: the arm that is subtracted; None uses the measure itself.
        above, below: where value or difference must lie, both where both are given.
    """

    label: str
    measure: str
    arm: str
    than: str | None = None
    above: float | None = None
    below: float | None = None

    def judged(self, sheets: Mapping[str, Columns]) -> tuple[Estimate, Held]:
        """Held: the whole interval, and each seed, lies where it must. Refuted: the whole interval
        lies elsewhere. Otherwise it is not decided."""
        mine = sheets[self.arm][self.measure]
        if self.than is None:
            found = estimate(mine)
        else:
            found = difference(mine, sheets[self.than][self.measure])
        return found, self.held(found.low, found.high, found.seeds)

    def held(self, low: float, high: float, seeds: Iterable[float]) -> Held:
        """The judgement of an interval and the value of each seed."""
        above = -float("inf") if self.above is None else self.above
        below = float("inf") if self.below is None else self.below
        if above <= low and high <= below and all(above <= seed <= below for seed in seeds):
            return "yes"
        return "no" if high < above or low > below else "not decided"

    @property
    def directed(self) -> bool:
        """Whether it says in which direction: a bound on both sides says that nothing changes."""
        return self.above is None or self.below is None

    @property
    def bound(self) -> str:
        """Where it must lie, in words of numbers."""
        parts = []
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.below is not None:
            parts.append(f"below {self.below:g}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Experiment:
    """A claim about fine-tuning and how it is tested.

    Attributes:
        number: its place among the claims.
        name: what the command line calls it.
        title: a short heading.
        claim: the sentence that is tested.
        source: who says so.
        exercises: of a course on fine-tuning, as one would look for them.
        setup: what is trained and asked, where it differs from the usual arm, and what the measures
            count.
        expected: in which direction, and how far.
        refuted: what would refute it.
        seeds: of a full run; a quick one takes the first.
        arms: of a seed, in the order of table and picture; a quick run has those alone that an
            expectation names.
        measure: what is measured of each arm.
        expectations: decide the verdict.
        shown: measures of table and picture, in their order.
        remark: what the numbers do not say by themselves and, if a claim did not reproduce,
            possible reasons.
    """

    number: int
    name: str
    title: str
    claim: str
    source: str
    exercises: tuple[str, ...]
    setup: str
    expected: str
    refuted: str
    seeds: tuple[int, ...]
    arms: Callable[[int], Sequence[Arm]]
    measure: Callable[[Tuned], dict[str, Column]]
    expectations: tuple[Expectation, ...]
    shown: tuple[str, ...]
    remark: str = ""

    def quick_arms(self, seed: int) -> list[Arm]:
        """Those that decide the verdict."""
        named = {name for e in self.expectations for name in (e.arm, e.than)}
        return [arm for arm in self.arms(seed) if arm.name in named]

    def declaration(self) -> dict[str, object]:
        """What is fixed before the first run."""
        return {
            "claim": self.claim,
            "expected": self.expected,
            "refuted": self.refuted,
            "seeds": list(self.seeds),
            "expectations": [
                {
                    "label": e.label,
                    "measure": e.measure,
                    "arm": e.arm,
                    "than": e.than,
                    "above": e.above,
                    "below": e.below,
                }
                for e in self.expectations
            ],
        }


def verdict(expectations: Sequence[Expectation], held: Sequence[Held]) -> Verdict:
    """Reproduced where every expectation holds, not reproduced where every one that says in which
    direction is refuted, different where some are and some are not."""
    if all(one == "yes" for one in held):
        return "reproduced"
    pairs = zip(expectations, held, strict=True)
    deciding = [one for e, one in pairs if e.directed] or held
    if all(one == "no" for one in deciding):
        return "not reproduced"
    return "different" if "no" in held else "not decided"
