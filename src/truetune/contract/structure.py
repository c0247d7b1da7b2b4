"""Judge whether a parser can read the text around the parts of tool calls.

Brackets, lists and objects must be complete, and tags must hold exactly one part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from truetune.contract.held import between_tags, is_call, is_same, json_objects, values_in
from truetune.contract.twin import FILLER, Twin
from truetune.contract.words import PART

_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
# Characters that turn a key between tags into another key if they are next to it.
_ABOUT_KEY = re.compile(r"[\s\"'`:;,.]+")


# A name between control tokens (see `bare`) or bracketed markers. A number before the name or
# spaces after it are read as a part of it.
_CONTROL = r"(?:<\x01>|\[/?[A-Z_]+\])"
_AFTER_CONTROL = re.compile(_CONTROL + r"[^<>\w\"{]*(\d[^<>\w\"{]*)?$")
_SPACED = re.compile(r"[ \t]+" + _CONTROL)


def attribute(before: str, behind: str) -> tuple[str, str, str] | None:
    """Return (quote, text before, text after) of a part in a tag's attribute.

    Examples are `<function=NAME>` and `<call name="NAME">`. None if it is not in an attribute.
    """
    opened = before[before.rfind("<") + 1 :] if "<" in before else ">"
    if ">" in opened or "=" not in opened or not re.match(r"[/\uff5c|]*[A-Za-z]", opened):
        return None
    lead = opened[opened.rfind("=") + 1 :]
    quote = lead[:1] if lead[:1] in ("'", '"') else ""
    if quote:
        return quote, lead[1:], behind.partition(quote)[0]
    tail = re.match(r"[^<>]*?(?=\s+[\w:-]+=|\s*/?>)", behind)
    return quote, lead, tail.group() if tail else ""


def uncarried(before: str, key: str, behind: str) -> str:
    """Return the character of a name or key that would end it early in this format, or ""."""
    held = attribute(before, behind)
    if held is not None:
        ends = held[0] or "<>"
    elif behind.startswith("=") and re.search(r"\($|,\s*$", before):
        return "" if key.isidentifier() else key
    elif re.match(r":\s", behind) and re.search(r"(?:^|\n)\s*$", before):
        ends = ":\n"
    else:
        return ""
    return next((sign for sign in ends if sign in key), "")


def misshapen(twin: Twin, pieces: Sequence[str | int]) -> Iterator[int]:
    """Yield the parts of calls that share their place with other text.

    A name or key must be the whole attribute or the whole text between its tags; a value that is
    between tags must be the whole text there.
    """
    for at, piece in enumerate(pieces):
        if not isinstance(piece, int):
            continue
        leaf = twin.leaves[piece]
        before, behind = str(pieces[at - 1]), str(pieces[at + 1])
        if leaf.kind in ("name", "key"):
            held = attribute(before, behind)
            if held is not None and (held[1] or held[2]):
                yield piece
                continue
        if leaf.kind == "name" and (marked := _AFTER_CONTROL.search(before)):
            if marked[1] or _SPACED.match(behind):
                yield piece
            continue
        if leaf.kind not in ("key", "value"):
            continue
        text = before + leaf.sentinel + behind
        inside = between_tags(text, len(before), len(before) + len(leaf.sentinel))
        if inside is None:
            continue
        first, _, last = inside.partition(leaf.sentinel)
        first, last = first.removesuffix(leaf.around[0]), last.removeprefix(leaf.around[1])
        same = first == last and not first.strip("\n")
        if leaf.kind == "key":
            if not same and _ABOUT_KEY.fullmatch(first + last):
                yield piece
        elif not same and not (first + last).strip():
            yield piece


def broken(twin: Twin, written: str, pieces: Sequence[str | int]) -> Iterator[str]:
    """Yield what is wrong with brackets, lists and objects of calls that cannot be read."""
    frame = "".join(p if isinstance(p, str) else PART for p in pieces)
    bare = _QUOTED.sub("", frame)
    for opening, closing in _BRACKETS.items():
        if bare.count(opening) != bare.count(closing):
            yield opening if bare.count(opening) > bare.count(closing) else closing
            return
    names = {leaf.sentinel for leaf in twin.leaves if leaf.kind == "name"}
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    for found in re.finditer(r"\[(?=\s*\{)", written):
        try:
            held, _ = decoder.raw_decode(written, found.start())
        except (ValueError, RecursionError):
            inner = next(json_objects(written[found.end() :]), {})
            if names.intersection(_texts(inner)):
                yield "["
            continue
        if names.intersection(_texts(held)) and not all(isinstance(e, dict) for e in held):
            yield "["
    at = written.find("{")
    while at >= 0:
        try:
            held, end = decoder.raw_decode(written, at)
        except _Twice as twice:
            yield str(twice)
            return
        except (ValueError, RecursionError):
            end = at + 1
        at = written.find("{", end)


class _Twice(Exception):
    """An object has a key twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(repr(next(key for key in keys if keys.count(key) > 1)))
    return made


def _texts(value: Any) -> set[str]:
    return {text for text in values_in(value) if isinstance(text, str)}


def moved(twin: Twin, written: str) -> Iterator[int]:
    """Yield the numbers of calls whose object has the right name, but other arguments."""
    objects = list(json_objects(written))
    for number, call in enumerate(twin.message.get("tool_calls") or []):
        name, arguments = call["function"].get("name"), call["function"].get("arguments")
        if not isinstance(arguments, dict) or not arguments or not str(name).strip():
            continue
        for held in objects:
            beside = list(held.values())
            if name not in [v for v in beside if isinstance(v, str)] or not any(
                key in json.dumps(held) for key in arguments
            ):
                continue
            if held in [v for v in values_in(arguments) if v is not arguments]:
                continue
            if not is_call(held, arguments) and not any(reads(v, arguments) for v in beside):
                yield number
                break


def reads(value: Any, arguments: Any) -> bool:
    """Return whether a value equals the arguments, or is their JSON text."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return is_same(value, arguments)


def split(twin: Twin, pieces: Sequence[str | int]) -> Iterator[int]:
    """Yield the names that begin more than one call."""
    begun: dict[int, list[str]] = {}
    for at, piece in enumerate(pieces):
        if isinstance(piece, int) and twin.leaves[piece].kind == "name":
            begun.setdefault(piece, []).append(str(pieces[at - 1])[-8:])
    for leaf, before in begun.items():
        if len(before) > 1 and before[0].strip() and len(set(before)) < len(before):
            yield leaf


def emptied(written: str, full: str) -> bool:
    """Return whether a JSON object writes empty arguments as something else than an empty object.

    Args:
        full: the same turn with arguments that are not empty.
    """
    whole = {FILLER: "zqheld"}
    items = [item for held in json_objects(full) for item in held.items()]
    if any(isinstance(value, list) and FILLER in value for _, value in items):
        return True
    keys = {key for key, value in items if reads(value, whole)}
    written_as = [held[key] for held in json_objects(written) for key in keys if key in held]
    return any(value is None or (not value and value not in ({}, "")) for value in written_as)


def is_text(twin: Twin, written: str) -> bool:
    """Return whether the arguments of a call are written as a JSON string inside JSON."""
    given = [call["function"].get("arguments") for call in twin.message.get("tool_calls") or []]
    texts = [v for held in json_objects(written) for v in held.values() if isinstance(v, str)]
    return any(
        isinstance(arguments, dict) and reads(text, arguments)
        for arguments in given
        for text in texts
        if text.startswith("{")
    )
