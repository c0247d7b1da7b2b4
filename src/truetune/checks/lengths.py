"""Count what a length limit damages: rows that lose the end of an answer, the stop token, or the
marker that closes their reasoning.

input   token rows; where reasoning closes, found by its marker
does    per candidate limit: what a trainer that cuts there (keeping the head) would take away
output  RowLengths, Damage per limit, the limit that keeps a share of the rows, a histogram
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from truetune.checks.labels.table import Indices, TokenTable
from truetune.contract.contract import PromptContract
from truetune.contract.encode import Encoded
from truetune.contract.frame import Frame
from truetune.findings import percent

_LIMITS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


@dataclass(frozen=True)
class RowLengths:
    """Positions in tokens, one entry per row; rows without labels are omitted.

    Attributes:
        total: tokens of the row.
        answer: position of the first label.
        stop: position of the last label, the token that ends the last answer.
        thought: position of the marker that closes the last reasoning, -1 if there is none.
        where: names of the rows.
    """

    total: Indices
    answer: Indices
    stop: Indices
    thought: Indices
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.total)


@dataclass(frozen=True)
class Damage:
    """The damage from cutting rows after `limit` tokens.

    Attributes:
        limit: tokens.
        rows: number of rows.
        cut: rows longer than the limit.
        stops: rows that lose the token that ends their answer.
        answers: rows that lose a part of an answer beside that token.
        gone: rows of which no answer token is left.
        thoughts: rows that lose the marker that closes their reasoning.
        with_thoughts: rows that have reasoning.
        tokens_kept: share of all tokens that stays.
    """

    limit: int
    rows: int
    cut: int
    stops: int
    answers: int
    gone: int
    thoughts: int
    with_thoughts: int
    tokens_kept: float

    def share(self, count: int) -> float:
        return count / max(self.rows, 1)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def line(self) -> str:
        """The damage in one line."""
        if not self.cut:
            return f"at {self.limit:,} tokens, every row is kept whole"
        lost = [f"{percent(self.share(self.cut))} of the rows ({self.cut:,} of {self.rows:,})"]
        lost.append(f"are cut at {self.limit:,} tokens")
        parts = []
        if self.stops:
            parts.append(f"{percent(self.share(self.stops))} lose the token that ends the answer")
        if self.thoughts:
            parts.append(
                f"{percent(self.thoughts / max(self.with_thoughts, 1))} of those with reasoning "
                "never close it"
            )
        if self.gone:
            parts.append(f"{percent(self.share(self.gone))} lose the whole answer")
        return " ".join(lost) + (
            ": " + ", ".join(parts) if parts else ", none of them in an answer"
        )


def row_lengths(table: TokenTable, closing: Sequence[int] = ()) -> RowLengths:
    """Where the answers of each row begin and end.

    Args:
        table: token rows.
        closing: ids of the marker that closes reasoning; () if rows have none.
    """
    kept = np.flatnonzero(table.num_supervised > 0)
    runs = table.runs
    rows = table.rows_of(runs[:, 0])
    starts = table.starts[:-1]
    answer = np.zeros(len(table), np.int64)
    answer[rows[::-1]] = runs[::-1, 0] - starts[rows[::-1]]
    stop = np.zeros(len(table), np.int64)
    stop[rows] = runs[:, 1] - starts[rows]
    thought = np.full(len(table), -1, np.int64)
    hits = table.find(list(closing))
    hits = hits[table.supervised[hits]] if len(hits) else hits
    at = table.rows_of(hits)
    thought[at] = hits + max(len(closing), 1) - 1 - starts[at]
    return RowLengths(
        table.lengths[kept],
        answer[kept],
        stop[kept],
        thought[kept],
        [table.where[i] for i in kept.tolist()],
    )


def encoded_lengths(encoded: Sequence[Encoded], contract: PromptContract) -> RowLengths:
    """The lengths of conversations that a contract encoded; plain text has no answer to lose."""
    chats = [row for row in encoded if row.turns != ((),)]
    table = TokenTable.of_examples(
        [example for row in chats for example in row], [row.row for row in chats for _ in row]
    )
    closing = Frame.of_contract(contract).think[1]
    ids = contract.tokens.encode([closing])[0]
    if len(ids) > 1:
        # The last character may merge with what follows.
        ids = contract.tokens.encode([closing[:-1]])[0]
    return row_lengths(table, ids)


def damage(rows: RowLengths, limit: int) -> Damage:
    """What is lost if rows are cut after `limit` tokens."""
    total = int(rows.total.sum())
    return Damage(
        limit=limit,
        rows=len(rows),
        cut=int((rows.total > limit).sum()),
        stops=int((rows.stop >= limit).sum()),
        answers=int((rows.stop > limit).sum()),
        gone=int((rows.answer >= limit).sum()),
        thoughts=int((rows.thought >= limit).sum()),
        with_thoughts=int((rows.thought >= 0).sum()),
        tokens_kept=float(np.minimum(rows.total, limit).sum() / total) if total else 1.0,
    )


def damage_table(rows: RowLengths, *limits: int | None) -> list[Damage]:
    """The damage at the usual limits up to the longest row, and at those given."""
    longest = int(rows.total.max(initial=0))
    usual = {limit for limit in _LIMITS if limit < longest}
    above = next((limit for limit in _LIMITS if limit >= longest), longest)
    asked = {limit for limit in limits if limit}
    return [damage(rows, limit) for limit in sorted(usual | {above} | asked)]


def limit_keeping(rows: RowLengths, share: float = 0.99) -> int:
    """The smallest limit in tokens that keeps this share of the rows whole. It is rounded up to a
    multiple of 64 unless that exceeds the longest row.
    """
    if not len(rows):
        return 0
    ordered = np.sort(rows.total)
    needed = int(ordered[max(math.ceil(share * len(rows)) - 1, 0)])
    return min(-(-needed // 64) * 64, int(ordered[-1]))


def quantiles(rows: RowLengths) -> dict[str, int]:
    """Median, 95 %, 99 % and longest, in tokens."""
    if not len(rows):
        return {}
    ordered = np.sort(rows.total)
    picked = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
    return {
        name: int(ordered[max(math.ceil(part * len(ordered)) - 1, 0)])
        for name, part in picked.items()
    }


def histogram(rows: RowLengths, bins: int = 24) -> list[tuple[int, int, int]]:
    """(first length, last length, rows) of equal ranges from 1 to the longest row."""
    if not len(rows):
        return []
    longest = int(rows.total.max())
    size = max(-(-longest // bins), 1)
    counts = np.bincount((rows.total - 1) // size, minlength=1)
    return [(i * size + 1, (i + 1) * size, int(n)) for i, n in enumerate(counts.tolist())]


def length_report(rows: RowLengths, *limits: int | None) -> dict[str, Any]:
    """Quantiles, the limit that keeps 99 %, the damage at each candidate limit and at those given,
    and the histogram, as JSON has it.

    Args:
        limits: of the run, and of the model's context; the first one is reported separately.
    """
    return {
        **quantiles(rows),
        "examples": len(rows),
        "keeps_99_percent": limit_keeping(rows),
        "limit": damage(rows, limits[0]).as_dict() if limits and limits[0] else None,
        "limits": [d.as_dict() for d in damage_table(rows, *limits)],
        "histogram": [dict(zip(("from", "to", "rows"), b, strict=True)) for b in histogram(rows)],
    }


def report_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A length report as pairs of names and texts, without its histogram."""
    # Limits that cost something, the largest three: below them everything is lost anyhow.
    costly = [d for d in report["limits"] if d["cut"]][-3:]
    return [
        (
            "lengths",
            f"median {report['p50']:,}, 95 % {report['p95']:,}, 99 % {report['p99']:,}, "
            f"longest {report['longest']:,} tokens; {report['keeps_99_percent']:,} keep 99 % of "
            "the rows whole",
        ),
        *(("" if i else "limits", _limit_line(d)) for i, d in enumerate(costly)),
    ]


def _limit_line(damage: Mapping[str, Any]) -> str:
    rows = max(damage["rows"], 1)
    text = f"{damage['limit']:,} tokens: {percent(damage['cut'] / rows)} are cut"
    if damage["stops"]:
        text += f"; {percent(damage['stops'] / rows)} lose the end of the answer"
    if damage["thoughts"]:
        share = damage["thoughts"] / max(damage["with_thoughts"], 1)
        text += f"; {percent(share)} of those with reasoning never close it"
    return text
