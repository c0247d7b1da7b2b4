"""Load data: all steps from a source to conversations.

Input:  a file, a folder or a Hub id, and what the user says about it.
Does:   reads rows, renames columns, decides one schema for all rows, converts each row.
Output: `Loaded`: conversations, findings on the rows that cannot be used, and what was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.data.columns import parse_columns, rename
from truetune.data.conversation import Conversation
from truetune.data.convert import convert
from truetune.data.hints import REJECTED, WHICH, columns_hint, keeping, left_out
from truetune.data.hub import read_dataset
from truetune.data.read import read_file
from truetune.data.rows import FileInfo, Row, names
from truetune.data.schemas import (
    Picks,
    no_schema,
    recognise,
    recognise_row,
    schema_mismatch,
    schema_named,
)
from truetune.data.sources import Source, resolve
from truetune.errors import BadRows, DataError, UsageError
from truetune.findings import Finding, merged

Progress = Callable[[int, int | None], None]
_PROGRESS_EVERY = 1000


@dataclass(frozen=True, slots=True)
class Loaded:
    """The content of a data source.

    Attributes:
        conversations: in the order of the rows.
        findings: one error for each row (or instance of one) that was left out; notes on the rest.
        schema: of all conversations.
        places: of all rows read, bad ones included, in order; no two are equal.
        files: what was read, in order.
    """

    conversations: list[Conversation]
    findings: list[Finding]
    schema: str
    places: tuple[str, ...]
    files: tuple[FileInfo, ...]

    @property
    def num_rows(self) -> int:
        """Rows read, bad ones included."""
        return len(self.places)


def load(
    source: str | Path,
    *,
    schema: str = "auto",
    columns: str | Mapping[str, str] | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> Loaded:
    """Loads conversations.

    Args:
        source: a .jsonl, .json, .csv, .tsv, .parquet, .txt or .md file (.gz too), a folder of
            such, or a dataset for `datasets.load_dataset` (`owner/name` or `owner/name:config`).
        schema: auto, or messages, sharegpt, instances, reasoning, alpaca, prompt-completion, text.
            auto takes the one that most rows have by their columns, the first seen of equals.
        columns: `prompt=question,completion=answer`, or {target: source column}.
        split: of a folder or a dataset; train if there is one.
        revision: of a dataset on the Hub.
        limit: read only this many rows, from the first.
        on_progress: called with the number of converted rows and of all, every 1,000 rows and at
            the end.

    Returns:
        all that can be used, and a finding for each row that cannot.

    Raises:
        DataError: the source cannot be read, or no schema fits it.
        BadRows: every row is refused.
        UsageError: a schema, mapping or limit is invalid.
    """
    only = schema_named(schema)
    mapping = parse_columns(columns)
    if limit is not None and limit < 1:
        raise UsageError(
            f"the limit on the number of rows must be at least 1, not {limit}", code="bad-limit"
        )
    rows, findings, places, files = _read(source, split, revision, limit)
    rows = rename(rows, mapping, str(source))
    reading = _Reading(only, frozenset(mapping), mapping, Counter(), Counter(), {})
    found = [reading.recognise(row) for row in rows]
    _require_rows(rows, findings)
    decided = _decide(found, rows, only, str(source))
    conversations: list[Conversation] = []
    for done, (row, recognised) in enumerate(zip(rows, found, strict=True), 1):
        findings += _convert(row, recognised, decided, reading, conversations)
        if on_progress is not None and (done % _PROGRESS_EVERY == 0 or done == len(rows)):
            on_progress(done, len(rows))
    findings += _rejected(mapping, str(source)) + reading.notes(rows)
    return Loaded(conversations, findings, decided, tuple(places), files)


def _read(
    source: str | Path, split: str | None, revision: str | None, limit: int | None
) -> tuple[list[Row], list[Finding], list[str], tuple[FileInfo, ...]]:
    there: Source = resolve(source, split)
    if not there.files:
        found, info = read_dataset(str(source), split=split, revision=revision, limit=limit)
        return found.rows, found.findings, found.places, (info,)
    rows: list[Row] = []
    places: list[str] = []
    files: list[FileInfo] = []
    findings = list(there.findings)
    if revision is not None:
        findings.append(
            Finding(
                code="setting-without-effect",
                level="warning",
                what="--revision has no effect on local files",
                where=str(source),
            )
        )
    left = limit
    for path in there.files:
        found, info = read_file(path, left)
        rows += found.rows
        places += found.places
        findings += found.findings
        files.append(info)
        if left is not None:
            left -= info.num_rows
            if left <= 0:
                break
    return rows, findings, places, tuple(files)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What holds for all rows of one load, and what is counted on the way."""

    only: str | None
    mapped: frozenset[str]
    mapping: Mapping[str, str]
    unused: Counter[str]
    empty: Counter[str]
    # Places by column that plainly belongs to the prompt or the answer, and how to keep it.
    lost: dict[tuple[str, str], list[str]]

    def recognise(self, row: Row) -> tuple[str, Picks] | None:
        if self.only is None:
            return recognise_row(row.fields, self.mapped)
        return recognise(tuple(row.fields), self.mapped, self.only)

    def notes(self, rows: list[Row]) -> list[Finding]:
        notes = [
            Finding(
                code="column-left-out",
                level="warning",
                what=f"the column {names([name])} is not used: the model never sees it",
                where=places[0],
                count=len(places),
                why="by its name it belongs to the prompt or the answer",
                fix=fix,
            )
            for (name, fix), places in sorted(self.lost.items())
        ]
        for name, _ in self.lost:
            self.unused.pop(name, None)
        if self.unused:
            notes.append(
                Finding(
                    code="unused-columns",
                    level="note",
                    what=f"columns not used by the schema: {names(sorted(self.unused))}",
                    where=f"{rows[0].file}, column {min(self.unused)!r}",
                    count=len(self.unused),
                    fix="map a column to a name that the schema uses with --columns",
                )
            )
        if self.empty:
            where, _ = next(iter(self.empty.items()))
            notes.append(
                Finding(
                    code="empty-text",
                    level="note",
                    what="empty texts were left out",
                    where=where,
                    count=sum(self.empty.values()),
                )
            )
        return notes


