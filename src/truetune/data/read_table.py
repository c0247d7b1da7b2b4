"""Tables: csv, tsv and parquet.

Input:  a file with named columns.
Does:   reads it whole; csv strictly (a ragged row means that columns have slipped).
Output: `FileRows`, csv rows with their physical line, parquet rows with their number.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from truetune.data.decoded import decoded_bytes
from truetune.data.files import (
    MOST_TEXT,
    PACKED,
    ROW_BYTES,
    empty_file,
    most_unpacked,
    open_bytes,
    read_text,
    row_too_large,
    unpacks_too_far,
)
from truetune.data.rows import FileRows, Row, excerpt, names
from truetune.errors import DataError
from truetune.findings import Finding
from truetune.system.bounded import bounded

# Rows that are decoded at once.
_BATCH = 256
# What Arrow may take to read a batch beyond what the whole file may decode to: its own buffers.
_SPARE = 2**30
# Below these keys a null is read as content by a template; elsewhere it means "not there".
_MEANT_KEYS = frozenset({"tools", "functions", "function", "arguments", "parameters", "input"})


def read_csv(path: Path, limit: int | None) -> FileRows:
    """Comma-separated values with a header; .tsv by tabs; semicolons or tabs if the header has
    them and no comma.

    Raises:
        DataError: `ragged-csv`, `broken-csv`, `row-too-large`, `not-text`, `not-utf8`,
            `empty-file`.
    """
    text = read_text(path)
    header_line = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    if delimiter == "," and "," not in header_line and ";" in header_line:
        delimiter = ";"  # what spreadsheets write where the comma is the decimal sign
    elif delimiter == "," and "," not in header_line and "\t" in header_line:
        delimiter = "\t"
    # The module's limit of 131,072 characters a field is global, so it is put back.
    previous = csv.field_size_limit(MOST_TEXT)
    try:
        rows = _csv_rows(text, delimiter, path, limit)
    finally:
        csv.field_size_limit(previous)
    if not rows:
        raise empty_file(path)
    return FileRows.of(rows)


def _csv_rows(text: str, delimiter: str, path: Path, limit: int | None) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    packed = path.suffix.lower() in PACKED
    most = most_unpacked(path) // ROW_BYTES if packed else None
    start = 1
    while limit is None or len(rows) < limit:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if "field limit" in str(error):
                raise row_too_large(f"{path}:{start}") from error
            raise DataError(
                f"broken csv: {error}",
                where=f"{path}:{start}",
                why="a quote that opens on this line is not closed, or text follows a closing one",
                fix='put the text in quotes, and double each quote inside it ("")',
                code="broken-csv",
            ) from error
        if not cells:
            continue
        if len(rows) == most:
            raise unpacks_too_far(path)
        if sum(map(len, cells)) > MOST_TEXT:
            raise row_too_large(f"{path}:{start}")
        if header is None:
            header = _header(cells, path, start)
        elif len(cells) != len(header):
            raise _ragged(cells, header, path, start)
        else:
            rows.append(Row(dict(zip(header, cells, strict=True)), str(path), len(rows) + 1, start))
    return rows


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(
            f"the header has duplicate columns: {names(twice)}",
            where=f"{path}:{line}",
            fix="rename one of them",
            code="broken-csv",
        )
    return header


def _ragged(cells: list[str], header: list[str], path: Path, line: int) -> DataError:
    return DataError(
        f"the row on line {line} has {len(cells)} cells, but the header has {len(header)}",
        where=f"{path}:{line}",
        why=f"text with a comma or line break is not quoted; the last cell is "
        f"{excerpt(cells[-1], 40)}",
        fix="put the text in quotes, or convert the file to jsonl",
        code="ragged-csv",
    )


def read_parquet(path: Path, limit: int | None) -> FileRows:
    """A parquet file; nulls that Arrow adds inside tools and tool arguments are removed.

    Raises:
        DataError: `not-parquet`, `parquet-value`, `duplicate-column`, `unpacks-too-far`,
            `row-too-large`, `empty-file`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    with_nulls: list[Row] = []
    left = most_unpacked(path)
    try:
        with open_bytes(path) as stream, pq.ParquetFile(stream) as file:
            _require_columns_once(file.schema_arrow, path)
            if limit is None and ROW_BYTES * file.metadata.num_rows > left:
                raise unpacks_too_far(path)
            batches = file.iter_batches(batch_size=_BATCH)
            while True:
                with bounded(left + _SPARE):
                    batch = next(batches, None)
                if batch is None:
                    break
                size = sum(map(decoded_bytes, batch.columns))
                left -= ROW_BYTES * len(batch) + size
                if left < 0:
                    raise unpacks_too_far(path)
                if size > MOST_TEXT:
                    _require_rows_of_a_size(batch, path, len(rows))
                for fields in _pylist(batch, path, len(rows)):
                    if limit is not None and len(rows) >= limit:
                        break
                    clean, removed = without_nulls(fields)
                    rows.append(Row(clean, str(path), len(rows) + 1))
                    if removed:
                        with_nulls.append(rows[-1])
                if limit is not None and len(rows) >= limit:
                    break
    except MemoryError as error:
        raise unpacks_too_far(path) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the file cannot be read as parquet: {str(error).splitlines()[0]}",
            where=str(path),
            why="it is truncated, or it is not a parquet file",
            fix="fetch the file again; a whole parquet file begins and ends with PAR1",
            code="not-parquet",
        ) from error
    if not rows:
        raise empty_file(path)
    return FileRows.of(rows, *null_notes(with_nulls))


