"""The result of an evaluation: measures with intervals, and the differences between models.

input   replies, judged, and losses: one entry a row, the same rows for every model
does    turns them into measures, each a ratio of two sums over rows or a quantile of lengths, and
        holds each model to the first by the differences on the same resampled rows
output  ModelResult of each
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from truetune.evaluation.interval import (
    FEWEST_DIFFERENT,
    Bootstrap,
    Interval,
    interval,
    score,
    score_difference,
)
from truetune.evaluation.questions import LeftOut
from truetune.findings import Finding

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Judgement:
    """One reply and its judgement.

    Attributes:
        text: as written, thinking and all, without the stop token.
        tokens: the stop token included.
        ended: on a stop token, by itself.
        right: it ended, and its answer says what is expected.
        would_be_right: the same of one that did not end.
        said: the answer that was read out of it.
        thought, closed: whether it thinks, and whether it ends that.
        empty: nothing but whitespace.
        copied: it begins with the question, and the row's answer does not.
        slow: comparing it took too long.
    """

    text: str
    tokens: int
    ended: bool
    right: bool
    would_be_right: bool
    said: str | None
    thought: bool
    closed: bool
    empty: bool
    copied: bool
    slow: bool


@dataclass(frozen=True)
class RowResult:
    """One row and one model.

    Attributes:
        where: the row's place.
        prompt: as served.
        expected: the row's answer.
        replies: as many as samples.
        loss: summed over the answer's tokens, in nats; None if it has none.
        loss_tokens: of the answer, its end included; 0 if it has none.
    """

    where: str
    prompt: str
    expected: str
    replies: tuple[Judgement, ...]
    loss: float | None
    loss_tokens: int

    def as_dict(self, model: str) -> dict[str, Any]:
        return {"where": self.where, "model": model, **without(asdict(self), "where")}

    @property
    def share_right(self) -> float:
        return sum(reply.right for reply in self.replies) / len(self.replies)

    @property
    def majority_right(self) -> bool:
        """Whether the answer that most replies give is right; of equals the first. Replies that
        did not end, or have no answer, do not vote."""
        votes = [reply for reply in self.replies if reply.ended and reply.said is not None]
        if not votes:
            return False
        winner = Counter(reply.said for reply in votes).most_common(1)[0][0]
        return next(reply.right for reply in votes if reply.said == winner)


@dataclass(frozen=True)
class Measure:
    """A measure: its name, its label on the screen, and which way is better.

    Attributes:
        better: 1 where more is better, -1 where less is, 0 where neither is.
        percent: a share, shown in percent.
    """

    name: str
    label: str
    better: int
    percent: bool = True


@dataclass(frozen=True)
class Value:
    """A measure of one model.

    Attributes:
        value: over all rows.
        interval: 95 %, over rows.
        of: rows that have it.
    """

    value: float
    interval: Interval | None
    of: int


@dataclass(frozen=True)
class Difference:
    """A measure of one model, less that of the first.

    Attributes:
        word: better, worse or inconclusive; longer or shorter of lengths; not comparable
            where the two count other tokens.
    """

    word: str
    value: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class ModelResult:
    """One model on all rows.

    Attributes:
        name: as the user wrote it.
        values: by the measure's name; a measure that the model does not have is left out.
        against_first: by the measure's name; {} for the first model.
        rows: in the order of the data.
        no_loss: answers of rows without a loss, and why.
        notes: further notes about these replies.
        findings: what opening the model had to tell.
    """

    name: str
    values: dict[str, Value]
    against_first: dict[str, Difference]
    rows: tuple[RowResult, ...]
    no_loss: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def without(value: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != name}


ENDED = Measure("ended", "ended, %", 1)
CLOSED = Measure("closed_thinking", "closes thinking, %", 1)
LOSS = Measure("loss", "loss, nats/token", -1, percent=False)
EMPTY = Measure("empty", "empty, %", -1)
COPIED = Measure("copied", "copied, %", -1)
MEDIAN = Measure("length_median", "tokens, median", 0, percent=False)
P90 = Measure("length_p90", "tokens, p90", 0, percent=False)
_LENGTHS = {MEDIAN.name: 0.5, P90.name: 0.9}


def measures_of(kind: str, samples: int) -> tuple[Measure, ...]:
    """What is measured of replies under a kind of match."""
    matched: tuple[Measure, ...] = ()
    if kind != "none" and samples == 1:
        matched = (Measure("match", "match, %", 1),)
    elif kind != "none":
        matched = (
            Measure("pass@1", "pass@1, %", 1),
            Measure(f"maj@{samples}", f"maj@{samples}, %", 1),
        )
    return (ENDED, *matched, CLOSED, LOSS, EMPTY, COPIED, MEDIAN, P90)


def values_of(
    models: Sequence[Sequence[RowResult]], measures: Sequence[Measure], seed: int
) -> list[tuple[dict[str, Value], dict[str, Difference]]]:
    """Values and differences to the first model, from the rows of each."""
    boot = Bootstrap(len(models[0]), seed)
    sheets = [_Sheet(rows, measures, boot) for rows in models]
    return [
        (sheet.values(), {} if sheet is sheets[0] else sheet.against(sheets[0])) for sheet in sheets
    ]


class _Sheet:
    """The columns of one model, and what they were on each resampled set of rows."""

    def __init__(
        self, rows: Sequence[RowResult], measures: Sequence[Measure], boot: Bootstrap
    ) -> None:
        import torch

        self.measures = measures
        self.columns = {
            m.name: torch.tensor([_column(m, row) for row in rows], dtype=torch.float64)
            for m in measures
            if m.name not in _LENGTHS
        }
        sums = boot.sums(torch.cat(list(self.columns.values()), dim=1))
        self.drawn = {
            name: sums[:, 2 * at] / sums[:, 2 * at + 1] for at, name in enumerate(self.columns)
        }
        self.lengths = torch.tensor([[r.tokens for r in row.replies] for row in rows])
        quantiles = boot.quantiles(self.lengths, tuple(_LENGTHS.values()))
        self.drawn |= {name: quantiles[:, at] for at, name in enumerate(_LENGTHS)}

    def values(self) -> dict[str, Value]:
        found = {}
        for measure in self.measures:
            value, of = self._whole(measure.name)
            if value is not None:
                around = interval(self.drawn[measure.name])
                if self._is_yes_or_no(measure):
                    around = score(int(self.columns[measure.name][:, 0].sum()), of)
                found[measure.name] = Value(value, around, of)
        return found

    def _is_yes_or_no(self, measure: Measure) -> bool:
        """Whether each row says yes, no, or nothing."""
        if not measure.percent:
            return False
        above, below = self.columns[measure.name].unbind(1)
        ones = ((below == 0) | (below == 1)) & ((above == 0) | (above == 1))
        return bool(ones.all()) and bool(below.any())

    def _apart(self, first: _Sheet, measure: Measure) -> Interval | None:
        """The interval of the difference to the first model."""
        name = measure.name
        same = name not in _LENGTHS and bool(
            (self.columns[name][:, 1] == first.columns[name][:, 1]).all()
        )
        if not (same and self._is_yes_or_no(measure) and first._is_yes_or_no(measure)):
            return interval(self.drawn[name] - first.drawn[name])
        asked = self.columns[name][:, 1] > 0
        mine, theirs = self.columns[name][asked, 0] > 0, first.columns[name][asked, 0] > 0
        counts = (mine & theirs, mine & ~theirs, ~mine & theirs, ~mine & ~theirs)
        return score_difference(*(int(each.sum()) for each in counts))

    def _whole(self, name: str) -> tuple[float | None, int]:
        """A measure over all rows, and the rows that have it."""
        if name in _LENGTHS:
            ordered = sorted(self.lengths.flatten().tolist())
            at = next(i for i in range(len(ordered)) if i + 1 >= _LENGTHS[name] * len(ordered))
            return float(ordered[at]), len(self.lengths)
        above, below = self.columns[name].unbind(1)
        of = int((below > 0).sum())
        return (float(above.sum() / below.sum()), of) if of else (None, 0)

    def against(self, first: _Sheet) -> dict[str, Difference]:
        found = {}
        for measure in self.measures:
            name = measure.name
            mine, theirs = self._whole(name)[0], first._whole(name)[0]
            if mine is None or theirs is None:
                continue
            if name == LOSS.name and not self._same_tokens(first):
                # Nats a token of one cut into tokens say nothing of those of another.
                found[name] = Difference("not comparable")
                continue
            apart = self._apart(first, measure)
            found[name] = difference(
                measure, mine - theirs, apart, self._num_different(first, name)
            )
        return found

    def _same_tokens(self, first: _Sheet) -> bool:
        import torch

        return torch.equal(self.columns[LOSS.name][:, 1], first.columns[LOSS.name][:, 1])

    def _num_different(self, first: _Sheet, name: str) -> int:
        if name in _LENGTHS:
            return int((self.lengths != first.lengths).any(1).sum())
        one, two = self.columns[name], first.columns[name]
        different: torch.Tensor = one[:, 0] * two[:, 1] != two[:, 0] * one[:, 1]
        return int(different.sum())


def difference(
    measure: Measure, value: float, found: Interval | None, num_different: int
) -> Difference:
    """The difference in one word."""
    if found is None or not found.excludes_zero() or num_different < FEWEST_DIFFERENT:
        return Difference("inconclusive", value, found)
    if measure.better == 0:
        return Difference("longer" if found.low > 0 else "shorter", value, found)
    return Difference("better" if measure.better * found.low > 0 else "worse", value, found)


def _column(measure: Measure, row: RowResult) -> tuple[float, float]:
    """What a row adds to the two sums whose ratio the measure is."""
    replies, number = row.replies, len(row.replies)
    name = measure.name
    if name == LOSS.name:
        return (0.0, 0.0) if row.loss is None else (row.loss, float(row.loss_tokens))
    if name == CLOSED.name:
        return float(sum(r.closed for r in replies)), float(sum(r.thought for r in replies))
    if name.startswith("maj@"):
        return float(row.majority_right), 1.0
    counted = {
        ENDED.name: sum(r.ended for r in replies),
        EMPTY.name: sum(r.empty for r in replies),
        COPIED.name: sum(r.copied for r in replies),
    }.get(name, sum(r.right for r in replies))
    return float(counted), float(number)