# What a mapping of these would train.
_TRAINED = frozenset(
    {"messages", "conversations", "instances", "solution", "output", "completion", "text"}
)


def _rejected(mapping: Mapping[str, str], source: str) -> list[Finding]:
    return [
        Finding(
            code="rejected-answers",
            level="warning",
            what=f"--columns {target}={column} trains the model on rejected answers",
            where=source,
            why="in preference data this column holds the worse answer",
            fix="map the chosen answers instead, for example "
            + (
                "messages=chosen" if target in ("messages", "conversations") else f"{target}=chosen"
            ),
        )
        for target, column in mapping.items()
        if target in _TRAINED and REJECTED.fullmatch(column)
    ]


def _says_which(name: str, value: Any) -> bool:
    """Whether a cell says which row this is and where it is from: nobody expects it to be trained.
    A text of some length may be one that was forgotten, whatever its column is called."""
    if not WHICH.fullmatch(name):
        return False
    return not isinstance(value, list | dict) and len(str(value)) <= _LONGEST_NAME


# Addresses are long.
_LONGEST_NAME = 300


def _require_rows(rows: list[Row], findings: list[Finding]) -> None:
    """Where every row is refused for itself, the reasons say more than a schema that is missing."""
    refused = [finding for finding in findings if finding.level == "error"]
    if not rows and any(finding.code != "row-not-an-object" for finding in refused):
        raise BadRows(
            "the only row cannot be used"
            if len(refused) == 1
            else f"none of the {len(refused):,} rows can be used",
            merged(refused),
            fix="correct the rows: there is nothing left to train on",
        )


def _decide(
    found: list[tuple[str, Picks] | None],
    rows: list[Row],
    only: str | None,
    source: str,
) -> str:
    """The schema of the most rows. All rows vote: the order of a file says nothing about it."""
    votes = Counter(recognised[0] for recognised in found if recognised is not None)
    if votes:
        return votes.most_common(1)[0][0]
    if not rows:
        raise DataError(
            "no row is an object with named columns",
            where=source,
            fix='write one object per row, for example {"messages": [...]} for a list of turns, '
            'or {"text": "..."} for plain text',
            code="no-schema",
        )
    columns = tuple(dict.fromkeys(name for row in rows[:1000] for name in row.fields))
    if only is not None:
        raise schema_mismatch(columns, only, source)
    cause, fix = columns_hint(rows)
    raise no_schema(columns, source, cause, fix)


def _convert(
    row: Row,
    recognised: tuple[str, Picks] | None,
    decided: str,
    reading: _Reading,
    conversations: list[Conversation],
) -> list[Finding]:
    if recognised is None or recognised[0] != decided:
        own = recognised or recognise_row(row.fields)
        other = "no known schema" if own is None else f"the schema {own[0]}"
        return [
            Finding(
                code="mixed-schemas",
                level="error",
                what=f"a row has {other}, but the others have {decided}",
                where=row.where,
                why=f"its columns are {names(row.fields)}",
                fix="put rows of one schema in one file",
            )
        ]
    picks = recognised[1]
    for name in row.fields.keys() - picks.values():
        slot = left_out(decided, picks, row.fields, name)
        if slot is not None:
            fix = keeping(row, decided, picks, reading.mapping, name, slot)
            reading.lost.setdefault((name, fix), []).append(row.where)
        elif not _says_which(name, row.fields[name]):
            reading.unused[name] += 1
    before, findings = len(conversations), []
    for made in convert(row, decided, picks, reading.unused):
        if isinstance(made, Finding):
            findings.append(made)
        else:
            conversations.append(made)
    if not findings and len(conversations) == before:
        reading.empty[row.where] += 1
    return findings