def _require_rows_of_a_size(batch: Any, path: Path, before: int) -> None:
    for number in range(len(batch)):
        if sum(map(decoded_bytes, batch.slice(number, 1).columns)) > MOST_TEXT:
            raise row_too_large(f"{path} row {before + number + 1}")


def _require_columns_once(fields: Iterable[Any], path: Path, inside: str = "") -> None:
    """Raise if a file, or a struct in it, names a column twice: a row could hold one of them."""
    import pyarrow as pa

    found = list(fields)
    twice = [name for name, count in Counter(f.name for f in found).items() if count > 1]
    if twice:
        raise DataError(
            f"the file has duplicate columns: {names(inside + name for name in twice)}",
            where=str(path),
            why="a row can keep only the last one",
            fix="rename one of them, or write the file again",
            code="duplicate-column",
        )
    for one in found:
        kind = one.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _require_columns_once(list(kind), path, f"{inside}{one.name}.")


def _pylist(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch.

    Raises:
        DataError: `parquet-value`, naming row and column.
    """
    import pyarrow as pa

    names = batch.schema.names
    try:
        return [dict(zip(names, row, strict=True)) for row in zip(*_columns(batch), strict=True)]
    except (ValueError, OverflowError, ArithmeticError, pa.ArrowException):
        pass  # named below
    for number in range(len(batch)):
        for name, column in zip(names, batch.columns, strict=True):
            try:
                _values(column.slice(number, 1))
            except (ValueError, OverflowError, ArithmeticError, pa.ArrowException) as error:
                text = isinstance(error, UnicodeDecodeError)
                raise DataError(
                    f"the column {excerpt(name)} holds "
                    + (
                        "text that is not UTF-8"
                        if text
                        else f"a value that cannot be read: {error}"
                    ),
                    where=f"{path} row {before + number + 1}",
                    why="the program that wrote the file did not validate its text"
                    if text
                    else "it is damaged, or holds a date or number that Python cannot represent",
                    fix="correct the value at its source, or leave the column out",
                    code="parquet-value",
                ) from error
    raise AssertionError("a batch fails whose values do not")


def _columns(batch: Any) -> list[list[Any]]:
    return [_values(column) for column in batch.columns]


def _values(column: Any) -> list[Any]:
    """A column as Python values; moments and durations as text, since they may be beyond what
    Python's own types hold, and no schema reads them."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_temporal(kind):
        if pa.types.is_timestamp(kind) and kind.tz is not None:
            column = column.cast(pa.timestamp(kind.unit))
        column = column.cast(pa.string())
    return column.to_pylist()


def null_notes(rows: list[Row]) -> list[Finding]:
    """The note on rows from which `without_nulls` removed something that was meant."""
    if not rows:
        return []
    return [
        Finding(
            code="arrow-nulls",
            level="note",
            what="null values inside tools or tool arguments were removed",
            where=rows[0].where,
            count=len(rows),
            why="Arrow adds the keys of all rows to every object, with null for missing ones; a "
            "model would learn to write them",
            fix="if null is intended, store tools and arguments as JSON text, or use jsonl",
        )
    ]


def without_nulls(fields: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A row without the null keys of nested objects, and how many of them were meant as content.

    The row's own columns stay, null or not.
    """
    removed = 0

    def clean(value: Any, meant: bool) -> Any:
        nonlocal removed
        if isinstance(value, list):
            return [clean(v, meant) for v in value]
        if not isinstance(value, dict):
            return value
        kept = {k: clean(v, meant or k in _MEANT_KEYS) for k, v in value.items() if v is not None}
        if meant:
            removed += len(value) - len(kept)
        return kept

    return {k: clean(v, k in _MEANT_KEYS) for k, v in fields.items()}, removed
