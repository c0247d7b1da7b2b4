"""Tables: csv, tsv and parquet.

Input:  a file with named columns.
Does:   reads it whole; csv strictly (a ragged row means that columns have slipped).
Output: `FileRows`, csv rows with their physical line, parquet rows with their number.
Who:    called by `read.py`; `hub.py` shares `without_nulls`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from truetune.data.files import empty_file, open_bytes, read_text
from truetune.data.rows import FileRows, Row, excerpt, names
from truetune.errors import DataError
from truetune.findings import Finding

# Below these keys a null is read as content by a template; elsewhere it means "not there".
_MEANT_KEYS = frozenset({"tools", "functions", "function", "arguments", "parameters", "input"})


def read_csv(path: Path, limit: int | None) -> FileRows:
    """Comma-separated values with a header; .tsv by tabs; semicolons if the header has no comma.

    Raises:
        DataError: `ragged-csv`, `broken-csv`, `not-utf8`, `empty-file`.
    """
    text = read_text(path)
    header_line = text.lstrip().split("\n", 1)[0]
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    if delimiter == "," and "," not in header_line and ";" in header_line:
        delimiter = ";"  # what spreadsheets write where the comma is the decimal sign
    # The module's limit of 131,072 characters a field is global, so it is put back.
    previous = csv.field_size_limit(sys.maxsize)
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
    start = 1
    while limit is None or len(rows) < limit:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(
                f"broken csv: {error}",
                where=f"{path}:{start}",
                why="a quote that opens on this line is not closed, or text follows a closing one",
                fix='write a quote inside text twice (""), the text itself in quotes',
                code="broken-csv",
            ) from error
        if not cells:
            continue
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
            f"the header names a column twice: {names(twice)}",
            where=f"{path}:{line}",
            fix="rename one of them",
            code="broken-csv",
        )
    return header


def _ragged(cells: list[str], header: list[str], path: Path, line: int) -> DataError:
    return DataError(
        f"the row on line {line} has {len(cells)} cells, the header has {len(header)}",
        where=f"{path}:{line}",
        why=f"text with a comma or line break is not in quotes; the last cell is "
        f"{excerpt(cells[-1], 40)}",
        fix="put the text in quotes, or convert the file to jsonl",
        code="ragged-csv",
    )


def read_parquet(path: Path, limit: int | None) -> FileRows:
    """A parquet file; nulls that Arrow adds inside tools and tool arguments are removed.

    Raises:
        DataError: `not-parquet`, `empty-file`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    with_nulls: list[Row] = []
    try:
        with open_bytes(path) as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=4096):
                for fields in batch.to_pylist():
                    if limit is not None and len(rows) >= limit:
                        break
                    clean, removed = without_nulls(fields)
                    rows.append(Row(clean, str(path), len(rows) + 1))
                    if removed:
                        with_nulls.append(rows[-1])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"the file cannot be read as parquet: {str(error).splitlines()[0]}",
            where=str(path),
            why="it was cut off, or it is something else under this name (a Git LFS pointer?)",
            fix="fetch the file again; `head -c 4` of a parquet file shows PAR1",
            code="not-parquet",
        ) from error
    if not rows:
        raise empty_file(path)
    return FileRows.of(rows, *null_notes(with_nulls))


def null_notes(rows: list[Row]) -> list[Finding]:
    """The note on rows from which `without_nulls` removed something that was meant."""
    if not rows:
        return []
    return [
        Finding(
            code="arrow-nulls",
            level="note",
            what="null keys inside tools or tool arguments were removed",
            where=rows[0].where,
            count=len(rows),
            why="Arrow gives each object the keys of all rows, null where a row has none: a model "
            "would learn to write them",
            fix="keep tools and arguments as JSON text, or use jsonl, if a null is meant",
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
