"""Judge whether the text between two tags is a value of a call, as a server parses it."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

# How Python's own text of a value begins if it is not that of JSON too.
_PYTHON = ("'", '"', "[", "{", "True", "False", "None")


_SECTION = "<![CDATA["


def between_tags(text: str, start: int, end: int) -> str | None:
    """What is between the tags around a place, or between the sides of a CDATA section; None
    if none is on either side."""
    section = text.rfind(_SECTION, 0, start)
    if section >= 0 and "]]>" not in text[section:start]:
        closed = text.find("]]>", end)
        return None if closed < 0 else text[section + len(_SECTION) : closed]
    left = max(text.rfind("<", 0, start), text.rfind(">", 0, start))
    right = min((at for sign in "<>" if (at := text.find(sign, end)) >= 0), default=-1)
    if left < 0 or right < 0 or text[left] != ">" or text[right] != "<":
        return None
    return text[left + 1 : right]


def values_in(value: Any) -> Iterator[Any]:
    """A value and all values in it."""
    yield value
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from values_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from values_in(inner)


def is_written(text: str, value: Any) -> bool:
    """Whether a text is exactly the value: as text, as JSON or in Python notation."""
    form = text.strip()
    if isinstance(value, str) and form == value.strip():
        return True
    return any(is_same(read, value) for read in _readings(form))


def _readings(text: str) -> Iterator[Any]:
    try:
        yield json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith(_PYTHON):
            with contextlib.suppress(
                ValueError, SyntaxError, TypeError, MemoryError, RecursionError
            ):
                yield ast.literal_eval(text)


def is_same(read: Any, value: Any) -> bool:
    """Whether two values are equal and of the same types: true is not 1, and 1.0 is not 1."""
    return json.dumps(read, sort_keys=True, default=repr) == json.dumps(
        value, sort_keys=True, default=repr
    )


# Keys that may be next to those of the arguments, if a format puts everything into one object.
CALL_KEYS = frozenset({"name", "tool_name", "type", "id", "tool_call_id", "index"})


def is_call(held: Mapping[str, Any], arguments: Any) -> bool:
    """Whether a JSON object is the arguments of a call, or a call that has its arguments next to
    its name."""
    if not isinstance(arguments, Mapping):
        return False
    bare = {k: v for k, v in held.items() if k in arguments or k not in CALL_KEYS}
    return is_same(bare if len(bare) < len(held) and arguments else held, arguments)


def json_objects(text: str, *, elements: bool = True) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, including those inside other objects and inside strings.

    Args:
        elements: also those in a list that belongs to a key.
    """
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield from _objects(value, elements)
        at = text.find("{", end)


def _objects(value: Any, elements: bool, listed: bool = False) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if elements or not listed:
            yield value
        for inner in value.values():
            yield from _objects(inner, elements, isinstance(inner, list))
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner, elements, listed)
    elif isinstance(value, str) and value.startswith("{"):
        yield from json_objects(value, elements=elements)
