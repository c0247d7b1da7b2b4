"""Create the twin of a turn, which has a sentinel for each part, to find where a template puts the
parts."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from truetune.contract.shape import Message

Kind = Literal["reasoning", "content", "name", "key", "value", "arguments"]


@dataclass(frozen=True)
class Leaf:
    """A part of a turn that must reach the completion: a text, or a name or value of a call.

    Attributes:
        kind: what it is; "arguments" means all arguments of a call, if they are text and not JSON.
        value: as the row has it, without outer whitespace.
        sentinel: the text in its place in the twin.
        around: the outer whitespace that the row has before and after it.
    """

    kind: Kind
    value: Any
    sentinel: str
    around: tuple[str, str] = ("", "")

    @property
    def label(self) -> str:
        if self.kind in ("reasoning", "content"):
            return f"the {self.kind}"
        return f"{self.value!r} of a tool call"

    @cached_property
    def forms(self) -> tuple[str, ...]:
        """The ways in which templates write it."""
        if not isinstance(self.value, str):
            return tuple(dict.fromkeys((json.dumps(self.value), str(self.value))))
        text = self.value
        # What a server returns as text is read as it stands: nothing undoes an escape there.
        if self.kind in ("reasoning", "content", "arguments") or (
            text.isalnum() and text.isascii()
        ):
            return (text,)
        held = (f"<![CDATA[{text}]]>",) if self.kind == "value" and "]]>" not in text else ()
        return tuple(dict.fromkeys((text, *self.quoted_forms, *held)))

    @cached_property
    def quoted_forms(self) -> tuple[str, ...]:
        """The ways in which it is between quotes."""
        text = str(self.value)
        return tuple(dict.fromkeys((text, *in_json_forms(text), repr(text)[1:-1])))


def in_json_forms(text: str) -> list[str]:
    """A text between the quotes of JSON, and of JSON inside JSON."""
    once = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return [*once, *(json.dumps(form, ensure_ascii=False)[1:-1] for form in once)]


# How the parts of a call belong together: a leaf; a mapping's items, in any order; a list in its
# own; a name or key with what belongs to it; a value that no sentinel can stand for.
Node: TypeAlias = Any
# Small values that are turned one at a time: each asks the template once more.
MOST_FLIPS = 24


@dataclass(frozen=True)
class Small:
    """A true, false, null or zero of a call: no sentinel can stand for it.

    Attributes:
        number: among those of the turn.
    """

    value: Any
    number: int

    @property
    def turned(self) -> Any:
        """Another one in its place."""
        if isinstance(self.value, bool | None):
            return not self.value
        return type(self.value)(1)

    @cached_property
    def pairs(self) -> dict[str, str]:
        """How it is written, and its other in the same way."""
        ways = (json.dumps, str)
        return {way(self.value): way(self.turned) for way in ways}


@dataclass(frozen=True)
class Twin:
    """A message whose parts are sentinels.

    Attributes:
        message: the same structure, outer whitespace and empty values as in the row.
        flips: the same with one true, false, null or zero turned, for each of them; beyond
            `MOST_FLIPS` the last has all the others turned.
        filled: for each blank text, empty mapping and empty list of a call: what it is, the
            message in which it holds something, and the key that it belongs to.
        leaves: in the row's order.
        calls: a node for each call.
    """

    message: Message
    flips: tuple[Message, ...]
    filled: tuple[tuple[str, Message, str], ...]
    leaves: tuple[Leaf, ...]
    calls: tuple[Node, ...]

    @cached_property
    def keys(self) -> tuple[str, str]:
        """Its structure: without the identifiers of calls, which few templates write, and with
        them."""
        calls = self.message.get("tool_calls") or []
        bare = [{k: v for k, v in call.items() if k != "id"} for call in calls]
        without = {**self.message, "tool_calls": bare}
        return json.dumps(without, default=repr), json.dumps(self.message, default=repr)

    def key_for(self, written: str) -> str:
        """The structure that texts are kept under of which one reads `written`."""
        ids = [str(call["id"]) for call in self.message.get("tool_calls") or [] if call.get("id")]
        return self.keys[any(i in written for i in ids)]

    @cached_property
    def names(self) -> re.Pattern[str] | None:
        """The names and keys of calls that have no sentinel; None if all have one."""
        fixed = []
        for _, name, held in self.calls:
            keys = [node[1] for node in held[1]] if held[0] == "map" else []
            fixed += [node[1] for node in (name, *keys) if node[0] == "fixed" and node[1].strip()]
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, fixed))})\b") if fixed else None

    @property
    def variants(self) -> list[Message]:
        """All messages whose texts a skeleton is read off: its own, then turned, then filled."""
        return [self.message, *self.flips, *(message for _, message, _ in self.filled)]


class _Maker:
    """Builds one twin.

    Args:
        marks: texts inside reasoning and content that templates cut at; they stay.
        named: whether names and keys stay as they are: a template may look them up.
    """

    def __init__(self, marks: Sequence[str], named: bool) -> None:
        self.leaves: list[Leaf] = []
        self.named = named
        self.num_small = 0
        longest = sorted(filter(None, marks), key=len, reverse=True)
        self.marks = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if longest else None

    def text(self, kind: Kind, text: str) -> str:
        pieces = self.marks.split(text) if self.marks else [text]
        return "".join(
            piece if number % 2 else self.leaf(kind, piece) for number, piece in enumerate(pieces)
        )

    def leaf(self, kind: Kind, text: str, rank: int = 0) -> str:
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        around = text[:at], text[at + len(core) :]
        sentinel = f"zq{rank:05d}y{len(self.leaves)}xz"
        self.leaves.append(Leaf(kind, core, sentinel, around))
        return sentinel.join(around)

    def fixed(self, kind: Kind, text: str, rank: int = 0) -> tuple[str, Node]:
        """A name or key."""
        if self.named or not text.strip():
            return text, ("fixed", text)
        return self.leaf(kind, text, rank), ("leaf", len(self.leaves) - 1)

    def value(self, value: Any) -> tuple[Any, Node]:
        """(sentinels in its structure, how they belong together)."""
        if isinstance(value, Mapping):
            # A template may sort them: their sentinels sort alike.
            ranks = {k: n for n, k in enumerate(sorted(map(str, value), key=str.lower))}
            pairs = [self.item(str(k), inner, ranks[str(k)]) for k, inner in value.items()]
            return {key: made for key, made, _ in pairs}, ("map", [node for _, _, node in pairs])
        if isinstance(value, list | tuple):
            items = [self.value(inner) for inner in value]
            return [made for made, _ in items], ("list", [node for _, node in items])
        if isinstance(value, str) and value.strip():
            return self.leaf("value", value), ("leaf", len(self.leaves) - 1)
        if isinstance(value, bool | None) or value == 0:
            self.num_small += 1
            small = Small(value, self.num_small - 1)
            return small, ("small", small)
        if isinstance(value, int | float):
            number = int(f"73{len(self.leaves):05d}37")
            held: int | float = number if isinstance(value, int) else number + 0.5
            self.leaves.append(Leaf("value", value, str(held)))
            return held, ("leaf", len(self.leaves) - 1)
        return value, ("list", [])

    def item(self, key: str, value: Any, rank: int) -> tuple[str, Any, Node]:
        made_key, node = self.fixed("key", key, rank)
        made, inner = self.value(value)
        return made_key, made, ("item", node, inner)

    def call(self, call: Mapping[str, Any]) -> tuple[Message, Node]:
        function = call["function"]
        name, node = self.fixed("name", str(function.get("name", "")))
        given = function.get("arguments", {})
        if isinstance(given, str) and given.strip():
            made: Any = self.leaf("arguments", given)
            inner: Node = ("leaf", len(self.leaves) - 1)
        else:
            made, inner = self.value(given)
        changed = {**function, "name": name}
        if "arguments" in function:
            changed["arguments"] = made
        return {**call, "function": changed}, ("item", node, inner)


def _small(value: Any, turned: Container[int]) -> Any:
    """A structure with its small values in it, those of some numbers turned."""
    if isinstance(value, Small):
        return value.turned if value.number in turned else value.value
    if isinstance(value, Mapping):
        return {key: _small(inner, turned) for key, inner in value.items()}
    if isinstance(value, list):
        return [_small(inner, turned) for inner in value]
    return value


def twin_of(message: Mapping[str, Any], marks: Iterable[str], *, named: bool = False) -> Twin:
    """The twin of an assistant message in its one form."""
    maker = _Maker(tuple(dict.fromkeys(marks)), named)
    made = dict(message)
    if made.get("reasoning_content"):
        made["reasoning_content"] = maker.text("reasoning", str(made["reasoning_content"]))
    made["content"] = maker.text("content", str(made.get("content") or ""))
    calls = [maker.call(call) for call in made.get("tool_calls") or []]
    flips: list[Message] = []
    filled: list[tuple[str, Message, str]] = []
    if calls:
        held = [call for call, _ in calls]
        made["tool_calls"] = _small(held, ())
        for n in range(min(maker.num_small, MOST_FLIPS)):
            numbers = range(n, maker.num_small if n == MOST_FLIPS - 1 else n + 1)
            flips.append({**made, "tool_calls": _small(held, numbers)})
        for number, call in enumerate(made["tool_calls"]):
            for what, arguments, key in _filled(call["function"].get("arguments")):
                function = {**call["function"], "arguments": arguments}
                others = list(made["tool_calls"])
                others[number] = {**call, "function": function}
                filled.append((what, {**made, "tool_calls": others}, key))
    nodes = tuple(node for _, node in calls)
    return Twin(made, tuple(flips), tuple(filled), tuple(maker.leaves), nodes)


FILLER = "zqfilled"


def _filled(value: Any, key: str = "") -> Iterator[tuple[str, Any, str]]:
    """A value with one of the empty ones in it filled, for each of them in turn; and its key."""
    if isinstance(value, str) and not value.strip():
        yield repr(value), f"{value}{FILLER}", key
    elif value in ({}, []) and isinstance(value, Mapping | list):
        full: Any = {FILLER: "zqheld"} if isinstance(value, Mapping) else [FILLER]
        yield repr(value), full, key
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            for what, full, own in _filled(inner, str(name)):
                yield what, {**value, name: full}, own
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            for what, full, own in _filled(inner, key):
                yield what, [*value[:at], full, *value[at + 1 :]], own


def argument_values(message: Message) -> list[tuple[Any, str]]:
    """The values of the arguments of a turn's calls, each with its text."""
    given = [call["function"].get("arguments") for call in message.get("tool_calls") or []]
    values = [value for one in given if isinstance(one, Mapping) for value in one.values()]
    return [(value, json.dumps(value)) for value in values]
