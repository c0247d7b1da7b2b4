"""JSON files.

Input:  a .jsonl file (one object a line) or a .json file (an array of objects; an object that
        holds one list of them; objects one after the other; or one single row).
Does:   parses, and keeps the physical line on which each row starts, where no other row does.
Output: `FileRows`; values that are not objects become `row-not-an-object` findings.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truetune.data.files import (
    MOST_TEXT,
    PACKED,
    ROW_BYTES,
    decoded,
    empty_file,
    most_unpacked,
    numbered_lines,
    read_text,
    row_too_large,
    unpacks_too_far,
)
from truetune.data.rows import SPLIT_WORDS, BadRow, FileRows, Row, excerpt, kind, names, place
from truetune.data.schemas import ROW_COLUMNS
from truetune.errors import DataError
from truetune.findings import Finding, counted

_SPACE = re.compile(r"[ \t\n\r]*")
# The list to take where an object holds several, first match wins.
_LIST_NAMES = ("data", "rows", "examples", "train", "records", "items")


def read_jsonl(path: Path, limit: int | None) -> FileRows:
    """One JSON value a line; blank lines are skipped but counted as lines.

    Raises:
        DataError: `broken-json`, `row-too-large`, `not-text`, `not-utf8`, `empty-file`.
    """
    values: list[_Read] = []
    parser = _Parser()
    packed = path.suffix.lower() in PACKED
    most = most_unpacked(path) // ROW_BYTES if packed else None
    for line, raw in numbered_lines(path):
        if limit is not None and len(values) >= limit:
            break
        if len(values) == most:
            raise unpacks_too_far(path)
        text = decoded(raw, path, line).rstrip()
        try:
            value, twice = parser.whole(text)
        except (ValueError, RecursionError) as error:
            if not text:  # a byte order mark and nothing else
                continue
            raise _broken(error, text, path, line) from error
        values.append((value, line, twice))
    return _file_rows(values, path)


def read_json(path: Path, limit: int | None) -> FileRows:
    """A .json file in any of the four forms.

    Raises:
        DataError: `broken-json`, `row-too-large`, `not-text`, `not-utf8`, `empty-file`, `no-rows`.
    """
    # A whole array may stand on one line: its values are bounded, not its lines.
    text = read_text(path, lines=False)
    values: list[tuple[Any, str | None]] = []
    # The line of each row, and of the one after the last, so that a limit changes no place.
    lines: list[int] = []
    counted_to = 0
    notes: list[Finding] = []
    try:
        for value, start, twice in _values(text, path, notes):
            lines.append((lines or [1])[-1] + text.count("\n", counted_to, start))
            counted_to = start
            if limit is not None and len(values) >= limit:
                break
            values.append((value, twice))
    except (ValueError, RecursionError) as error:
        raise _broken(error, text, path, 1) from error
    starting = Counter(lines)
    own_lines = [line if starting[line] == 1 else None for line in lines]
    read = zip(values, own_lines, strict=False)
    found = _file_rows([(value, line, twice) for (value, twice), line in read], path)
    found.findings.extend(notes)
    return found


# A value, the position or line it starts at, and a key that one of its objects has twice.
_Placed = tuple[Any, int, str | None]
_Read = tuple[Any, int | None, str | None]


class _Parser:
    """A JSON parser that notices what Python's drops silently: all but the last of equal keys."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._twice: str | None = None
        self.outermost: str | None = None

    def whole(self, text: str) -> tuple[Any, str | None]:
        """The value that a text is, and a key that occurs twice in one object of it."""
        self._twice = None
        return self._decoder.decode(text), self._twice

    def at(self, text: str, start: int) -> tuple[Any, int, str | None]:
        """As `whole`, of the value that starts at a position, with the position of its end."""
        self._twice = None
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._twice

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        self.outermost = None
        if len(made) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.outermost = self._twice = next(k for k, n in counts.items() if n > 1)
        return made


def _require_size(text: str, start: int, end: int, path: Path) -> None:
    if end - start > MOST_TEXT:
        raise row_too_large(f"{path}:{text.count(chr(10), 0, start) + 1}")


def _values(text: str, path: Path, notes: list[Finding]) -> Iterator[_Placed]:
    """Each row with the position it starts at; what is left aside goes to the notes."""
    parser = _Parser()
    start = _skip(text, 0)
    if text[start] == "[":
        yield from _elements(parser, text, start, path, must_end=True)
        return
    value, end, twice = parser.at(text, start)
    following = _skip(text, end)
    if following == len(text) and isinstance(value, dict):
        yield from _rows_of_object(parser, (value, start, twice), text, end, path, notes)
        return
    # Objects one after the other: JSON Lines under the name .json, pretty-printed or not.
    _require_size(text, start, end, path)
    yield value, start, twice
    while following < len(text):
        start = following
        value, end, twice = parser.at(text, start)
        _require_size(text, start, end, path)
        yield value, start, twice
        following = _skip(text, end)


