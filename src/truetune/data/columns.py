"""The --columns mapping.

Input:  `prompt=question,completion=answer`, or the same as a dict; rows.
Does:   gives columns the names that the schemas know.
Output: rows with renamed columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from truetune.data.hints import nested_column
from truetune.data.rows import Row, names
from truetune.data.schemas import TARGETS
from truetune.errors import DataError, UsageError
from truetune.findings import near


def parse_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """Target name to source column.

    Raises:
        UsageError: `bad-columns`: not `name=column`, a name no schema knows, a name given twice.
    """
    if columns is None:
        return {}
    if isinstance(columns, str):
        pairs = [_pair(item) for item in columns.split(",")]
    else:
        pairs = list(columns.items())
    mapping: dict[str, str] = {}
    for target, source in pairs:
        if target not in TARGETS:
            close = near(target, sorted(TARGETS))
            raise _bad(
                f"no schema has a column named {target!r}",
                f"did you mean {close[0]}?" if close else f"use one of {names(sorted(TARGETS))}",
            )
        if target in mapping:
            raise _bad(f"{target} is given twice", "specify only one source column for it")
        mapping[target] = source
    return mapping


def rename(rows: list[Row], mapping: dict[str, str], source: str) -> list[Row]:
    """Rows under their mapped names; a column that had a mapped name before gives way.

    Raises:
        DataError: `no-such-column` if a column is in no row.
    """
    if not mapping:
        return rows
    there = dict.fromkeys(column for row in rows for column in row.fields)
    for target, column in mapping.items():
        if column not in there:
            nested = nested_column(column, rows, source)
            if nested is not None:
                raise nested
            close = near(column, there)
            hint = f"did you mean {target}={close[0]}?" if close else f"use one of {names(there)}"
            raise DataError(
                f"there is no column {column!r}",
                where=source,
                why=f"the columns are {names(there)}",
                fix=f"correct --columns {target}=...: {hint}",
                code="no-such-column",
            )
    taken = set(mapping.values()) | set(mapping)
    renamed = []
    for row in rows:
        fields = {t: row.fields[s] for t, s in mapping.items() if s in row.fields}
        fields |= {name: value for name, value in row.fields.items() if name not in taken}
        renamed.append(dataclasses.replace(row, fields=fields))
    return renamed


def _pair(item: str) -> tuple[str, str]:
    target, equals, source = item.partition("=")
    if not equals or not target.strip() or not source.strip():
        raise _bad(f"{item.strip()!r} is not name=column", "")
    return target.strip(), source.strip()


def _bad(what: str, fix: str) -> UsageError:
    return UsageError(
        what,
        where="--columns",
        fix=fix or "for example --columns prompt=question,completion=answer",
        code="bad-columns",
    )
