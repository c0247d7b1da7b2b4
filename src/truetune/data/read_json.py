"""JSON files.

Input:  a .jsonl file (one object a line) or a .json file (an array of objects; an object that
        holds one list of them; objects one after the other; or one single row).
Does:   parses, and keeps the physical line on which each row starts, where no other row does.
Output: `FileRows`; values that are not objects become `row-not-an-object` findings.
Who:    called by `read.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truetune.data.files import decoded, empty_file, open_bytes, read_text
from truetune.data.rows import BadRow, FileRows, Row, excerpt, kind, names, place
from truetune.data.schemas import ROW_COLUMNS
from truetune.errors import DataError
from truetune.findings import Finding

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# The list to take where an object holds several, first match wins.
_LIST_NAMES = ("data", "rows", "examples", "train", "records", "items")


def read_jsonl(path: Path, limit: int | None) -> FileRows:
    """One JSON value a line; blank lines are skipped but counted as lines.

    Raises:
        DataError: `broken-json`, `not-utf8`, `empty-file`.
    """
    values: list[tuple[Any, int | None]] = []
    with open_bytes(path) as file:
        # Lines end at \n alone: str.splitlines would also cut at U+2028 inside a JSON string.
        for line, raw in enumerate(file, 1):
            if limit is not None and len(values) >= limit:
                break
            if raw.isspace():
                continue
            text = decoded(raw, path, line).rstrip()
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                if not text:  # a byte order mark and nothing else
                    continue
                raise _broken(error, text, path, line) from error
            values.append((value, line))
    return _file_rows(values, path)


def read_json(path: Path, limit: int | None) -> FileRows:
    """A .json file in any of the four forms.

    Raises:
        DataError: `broken-json`, `not-utf8`, `empty-file`, `no-rows`.
    """
    text = read_text(path)
    values: list[Any] = []
    # The line of each row, and of the one after the last, so that a limit changes no place.
    lines: list[int] = []
    counted_to = 0
    try:
        for value, start in _values(text, path):
            lines.append((lines or [1])[-1] + text.count("\n", counted_to, start))
            counted_to = start
            if limit is not None and len(values) >= limit:
                break
            values.append(value)
    except (ValueError, RecursionError) as error:
        raise _broken(error, text, path, 1) from error
    starting = Counter(lines)
    own_lines = [line if starting[line] == 1 else None for line in lines]
    return _file_rows(list(zip(values, own_lines, strict=False)), path)


def _values(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """Each row with the position it starts at."""
    start = _skip(text, 0)
    if text[start] == "[":
        yield from _elements(text, start, must_end=True)
        return
    value, end = _DECODER.raw_decode(text, start)
    following = _skip(text, end)
    if following == len(text) and isinstance(value, dict):
        yield from _rows_of_object(value, text, start, path)
        return
    # Objects one after the other: JSON Lines under the name .json, pretty-printed or not.
    yield value, start
    while following < len(text):
        start = following
        value, end = _DECODER.raw_decode(text, start)
        yield value, start
        following = _skip(text, end)


def _rows_of_object(
    value: dict[str, Any], text: str, start: int, path: Path
) -> Iterator[tuple[Any, int]]:
    if ROW_COLUMNS & {name.lower() for name in value}:
        yield value, start
        return
    lists = [k for k, v in value.items() if isinstance(v, list) and any(map(_is_object, v))]
    if len(lists) > 1:
        lists = [name for name in _LIST_NAMES if name in lists][:1]
    if not lists:
        raise DataError(
            "the JSON file holds one object, and not one list of rows in it",
            where=str(path),
            why=f"its keys are {names(value)}",
            fix="write an array of objects, or one object a line under the name .jsonl",
            code="no-rows",
        )
    yield from _elements(text, _member(text, start, lists[0]), must_end=False)


def _elements(text: str, start: int, *, must_end: bool) -> Iterator[tuple[Any, int]]:
    """The elements of the array that opens at `start`, each with its position."""
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        value, end = _DECODER.raw_decode(text, position)
        yield value, position
        position = _skip(text, end)
        following = text[position : position + 1]
        if following == ",":
            comma, position = position, _skip(text, position + 1)
            if text[position : position + 1] == "]":
                raise json.JSONDecodeError("A comma before the closing bracket", text, comma)
        elif following != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    end = _skip(text, position + 1)
    if must_end and end < len(text):
        raise json.JSONDecodeError("Text after the end of the array", text, end)


def _member(text: str, start: int, wanted: str) -> int:
    """Where the value of the key `wanted` starts, in an object that is known to parse."""
    position, found = _skip(text, start + 1), -1
    while text[position] != "}":
        key, end = _DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, end) + 1)
        if key == wanted:
            found = position  # a repeated key: the last one counts, as in json.loads
        _, end = _DECODER.raw_decode(text, position)
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return found


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _file_rows(values: list[tuple[Any, int | None]], path: Path) -> FileRows:
    if not values:
        raise empty_file(path)
    out = FileRows([], [], [])
    for index, (value, line) in enumerate(values, 1):
        out.places.append(place(str(path), index, line))
        if isinstance(value, dict):
            out.rows.append(Row(value, str(path), index, line))
        else:
            out.findings.append(_not_an_object(value, out.places[-1]))
    return out


def _not_an_object(value: Any, where: str) -> Finding:
    return BadRow(
        "row-not-an-object",
        f"a row is {kind(value)}, not an object",
        why="each row must be an object with named columns",
        fix='write {"text": "..."} for plain text, or drop the row with --bad-rows drop',
    ).finding(where)


def _broken(error: Exception, text: str, path: Path, first_line: int) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return DataError(
            f"broken JSON: {cause}",
            where=f"{path}:{first_line}",
            fix="mend or delete the row",
            code="broken-json",
        )
    line = first_line + error.lineno - 1
    start = max(error.pos - 20, 0)
    return DataError(
        f"broken JSON on line {line}, column {error.colno}: {error.msg}, "
        f"near {excerpt(text[start : error.pos + 20])}",
        where=f"{path}:{line}",
        why=_cause(error, text, first_line),
        fix=f"mend the line: sed -n {line}p {path}",
        code="broken-json",
    )


def _cause(error: json.JSONDecodeError, text: str, first_line: int) -> str:
    if first_line == 1 and text.lstrip()[:1] == "[" and error.lineno == 1 and "\n" not in text:
        return "the file looks like one JSON array: name it .json"
    if first_line == 1 and text.strip() == "{":
        return "the file looks like pretty-printed JSON: name it .json"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return "the row ends too early: the file was cut off, or a line break is inside a row"
    if text[error.pos : error.pos + 1] == "'" or error.msg.startswith("Expecting property name"):
        return "JSON needs double quotes around names and text, and no comma after the last one"
    if error.msg == "Extra data":
        return "two values stand on one line"
    if error.msg.startswith("Invalid control character"):
        return "a line break or tab inside text must be written as \\n or \\t"
    return "the row was edited by hand or written without a JSON library"