def _rows_of_object(
    parser: _Parser,
    placed: tuple[dict[str, Any], int, str | None],
    text: str,
    end: int,
    path: Path,
    notes: list[Finding],
) -> Iterator[_Placed]:
    value, start, _ = placed
    if _is_columns(value):
        raise DataError(
            "the JSON file holds columns, not rows",
            where=str(path),
            why="pandas writes this with to_json(), and with to_dict('list')",
            fix="write rows: df.to_json('rows.jsonl', orient='records', lines=True)",
            code="no-rows",
        )
    if ROW_COLUMNS & {name.lower() for name in value}:
        _require_size(text, start, end, path)
        yield placed
        return
    if parser.outermost is not None:
        raise _duplicate_key(parser.outermost).error(str(path))
    lists = [k for k, v in value.items() if isinstance(v, list) and any(map(_is_object, v))]
    several, lists = lists, lists if len(lists) < 2 else [n for n in _LIST_NAMES if n in lists][:1]
    if not lists:
        raise DataError(
            "the JSON file holds one object that contains no list of rows",
            where=str(path),
            why=f"its keys are {names(value)}" if value else "it has no keys",
            fix="write an array of objects, or one object per line in a .jsonl file; take a file "
            "that holds no rows out of the data folder",
            code="no-rows",
        )
    notes += _other_lists({name: value[name] for name in several if name not in lists}, lists, path)
    opens = _member(text, start, lists[0])
    yield from _elements(parser, text, opens, path, must_end=False)


def _other_lists(others: dict[str, list[Any]], chosen: list[str], path: Path) -> Iterator[Finding]:
    """Lists beside the one that is read: splits, which everybody expects, or rows by mistake."""
    if not others:
        return
    left = [f"{name!r} ({counted(len(rows), 'element')})" for name, rows in others.items()]
    name = next(iter(others))
    own = f"{name}.jsonl" if re.fullmatch(r"\w+", name) else "rows.jsonl"
    key = f".{name}[]" if re.fullmatch(r"[A-Za-z_]\w*", name) else f".[{json.dumps(name)}][]"
    yield Finding(
        code="lists-not-read",
        level="note" if all(n.lower() in SPLIT_WORDS for n in others) else "warning",
        what=f"the list {chosen[0]!r} was read; not read: {', '.join(left[:5])}"
        + (f" and {len(left) - 5} more" if len(left) > 5 else ""),
        where=f"{path}, list {name!r}",
        count=len(others),
        why="a JSON file has one list of rows",
        fix=f"write another list to a file: jq -c {shlex.quote(key)} "
        f"{shlex.quote(str(path))} > {own} (held-out rows are passed with --eval-data)",
    )


def _is_columns(value: dict[str, Any]) -> bool:
    """Whether an object has equally long lists, or objects numbered alike, as its columns."""
    columns = list(value.values())
    if columns and all(isinstance(column, list) for column in columns):
        flat = not any(_is_object(cell) for column in columns for cell in column)
        return flat and len({len(column) for column in columns}) == 1 and bool(columns[0])
    if columns and all(map(_is_object, columns)):
        keys = {tuple(column) for column in columns}
        return len(keys) == 1 and bool(columns[0]) and all(key.isdigit() for key in columns[0])
    return False


def _elements(
    parser: _Parser, text: str, start: int, path: Path, *, must_end: bool
) -> Iterator[_Placed]:
    """The elements of the array that opens at `start`, each with its position."""
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        value, end, twice = parser.at(text, position)
        _require_size(text, position, end, path)
        yield value, position, twice
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
    decoder = json.JSONDecoder()
    position = _skip(text, start + 1)
    while text[position] != "}":
        key, end = decoder.raw_decode(text, position)
        position = _skip(text, _skip(text, end) + 1)
        if key == wanted:
            return position
        _, end = decoder.raw_decode(text, position)
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    raise ValueError(f"{wanted!r} is not a key of the object")


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _file_rows(values: list[_Read], path: Path) -> FileRows:
    if not values:
        raise empty_file(path)
    out = FileRows([], [], [])
    for index, (value, line, twice) in enumerate(values, 1):
        out.places.append(place(str(path), index, line))
        if not isinstance(value, dict):
            out.findings.append(_not_an_object(value).finding(out.places[-1]))
        elif twice is not None:
            out.findings.append(_duplicate_key(twice).finding(out.places[-1]))
        else:
            out.rows.append(Row(value, str(path), index, line))
    return out


