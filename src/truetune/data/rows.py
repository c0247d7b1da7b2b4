"""The smallest values of the data room: a row, the file it came from, and why a row was refused.

Input:  nothing.
Does:   defines `Row`, `FileInfo`, `FileRows` and `BadRow`, and quotes foreign text safely.
Output: those values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from truetune.errors import DataError
from truetune.findings import Finding, phrase

T = TypeVar("T")
# The words by which the Hub, too, tells the split of a file.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file has it.

    Attributes:
        fields: column name to value.
        file: the path, or the Hub id with its split.
        index: 1-based number among all rows of the file, bad ones included. File and index are
            the row's identity.
        line: 1-based physical line on which the row starts; None if that says less than the
            index: in formats without lines, and on a line on which another row starts.
    """

    fields: dict[str, Any]
    file: str
    index: int
    line: int | None = None

    @property
    def where(self) -> str:
        """The row's place, which no other row has."""
        return place(self.file, self.index, self.line)


def place(file: str, index: int, line: int | None = None) -> str:
    """`file:line`, or `file row N` where the line does not tell the row from all others."""
    return f"{file} row {index}" if line is None else f"{file}:{line}"


_PLACE = re.compile(r"(.*?)(?::\d+| row \d+)(?:, instances\[\d+\])?", re.DOTALL)


def file_of(where: str) -> str:
    """The file of a place that `place` names; the whole text of any other."""
    found = _PLACE.fullmatch(where)
    return found[1] if found else where


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What was read, for data.json.

    Attributes:
        path: the path, or `id@revision` of a Hub dataset.
        sha256: hex, of the bytes of the whole file; of the rows read for a Hub dataset.
        num_rows: rows read, those that are not objects included.
        num_bytes: the size of what was hashed.
    """

    path: str
    sha256: str
    num_rows: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileRows:
    """What a reader returns.

    Attributes:
        rows: those that are objects.
        findings: an error for each row that is not an object, and notes on the file.
        places: of all rows in order, those that are not objects included.
    """

    rows: list[Row]
    findings: list[Finding]
    places: list[str]

    @classmethod
    def of(cls, rows: list[Row], *findings: Finding) -> FileRows:
        """Of a format in which every row has named columns."""
        return cls(rows, list(findings), [row.where for row in rows])


class BadRow(Exception):
    """One row that cannot be used; caught by `load`, which makes a `Finding` of it."""

    def __init__(self, code: str, what: str, *, why: str = "", fix: str = "") -> None:
        self.code, self.what, self.why, self.fix = code, what, why, fix
        super().__init__(what)

    def error(self, where: str) -> DataError:
        """As an error on the whole file."""
        return DataError(self.what, where=where, why=self.why, fix=self.fix, code=self.code)

    def finding(self, where: str) -> Finding:
        return Finding(
            code=self.code, level="error", what=self.what, where=where, why=self.why, fix=self.fix
        )


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def not_a_number(what: str, code: str) -> BadRow:
    """The refusal of NaN where text is needed."""
    return BadRow(
        code,
        f"{what} is NaN, not text",
        why="pandas writes NaN for an empty cell",
        fix="fill the cell, or drop the row with --bad-rows drop",
    )


def evenly(items: Sequence[T], most: int, *, last: bool = False) -> Sequence[T]:
    """At most `most` items, evenly spread: the first, and with `last` the last item too."""
    if len(items) <= most:
        return items
    if last:
        return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]
    return [items[i * len(items) // most] for i in range(most)]


def excerpt(text: str, limit: int = 60) -> str:
    """Foreign text in quotes, cut to `limit` characters.

    Control characters, direction marks and lone surrogates come out as escapes, so that a row
    cannot write to a terminal.
    """
    return repr(text[:limit]) + ("..." if len(text) > limit else "")


def names(columns: Iterable[str], limit: int = 30) -> str:
    """Return column names as a readable list; unusual names are quoted."""
    shown = [c if c.isprintable() and c.strip() else repr(c) for c in columns]
    return phrase(shown, limit) or "none"


def kind(value: Any) -> str:
    """Return the type of a JSON value, in words."""
    if value is None:
        return "null"
    if missing(value):
        return "NaN"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    words: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return words.get(type(value), type(value).__name__)
