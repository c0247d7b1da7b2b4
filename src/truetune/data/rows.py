"""The smallest values of the data room: a row, the file it came from, and why a row was refused.

Input:  nothing.
Does:   defines `Row`, `FileInfo`, `FileRows` and `BadRow`, and quotes foreign text safely.
Output: those values.
Who:    the readers make rows; `convert.py` refuses them; `load.py` turns refusals into findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from truetune.findings import Finding


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file has it.

    Attributes:
        fields: column name to value.
        file: the path, or the Hub id.
        line: 1-based. The physical line the row starts on, or the row number for formats
            without lines.
        counted_by: which of the two `line` is.
    """

    fields: dict[str, Any]
    file: str
    line: int
    counted_by: Literal["line", "row"] = "line"

    @property
    def where(self) -> str:
        """`file:line`, or `file row N` for formats without lines."""
        if self.counted_by == "row":
            return f"{self.file} row {self.line}"
        return f"{self.file}:{self.line}"


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
    """What a reader returns: the rows, and what it has to say about the others."""

    rows: list[Row]
    findings: list[Finding]

    @property
    def num_rows(self) -> int:
        """Rows read, those that are not objects included."""
        return len(self.rows) + sum(f.level == "error" for f in self.findings)


class BadRow(Exception):
    """One row that cannot be used; caught by `load`, which makes a `Finding` of it."""

    def __init__(self, code: str, what: str, *, why: str = "", fix: str = "") -> None:
        self.code, self.what, self.why, self.fix = code, what, why, fix
        super().__init__(what)

    def finding(self, where: str) -> Finding:
        return Finding(
            code=self.code, level="error", what=self.what, where=where, why=self.why, fix=self.fix
        )


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def excerpt(text: str, limit: int = 60) -> str:
    """Foreign text in quotes, cut to `limit` characters.

    Control characters, direction marks and lone surrogates come out as escapes, so that a row
    cannot write to a terminal.
    """
    return repr(text[:limit]) + ("..." if len(text) > limit else "")


def names(columns: Iterable[str], limit: int = 30) -> str:
    """Column names as a list to read, odd ones quoted."""
    shown = [c if c.isprintable() and c.strip() else repr(c) for c in columns]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return (", ".join(shown[:limit]) or "(none)") + more


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if missing(value):
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    words: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return words.get(type(value), type(value).__name__)