def _not_an_object(value: Any) -> BadRow:
    if isinstance(value, list) and value and all(map(_is_object, value)):
        fix = """write {"messages": [...]}: jq -c '{messages: .}' ROWS.jsonl > chats.jsonl"""
    else:
        fix = 'write {"text": "..."} for plain text, or drop the row with --bad-rows drop'
    return BadRow(
        "row-not-an-object",
        f"a row is {kind(value)}, not an object",
        why="each row must be an object with named columns",
        fix=fix,
    )


def _duplicate_key(key: str) -> BadRow:
    return BadRow(
        "duplicate-key",
        f"the key {excerpt(key)} occurs twice in one object",
        why="JSON libraries keep the last one and lose the others silently",
        fix="keep one of them, or drop the row with --bad-rows drop",
    )


def _broken(error: Exception, text: str, path: Path, first_line: int) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return DataError(
            f"broken JSON: {cause}",
            where=f"{path}:{first_line}",
            fix="correct or delete the row",
            code="broken-json",
        )
    line = first_line + error.lineno - 1
    start = max(error.pos - 20, 0)
    return DataError(
        f"broken JSON on line {line}, column {error.colno}: {error.msg}, "
        f"near {excerpt(text[start : error.pos + 20])}",
        where=f"{path}:{line}",
        why=_cause(error, text, path, first_line),
        fix=_fix(error, text, path, first_line, line),
        code="broken-json",
    )


def _cause(error: json.JSONDecodeError, text: str, path: Path, first_line: int) -> str:
    if first_line == 1 and _is_page(text):
        return "it is a web page, not JSON: the download failed or needed a login"
    if _is_json_in_lines(text, path, first_line):
        return "the file looks like a JSON array or pretty-printed JSON: name it .json"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return "the row ends too early: the file was cut off, or a line break is inside a row"
    if text[error.pos : error.pos + 1] == "'" or error.msg.startswith("Expecting property name"):
        return "JSON needs double quotes around names and text, and no comma after the last one"
    if _ends_lines_as_old_macs(text):
        return "its lines end with a carriage return alone, as on old Macs"
    if _ends_with_a_comma(error, text):
        return "a comma follows the row, as in a JSON array; rows of a .jsonl file have none"
    if error.msg == "Extra data":
        return "there are two values on one line"
    if error.msg.startswith("Invalid control character"):
        return "a line break or tab inside text must be written as \\n or \\t"
    return "the row was edited by hand or written without a JSON library"


def _fix(error: json.JSONDecodeError, text: str, path: Path, first_line: int, line: int) -> str:
    plain = shlex.quote(str(path))
    if first_line == 1 and _is_page(text):
        return "download the file again"
    if _is_json_in_lines(text, path, first_line):
        renamed = path.with_name(re.sub(r"\.(jsonl|ndjson)", ".json", path.name, flags=re.I))
        return f"rename it: mv {plain} {shlex.quote(str(renamed))}"
    if _ends_lines_as_old_macs(text):
        command = "tr '\\r' '\\n'"
        return f"convert it: {_reading(path, command)} > lines.jsonl"
    if _ends_with_a_comma(error, text):
        command = "sed 's/,[[:space:]]*$//'"
        return f"remove the commas: {_reading(path, command)} > lines.jsonl"
    return f"correct the line: {_reading(path, f'sed -n {line}p')}"


def _reading(path: Path, command: str) -> str:
    """The command on a file, which may be compressed."""
    unpack, name = PACKED.get(path.suffix.lower()), shlex.quote(str(path))
    return f"{unpack} -c {name} | {command}" if unpack else f"{command} < {name}"


def _is_page(text: str) -> bool:
    return text.lstrip()[:1] == "<"


def _is_json_in_lines(text: str, path: Path, first_line: int) -> bool:
    """Whether the first line of a .jsonl file is the beginning of a value over several lines."""
    lines = re.search(r"\.(jsonl|ndjson)", path.name, re.IGNORECASE)
    opens = text.strip() == "{" or text.lstrip()[:1] == "["
    return bool(lines) and first_line == 1 and "\n" not in text and opens


def _ends_with_a_comma(error: json.JSONDecodeError, text: str) -> bool:
    return error.msg == "Extra data" and text[error.pos :].strip() == ","


def _ends_lines_as_old_macs(text: str) -> bool:
    return "\r" in text.strip() and "\n" not in text
