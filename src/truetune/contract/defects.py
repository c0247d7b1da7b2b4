"""Find errors in how a template writes tool calls, by means of a twin of the turn."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from truetune.contract.held import (
    CALL_KEYS,
    between_tags,
    is_same,
    is_written,
    json_objects,
    values_in,
)
from truetune.contract.twin import FILLER, Leaf, Twin, argument_values, in_json_forms
from truetune.contract.words import PART, hollow

Missing: TypeAlias = Literal["missing", "repeated", "order", "behind"]
Changed: TypeAlias = Literal[
    "quoted", "text", "glued", "filled", "listed", "unreadable", "stripped"
]
Wrong: TypeAlias = Missing | Changed | Literal["added", "called", "moved", "whole"]


@dataclass(frozen=True)
class Defect:
    """A template's error in a turn; `leaf` is the index of the part, None for the whole turn."""

    what: Wrong
    leaf: int | None = None
    text: str = ""


def in_objects(twin: Twin, written: str, filled: Sequence[str | None]) -> Iterator[bool]:
    """Yield for each call whether its arguments are written as one JSON object."""
    objects = list(json_objects(written))
    full = [held for text in filled for held in json_objects(text or "")]
    for call in twin.message.get("tool_calls") or []:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, Mapping):
            yield False
        elif not arguments:
            yield any(FILLER in held for held in full)
        else:
            inside = [v for v in values_in(arguments) if v is not arguments]
            yield any(arguments.keys() & held.keys() and held not in inside for held in objects)


def stripped(leaf: Leaf, pieces: Sequence[str | int], at: int) -> bool:
    """Return whether a value has lost the outer whitespace that it has in the row."""
    before, behind = (
        tuple({own, repr(own)[1:-1], *in_json_forms(own)}) if own else ("",) for own in leaf.around
    )
    last, first = str(pieces[at - 1]), str(pieces[at + 1])
    return not (last.endswith(before) and first.startswith(behind))


def misread(twin: Twin, written: str) -> list[int]:
    """Return the parts of argument values between tags that do not hold a value of the row."""
    return [
        n
        for value, whole in argument_values(twin.message)
        for n, leaf in enumerate(twin.leaves)
        if leaf.sentinel in whole and is_misread(twin, written, leaf.sentinel, value, whole)
    ]


# A tag that says whether its value is text.
_TYPED = re.compile(
    r"<[^<>]*\b(?:string\s*=\s*\"(true|false)\"|type\s*=\s*\"(\w+)\")[^<>]*>[^<>]*$"
)


def is_typed(before: str, text: str, value: Any) -> bool | None:
    """Return whether a tag that states its type states it correctly, and holds the value as text
    or as JSON; None if the tag before the value states no type."""
    found = _TYPED.search(before)
    if found is None:
        return None
    if found[1] == "true" or found[2] in ("str", "string"):
        return isinstance(value, str) and text == value
    if isinstance(value, str):
        return False
    try:
        return is_same(json.loads(text), value)
    except (ValueError, RecursionError):
        return False


def without_section(before: str) -> str:
    """Return a text without the CDATA section that is still open at its end."""
    start = before.rfind("<![CDATA[")
    return before[:start] if start >= 0 and "]]>" not in before[start:] else before


def is_misread(twin: Twin, written: str, sentinel: str, value: Any, whole: str) -> bool:
    """Return whether the text between the tags around a sentinel is neither its value nor a value
    inside that one."""
    at = written.find(sentinel)
    text = between_tags(written, at, at + len(sentinel)) if at >= 0 else None
    if text is None or (twin.names and twin.names.search(text)):
        return False
    if any(leaf.sentinel in text and leaf.sentinel not in whole for leaf in twin.leaves):
        return False
    before = without_section(written[:at])
    typed = is_typed(before, text, value)
    if typed is not None:
        return not typed
    if any(_is_tagged(before, key) for key in _keys_of(twin, value)):
        return not is_written(text, value)
    return not any(is_written(text, inner) for inner in values_in(value))


def is_lost(written: str, full: str, key: str, value: Any) -> bool:
    """Return whether the tag of an argument whose value is {} or [] holds something else.

    Args:
        full: the same turn with a value that is not empty.
        key: the name of the argument.
    """
    at = full.find(FILLER)
    held = between_tags(full, at, at + len(FILLER)) if at >= 0 else None
    whole = {FILLER: "zqheld"} if value == {} else [FILLER]
    if not key.strip() or held is None or not is_written(held, whole):
        return False
    if not _is_tagged(full[:at], key):
        return False
    start = full.rfind(">", 0, at) + 1
    inside = between_tags(written, start, start)
    return inside is None or not is_written(inside, value)


def _keys_of(twin: Twin, value: Any) -> list[str]:
    """Return the names of the arguments with this value, in the twin or one of its variants."""
    given = [call["function"].get("arguments") for m in twin.variants for call in m["tool_calls"]]
    return [
        str(key)
        for one in given
        if isinstance(one, Mapping)
        for key, held in one.items()
        if str(key).strip() and is_same(held, value)
    ]


def _is_tagged(before: str, key: str) -> bool:
    """Return whether the tag that is open at the end of a text belongs to an argument."""
    name = rf"(?<!\w){re.escape(key)}(?!\w)"
    return bool(re.search(rf"{name}[^<>]*>[^<>]*$|{name}\s*</[^<>]*>\s*<[^<>]*>[^<>]*$", before))


def empties_of(
    twin: Twin, written: str, filled: Sequence[str | None], controls: re.Pattern[str] | None
) -> dict[str, int] | None:
    """Return, for each empty pair, how many of the filled texts have fewer of them (see
    `Skeleton.empties`)."""
    if None in filled:
        return None
    empty, *full = (
        hollow(
            "".join(p if isinstance(p, str) else PART for p in pieces_of(twin, str(text))), controls
        )
        for text in (written, *filled)
    )
    return {pair: sum(some[pair] < count for some in full) for pair, count in empty.items()}


# Keys without tags: key=value and key:value after a bracket or comma.
_BARE_KEYS = {"=": re.compile(r"[,(]\s*(\w+)\s*="), ":": re.compile(r"[,{]\s*(\w+)\s*:")}
# An argument without a key, before one with a key.
_POSITIONAL = re.compile(r"\(([^()=,\s]+)\s*,[^()=]*$|,\s*([^=,()\[\]{}\"'\s]+)\s*,\s*$")


def added(twin: Twin, written: str, pieces: Sequence[str | int]) -> list[str]:
    """Return the keys of arguments that the template adds to calls."""
    keys = {leaf.sentinel for leaf in twin.leaves if leaf.kind == "key"} | {""}
    found: list[str] = []
    for held in json_objects(written):
        if keys & set(held):
            found += [key for key in held if key not in keys | CALL_KEYS]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    for before, piece, behind in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if not isinstance(piece, int) or twin.leaves[piece].kind != "key":
            continue
        before, behind = str(before), str(behind)
        if behind[:1] == "=" and (alone := _POSITIONAL.search(before)):
            found.append(alone[1] or alone[2])
        tag = re.search(r"<[^<>]*[^\W\d_][^<>]*>?$", before)
        close = re.match(r"[^<>\w]*>|[\"'](?=[^<>]*>)|</[^<>]+>", behind)
        if tag and close:
            same = re.escape(tag.group()) + r"([^<>\"'\n]+)" + re.escape(close.group())
            found += [key for text in texts for key in re.findall(same, text)]
        elif before[-1:] in ("(", "{", ",", " ") and behind[:1] in _BARE_KEYS:
            bare = _BARE_KEYS[behind[:1]]
            found += [key for text in texts for key in bare.findall(text)]
    return list(dict.fromkeys(found))


# The text that a format writes before the name of a call: a key, a tag, a marker, a namespace.
_NAMED = re.compile(r"(?:\\*[\"']\w+\\*[\"']\s*:\s*\\*[\"']|<[^<>]*>?|\[/?[A-Z_]+\]|\w+=\w+\.)$")


def called(twin: Twin, pieces: Sequence[str | int]) -> list[str]:
    """Return the texts that begin a call which the turn does not have."""
    names = [
        before[0]
        for piece, held in itertools.pairwise(pieces)
        if isinstance(held, int)
        and twin.leaves[held].kind == "name"
        and (before := _NAMED.search(str(piece)))
    ]
    whole = PART.join(piece for piece in pieces if isinstance(piece, str))
    return [text for text in dict.fromkeys(names) if whole.count(text) > names.count(text)]


def unreadable(twin: Twin, written: str, pieces: Sequence[str | int]) -> list[int]:
    """Return the names and keys that are written like JSON in text that is not valid JSON."""
    found: set[str] = set()
    for held in json_objects(written):
        found |= {str(text) for text in (*held, *held.values()) if isinstance(text, str)}
    bad = []
    for before, piece, behind in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if not isinstance(piece, int) or twin.leaves[piece].sentinel in found:
            continue
        kind, behind = twin.leaves[piece].kind, str(behind)
        # No notation of values has an escaped single quote.
        if (kind == "key" and re.match(r"\\*\"\s*:|\\+'\s*:", behind)) or (
            kind == "name"
            and re.search(r"(\\*[\"'])\w+\1\s*:\s*(?:\\*[\"'])?$", str(before))
            and re.match(r"\\*[\"']|\s*[,}]", behind)
        ):
            bad.append(piece)
    return bad


def pieces_of(twin: Twin, written: str) -> list[str | int]:
    number = {leaf.sentinel: n for n, leaf in enumerate(twin.leaves)}
    if not number:
        return [written]
    pattern = re.compile("(" + "|".join(map(re.escape, number)) + ")")
    return [number[p] if i % 2 else p for i, p in enumerate(pattern.split(written))]
