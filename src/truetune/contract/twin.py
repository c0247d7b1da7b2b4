"""A turn with a sentinel for each of its parts: where a template puts them, once and in order."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from truetune.contract.held import between_tags, is_same, is_written, values_in
from truetune.contract.shape import Message
from truetune.contract.words import PART, hollow

Kind = Literal["reasoning", "content", "name", "key", "value"]
Missing: TypeAlias = Literal["missing", "repeated", "order", "behind"]
Changed: TypeAlias = Literal["quoted", "glued", "filled", "listed", "unreadable", "stripped"]
Wrong: TypeAlias = Missing | Changed | Literal["added", "called"]


@dataclass(frozen=True)
class Leaf:
    """A part of a turn that must reach the completion: a text, or a name or value of a call.

    Attributes:
        kind: what it is.
        value: as the row has it, without outer whitespace.
        sentinel: what stands for it in the twin.
        around: the outer whitespace that the row has before and behind it.
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
        if self.kind in ("reasoning", "content") or (text.isalnum() and text.isascii()):
            return (text,)
        held = (f"<![CDATA[{text}]]>",) if self.kind == "value" and "]]>" not in text else ()
        return tuple(dict.fromkeys((text, *self.quoted_forms, *held)))

    @cached_property
    def quoted_forms(self) -> tuple[str, ...]:
        """The ways in which it stands between quotes."""
        text = str(self.value)
        return tuple(dict.fromkeys((text, *_in_json(text), repr(text)[1:-1])))


def _in_json(text: str) -> list[str]:
    """A text between the quotes of JSON, and of JSON inside JSON."""
    once = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return [*once, *(json.dumps(form, ensure_ascii=False)[1:-1] for form in once)]


# How the parts of a call belong together: a leaf; a mapping's items, in any order; a list in its
# own; a name or key with what belongs to it; a value that no sentinel can stand for.
Small: TypeAlias = tuple[Literal["small"], tuple[str, ...]]
Node: TypeAlias = Any


@dataclass(frozen=True)
class Twin:
    """A message whose parts are sentinels.

    Attributes:
        message: the same structure, outer whitespace and empty values as in the row.
        flipped: the same with every true, false, null and zero turned; None where there is none.
        filled: for each blank text, empty mapping and empty list of a call: what it is, the
            message in which it holds something, and the key that it belongs to.
        leaves: in the row's order.
        calls: a node for each call.
    """

    message: Message
    flipped: Message | None
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
        """The names and keys of calls that have no sentinel; None where all have one."""
        fixed = []
        for _, name, held in self.calls:
            keys = [node[1] for node in held[1]] if held[0] == "map" else []
            fixed += [node[1] for node in (name, *keys) if node[0] == "fixed" and node[1].strip()]
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, fixed))})\b") if fixed else None

    @property
    def variants(self) -> list[Message]:
        """All messages whose texts a skeleton is read off: its own, flipped, filled."""
        flipped = [self.flipped] if self.flipped else []
        return [self.message, *flipped, *(message for _, message, _ in self.filled)]


class _Maker:
    """Builds one twin.

    Args:
        marks: texts inside reasoning and content that templates cut at; they stay.
        named: whether names and keys stay as they are: a template may look them up.
    """

    def __init__(self, marks: Sequence[str], named: bool) -> None:
        self.leaves: list[Leaf] = []
        self.named = named
        self.has_small = False
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

    def value(self, value: Any, flip: bool) -> tuple[Any, Any, Node]:
        """(sentinels, the same with small values turned, how they belong together)."""
        if isinstance(value, Mapping):
            # A template may sort them: their sentinels sort alike.
            ranks = {k: n for n, k in enumerate(sorted(map(str, value), key=str.lower))}
            pairs = [self.item(str(k), inner, ranks[str(k)]) for k, inner in value.items()]
            nodes = [node for _, _, _, node in pairs]
            made = {key: inner for key, inner, _, _ in pairs}
            return made, {key: turned for key, _, turned, _ in pairs}, ("map", nodes)
        if isinstance(value, list | tuple):
            items = [self.value(inner, flip) for inner in value]
            made_list = [made for made, _, _ in items]
            return made_list, [turned for _, turned, _ in items], ("list", [n for _, _, n in items])
        if isinstance(value, str) and value.strip():
            made_text = self.leaf("value", value)
            return made_text, made_text, ("leaf", len(self.leaves) - 1)
        if isinstance(value, bool | None) or value == 0:
            self.has_small = True
            turned: Any = value is None or not value
            turned = int(turned) if value == 0 and not isinstance(value, bool) else turned
            return value, turned, ("small", Leaf("value", value, "").forms, value)
        if isinstance(value, int | float):
            number = int(f"73{len(self.leaves):05d}37")
            held: int | float = number if isinstance(value, int) else number + 0.5
            self.leaves.append(Leaf("value", value, str(held)))
            return held, held, ("leaf", len(self.leaves) - 1)
        return value, value, ("list", [])

    def item(self, key: str, value: Any, rank: int) -> tuple[str, Any, Any, Node]:
        made_key, node = self.fixed("key", key, rank)
        made, turned, inner = self.value(value, False)
        return made_key, made, turned, ("item", node, inner)

    def call(self, call: Mapping[str, Any]) -> tuple[Message, Message, Node]:
        function = call["function"]
        name, node = self.fixed("name", str(function.get("name", "")))
        made, turned, inner = self.value(function.get("arguments", {}), False)
        both = []
        for arguments in (made, turned):
            changed = {**function, "name": name}
            if "arguments" in function:
                changed["arguments"] = arguments
            both.append({**call, "function": changed})
        return both[0], both[1], ("item", node, inner)


def twin_of(message: Mapping[str, Any], marks: Iterable[str], *, named: bool = False) -> Twin:
    """The twin of an assistant message in its one form."""
    maker = _Maker(tuple(dict.fromkeys(marks)), named)
    made = dict(message)
    if made.get("reasoning_content"):
        made["reasoning_content"] = maker.text("reasoning", str(made["reasoning_content"]))
    made["content"] = maker.text("content", str(made.get("content") or ""))
    calls = [maker.call(call) for call in made.get("tool_calls") or []]
    flipped = None
    filled: list[tuple[str, Message, str]] = []
    if calls:
        made["tool_calls"] = [call for call, _, _ in calls]
        if maker.has_small:
            flipped = {**made, "tool_calls": [turned for _, turned, _ in calls]}
        for number, call in enumerate(made["tool_calls"]):
            for what, arguments, key in _filled(call["function"].get("arguments")):
                function = {**call["function"], "arguments": arguments}
                others = list(made["tool_calls"])
                others[number] = {**call, "function": function}
                filled.append((what, {**made, "tool_calls": others}, key))
    nodes = tuple(node for _, _, node in calls)
    return Twin(made, flipped, tuple(filled), tuple(maker.leaves), nodes)


_FILLER = "zqfilled"


def _filled(value: Any, key: str = "") -> Iterator[tuple[str, Any, str]]:
    """A value with one of the empty ones in it filled, for each of them in turn; and its key."""
    if isinstance(value, str) and not value.strip():
        yield repr(value), f"{value}{_FILLER}", key
    elif value in ({}, []) and isinstance(value, Mapping | list):
        full: Any = {_FILLER: "zqheld"} if isinstance(value, Mapping) else [_FILLER]
        yield repr(value), full, key
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            for what, full, own in _filled(inner, str(name)):
                yield what, {**value, name: full}, own
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            for what, full, own in _filled(inner, key):
                yield what, [*value[:at], full, *value[at + 1 :]], own


def _values(message: Message) -> list[tuple[Any, str]]:
    """The values of the arguments of a turn's calls, each with its text."""
    given = [call["function"].get("arguments") for call in message.get("tool_calls") or []]
    values = [value for one in given if isinstance(one, Mapping) for value in one.values()]
    return [(value, json.dumps(value)) for value in values]


@dataclass(frozen=True)
class Defect:
    """What a template does wrong to a turn: `leaf` is its part, None for the whole."""

    what: Wrong
    leaf: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the parts of a turn.

    Attributes:
        pieces: texts, and between them the numbers of leaves; a text is first and last.
        defects: parts that it leaves out, repeats or puts elsewhere.
        reordered: whether arguments stand in another order than in the row.
        reach: (piece, offset) where the last part ends that has no sentinel.
        empties: of brackets and pairs of markers with nothing between them, how many stand for an
            empty value of the row; None where that cannot be asked.
        in_json: of each call, whether its arguments are written as one JSON object.
    """

    pieces: tuple[str | int, ...]
    defects: tuple[Defect, ...]
    reordered: bool
    reach: tuple[int, int] = (0, 0)
    empties: Mapping[str, int] | None = None
    in_json: tuple[bool, ...] = ()

    def spans(self, written: str, leaves: Sequence[Leaf]) -> list[tuple[int, int, int]] | None:
        """(leaf, start, end) of each part in a text that is this skeleton, filled; else None."""
        return _spans(self.pieces, written, leaves, 0, 0)

    def reached(self, spans: Sequence[tuple[int, int, int]]) -> int:
        """Where the last part ends that has no sentinel, in a text with these spans."""
        piece, offset = self.reach
        before = sum(isinstance(p, int) for p in self.pieces[:piece])
        return offset + (spans[before - 1][2] if before else 0)

    @property
    def tail(self) -> str:
        return str(self.pieces[-1])

    def frame(self, tail: str, leaves: Sequence[Leaf]) -> str:
        """The text around the parts, a null character for each of them; without their outer
        whitespace, which is the row's, of a value as JSON writes it."""
        pieces = [*self.pieces[:-1], tail]
        for at, piece in enumerate(pieces):
            if isinstance(piece, int):
                before, behind = leaves[piece].around
                last, first = str(pieces[at - 1]), str(pieces[at + 1])
                if before:
                    in_json = leaves[piece].kind == "value"
                    last = _ESCAPED_END.sub("", last) if in_json else last.removesuffix(before)
                if behind:
                    in_json = leaves[piece].kind == "value"
                    first = _ESCAPED_START.sub("", first) if in_json else first.removeprefix(behind)
                pieces[at - 1], pieces[at + 1] = last, first
        return "".join(p if isinstance(p, str) else PART for p in pieces)


# Outer whitespace of a value, as JSON writes it.
_ESCAPED = r"(?:\\+(?:[nrtf]|u[0-9a-fA-F]{4}))+"
_QUOTE = re.compile(rf"[\"'](?:\s|{_ESCAPED})*$")
_ESCAPED_START, _ESCAPED_END = re.compile(f"^{_ESCAPED}"), re.compile(f"{_ESCAPED}$")


def _spans(
    pieces: Sequence[str | int], text: str, leaves: Sequence[Leaf], number: int, at: int
) -> list[tuple[int, int, int]] | None:
    found: list[tuple[int, int, int]] = []
    while number < len(pieces):
        piece = pieces[number]
        last = number == len(pieces) - 1
        if isinstance(piece, str):
            if last:
                return found
            if not text.startswith(piece, at):
                return None
            at += len(piece)
            number += 1
            continue
        leaf = leaves[piece]
        ways = [form for form in leaf.forms if text.startswith(form, at)]
        if isinstance(leaf.value, str) and not _QUOTE.search(text[max(at - 40, 0) : at]):
            # Escapes are undone between quotes alone.
            ways = [form for form in ways if form == leaf.value or form not in leaf.quoted_forms]
        if len(ways) == 1:
            found.append((piece, at, at + len(ways[0])))
            at += len(ways[0])
            number += 1
            continue
        # One form may begin like another: what follows decides.
        for form in ways:
            rest = _spans(pieces, text, leaves, number + 1, at + len(form))
            if rest is not None:
                return [*found, (piece, at, at + len(form)), *rest]
        return None
    return found


def skeleton(
    twin: Twin, texts: Sequence[str | None], controls: re.Pattern[str] | None = None
) -> Skeleton:
    """Read a skeleton off the twin's texts.

    Args:
        texts: what follows the served prompt, for each of the twin's variants; None where the
            template takes no such message. The first one is there.
        controls: the tokenizer's control tokens: no sign in one of them belongs to a part.
    """
    written, *others = texts
    assert written is not None
    flipped = others.pop(0) if twin.flipped else None
    pieces = _pieces(twin, written)
    places: dict[int, list[int]] = {}
    for position, piece in enumerate(pieces):
        if isinstance(piece, int):
            places.setdefault(piece, []).append(position)
    defects = [Defect("missing", n) for n in range(len(twin.leaves)) if n not in places]
    defects += [
        Defect("repeated", n)
        for n, found in places.items()
        if len(found) > 1 and twin.leaves[n].kind not in ("name", "key")
    ]
    defects += [
        Defect("quoted", n)
        for n, found in places.items()
        if isinstance(twin.leaves[n].value, int | float)
        and any(_quoted(str(pieces[at - 1]), str(pieces[at + 1])) for at in found)
    ]
    defects += [
        Defect("glued", n)
        for n, found in places.items()
        if all(
            glued(
                twin.leaves[n],
                _bare(pieces[at - 1], controls),
                _bare(pieces[at + 1], controls),
                quoted=isinstance(twin.leaves[n].value, str) or _in_quotes(pieces, at),
            )
            for at in found
        )
    ]
    defects += [
        Defect("stripped", n)
        for n, found in places.items()
        if twin.leaves[n].kind == "value" and _stripped(twin.leaves[n], pieces, found[0])
    ]
    misread = _misread(twin, _bare(written, controls))
    defects += [Defect("glued", n) for n in misread if Defect("glued", n) not in defects]
    defects += [
        Defect("listed", n)
        for n, found in places.items()
        if twin.leaves[n].kind == "key"
        and all(_listed(str(pieces[at - 1]), str(pieces[at + 1])) for at in found)
    ]
    for (what, message, key), full in zip(twin.filled, others, strict=True):
        if full is None:
            continue
        # An argument that is there only where it holds something is lost where it does not.
        filler = _FILLER + "zqheld" * (what == "{}")
        if key.strip() and full.count(key) - filler.count(key) > written.count(key):
            defects.append(Defect("missing", None, repr(key)))
            continue
        marked = _bare(full, controls)
        if not _is_cut_from(written, full) or any(
            _is_misread(twin, marked, "zqfilled", value, whole)
            for value, whole in _values(message)
            if "zqfilled" in whole
        ):
            defects.append(Defect("filled", None, what))
        elif what == "{}" and _listed(*full.partition("zqfilled")[::2]):
            defects.append(Defect("listed", None, what))
    defects += [Defect("added", None, key) for key in _added(twin, written, pieces)]
    defects += [Defect("called", None, before) for before in _called(twin, pieces)]
    defects += [Defect("unreadable", n) for n in _unreadable(twin, written, pieces)]
    turned = None if flipped is None else _pieces(twin, flipped)
    reader = _Reader(twin, pieces, places, turned, controls)
    if not defects:
        defects = reader.order()
    empties = _empties(twin, written, others, controls)
    in_json = tuple(_in_objects(twin, written, others))
    return Skeleton(tuple(pieces), tuple(defects), reader.reordered, reader.reach, empties, in_json)


def _in_objects(twin: Twin, written: str, filled: Sequence[str | None]) -> Iterator[bool]:
    """Whether the arguments of each call are written as one JSON object."""
    objects = list(json_objects(written))
    full = [held for text in filled for held in json_objects(text or "")]
    for call in twin.message.get("tool_calls") or []:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, Mapping):
            yield False
        elif not arguments:
            yield any(_FILLER in held for held in full)
        else:
            inside = [v for v in values_in(arguments) if v is not arguments]
            yield any(arguments.keys() & held.keys() and held not in inside for held in objects)


def _stripped(leaf: Leaf, pieces: Sequence[str | int], at: int) -> bool:
    """Whether a value stands there without the outer whitespace that the row has."""
    before, behind = (
        tuple({own, repr(own)[1:-1], *_in_json(own)}) if own else ("",) for own in leaf.around
    )
    last, first = str(pieces[at - 1]), str(pieces[at + 1])
    return not (last.endswith(before) and first.startswith(behind))


def _misread(twin: Twin, written: str) -> list[int]:
    """Parts of an argument's value that stand between tags, where that is no value of the row."""
    return [
        n
        for value, whole in _values(twin.message)
        for n, leaf in enumerate(twin.leaves)
        if leaf.sentinel in whole and _is_misread(twin, written, leaf.sentinel, value, whole)
    ]


def _is_misread(twin: Twin, written: str, sentinel: str, value: Any, whole: str) -> bool:
    """Whether what stands between tags around a sentinel is neither its value nor one inside."""
    at = written.find(sentinel)
    text = between_tags(written, at, at + len(sentinel)) if at >= 0 else None
    if text is None or (twin.names and twin.names.search(text)):
        return False
    if any(leaf.sentinel in text and leaf.sentinel not in whole for leaf in twin.leaves):
        return False
    if any(_is_tagged(written[:at], key) for key in _keys_of(twin, value)):
        return not is_written(text, value)
    return not any(is_written(text, inner) for inner in values_in(value))


def _keys_of(twin: Twin, value: Any) -> list[str]:
    """The arguments with such a value, in a twin or one of its variants."""
    given = [call["function"].get("arguments") for m in twin.variants for call in m["tool_calls"]]
    return [
        str(key)
        for one in given
        if isinstance(one, Mapping)
        for key, held in one.items()
        if str(key).strip() and is_same(held, value)
    ]


def _is_tagged(before: str, key: str) -> bool:
    """Whether the tag that is open at the end of a text is the one of an argument."""
    name = rf"(?<!\w){re.escape(key)}(?!\w)"
    return bool(re.search(rf"{name}[^<>]*>[^<>]*$|{name}\s*</[^<>]*>\s*<[^<>]*>[^<>]*$", before))


def _empties(
    twin: Twin, written: str, filled: Sequence[str | None], controls: re.Pattern[str] | None
) -> dict[str, int] | None:
    """See `Skeleton.empties`: those that are gone where the value holds something."""
    if None in filled:
        return None
    empty, *full = (
        hollow(
            "".join(p if isinstance(p, str) else PART for p in _pieces(twin, str(text))), controls
        )
        for text in (written, *filled)
    )
    return {pair: sum(some[pair] < count for some in full) for pair, count in empty.items()}


# Keys that may stand beside those of the arguments where a format has all in one object.
_CALL_KEYS = frozenset({"name", "tool_name", "type", "id", "tool_call_id", "index"})


def is_call(held: Mapping[str, Any], arguments: Any) -> bool:
    """Whether a JSON object is the arguments of a call, or the call with its arguments beside its
    name."""
    if not isinstance(arguments, Mapping):
        return False
    bare = {k: v for k, v in held.items() if k in arguments or k not in _CALL_KEYS}
    return is_same(bare if len(bare) < len(held) and arguments else held, arguments)


# Keys without a tag around them: key=value behind a bracket or comma, and key:value.
_BARE_KEYS = {"=": re.compile(r"[,(]\s*(\w+)\s*="), ":": re.compile(r"[,{]\s*(\w+)\s*:")}


def _added(twin: Twin, written: str, pieces: Sequence[str | int]) -> list[str]:
    """Keys beside those of a call's arguments: the template adds an argument of its own."""
    keys = {leaf.sentinel for leaf in twin.leaves if leaf.kind == "key"} | {""}
    found: list[str] = []
    for held in json_objects(written):
        if keys & set(held):
            found += [key for key in held if key not in keys | _CALL_KEYS]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    for before, piece, behind in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if not isinstance(piece, int) or twin.leaves[piece].kind != "key":
            continue
        before, behind = str(before), str(behind)
        tag = re.search(r"<[^<>]*[^\W\d_][^<>]*>?$", before)
        close = re.match(r"[^<>\w]*>|</[^<>]+>", behind)
        if tag and close:
            same = re.escape(tag.group()) + r"([^<>\"\n]+)" + re.escape(close.group())
            found += [key for text in texts for key in re.findall(same, text)]
        elif before[-1:] in ("(", "{", ",", " ") and behind[:1] in _BARE_KEYS:
            bare = _BARE_KEYS[behind[:1]]
            found += [key for text in texts for key in bare.findall(text)]
    return list(dict.fromkeys(found))


# What a format writes in front of the name of a call: a key, a tag, a marker, a namespace.
_NAMED = re.compile(r"(?:\\*[\"']\w+\\*[\"']\s*:\s*\\*[\"']|<[^<>]*>?|\[/?[A-Z_]+\]|\w+=\w+\.)$")


def _called(twin: Twin, pieces: Sequence[str | int]) -> list[str]:
    """What stands before the name of a call where the turn has none: a call that nobody made."""
    names = [
        before[0]
        for piece, held in itertools.pairwise(pieces)
        if isinstance(held, int)
        and twin.leaves[held].kind == "name"
        and (before := _NAMED.search(str(piece)))
    ]
    whole = PART.join(piece for piece in pieces if isinstance(piece, str))
    return [text for text in dict.fromkeys(names) if whole.count(text) > names.count(text)]


def _unreadable(twin: Twin, written: str, pieces: Sequence[str | int]) -> list[int]:
    """Names and keys that are written as JSON has them, in a text that is none."""
    found: set[str] = set()
    for held in json_objects(written):
        found |= {str(text) for text in (*held, *held.values()) if isinstance(text, str)}
    bad = []
    for before, piece, behind in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if not isinstance(piece, int) or twin.leaves[piece].sentinel in found:
            continue
        kind, behind = twin.leaves[piece].kind, str(behind)
        if (kind == "key" and re.match(r"\\*\"\s*:", behind)) or (
            kind == "name"
            and re.search(r"\\*\"\w+\\*\"\s*:\s*\\*\"$", str(before))
            and re.match(r"\\*\"", behind)
        ):
            bad.append(piece)
    return bad


def json_objects(text: str, *, elements: bool = True) -> Iterator[dict[str, Any]]:
    """Objects that stand in a text as JSON, those inside others and inside strings too.

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


def _is_cut_from(short: str, full: str) -> bool:
    """Whether a text is another one without one stretch of it."""
    return _common(short, full) + _common(short[::-1], full[::-1]) >= len(short)


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


# A sign that belongs to no format where it stands against a part of a call.
_SIGNS = frozenset("!?.+*#$%@^~-\u2026")
# The quote that holds a part, and what stands between the two.
_OPENED = re.compile(r"[\s:,=\[({>](\\*[\"'`])([^\"'`\n]*)$")
_EXPRESSION = re.compile(r"[\[({:=/]")


def glued(leaf: Leaf, before: str, behind: str, *, quoted: bool = True) -> bool:
    """Whether something stands against a part of a call that makes another one of it: a sign or a
    digit, or anything between it and the quotes that hold it.

    Args:
        quoted: whether quotes may hold it.
    """
    if leaf.kind in ("reasoning", "content"):
        return False
    if not isinstance(leaf.value, str) and (
        re.search(r"\d$", before) or re.match(r"\d|\.\d", behind)
    ):
        return True
    opened = _OPENED.search(before) if quoted else None
    if opened:
        inside, closed, _ = behind.partition(opened[1])
        if closed and not re.search(r"[\"'`\n]", inside):
            rest = opened[2] + inside
            if leaf.kind != "value" and _EXPRESSION.search(rest):
                return False
            return not (_is_space(opened[2], leaf.around[0]) and _is_space(inside, leaf.around[1]))
    first, last = before[-1:], behind[:1]
    if leaf.kind == "value":
        return first in _SIGNS or last in _SIGNS
    # Names have a namespace in front of them, keys the dashes or dots of an option.
    plain = first == "." and (leaf.kind == "key" or re.search(r"\w\.$", before) is not None)
    signed = first in _SIGNS and not plain and not (leaf.kind == "key" and first == "-")
    return signed or last in _SIGNS


def _in_quotes(pieces: Sequence[str | int], piece: int, at: int = 0) -> bool:
    """Whether a quote is open at a place, as far as their number says."""
    before = "".join(p for p in pieces[:piece] if isinstance(p, str))
    return (before + str(pieces[piece])[:at]).count('"') % 2 == 1


def _is_space(text: str, own: str) -> bool:
    """Whether a text is nothing, or the row's own outer whitespace in one of its forms."""
    return not text or text in (own, repr(own)[1:-1], *_in_json(own))


def _bare(piece: str | int, controls: re.Pattern[str] | None) -> str:
    """A text in which a tag stands for each control token."""
    return controls.sub("<\x01>", str(piece)) if controls else str(piece)


def _listed(before: str, behind: str) -> bool:
    """Whether a key is the first of a pair in a list, and not the key of its value."""
    opened = re.search(r"[\[(]\s*(\\*[\"'])$", before)
    return opened is not None and re.match(re.escape(opened[1]) + r"\s*,", behind) is not None


def _quoted(before: str, behind: str) -> bool:
    """Whether a number, true, false or null stands between quotes, as a JSON string does."""
    quote = re.search(r"[:,\[]\s*(\\*[\"'])$", before)
    return quote is not None and behind.startswith(quote[1])


def _pieces(twin: Twin, written: str) -> list[str | int]:
    number = {leaf.sentinel: n for n, leaf in enumerate(twin.leaves)}
    if not number:
        return [written]
    pattern = re.compile("(" + "|".join(map(re.escape, number)) + ")")
    return [number[p] if i % 2 else p for i, p in enumerate(pattern.split(written))]


class _Reader:
    """Judges where the parts of a twin stand.

    Args:
        pieces: of the twin's text.
        places: leaf -> indices of its pieces.
        turned: pieces of the flipped twin's text.
        controls: see `skeleton`.
    """

    def __init__(
        self,
        twin: Twin,
        pieces: list[str | int],
        places: dict[int, list[int]],
        turned: list[str | int] | None,
        controls: re.Pattern[str] | None,
    ) -> None:
        self.twin, self.pieces, self.places, self.turned = twin, pieces, places, turned
        self.controls = controls
        self.reach = (0, 0)
        self.reordered = False
        self.defects: list[Defect] = []
        # Where small values and fixed names may still be found: (piece, offset).
        self.at = (0, 0)

    def order(self) -> list[Defect]:
        kinds = [leaf.kind for leaf in self.twin.leaves]
        before = -1
        for n, kind in enumerate(kinds):
            if kind not in ("reasoning", "content"):
                continue
            if self.places[n][0] < before:
                self.defects.append(Defect("order", n))
            before = self.places[n][0]
        thought = [self.places[n][-1] for n, kind in enumerate(kinds) if kind == "reasoning"]
        if thought and any(
            self.places[n][0] < max(thought) for n, kind in enumerate(kinds) if kind != "reasoning"
        ):
            self.defects.append(Defect("order", kinds.index("reasoning")))
        said = [n for n, kind in enumerate(kinds) if kind == "content"]
        end = -1
        for node in self.twin.calls:
            low, high = self.region(node)
            if low is not None and high is not None:
                if low < end:
                    self.defects.append(Defect("order", self.first(node)))
                self.defects += [Defect("behind", n) for n in said if self.places[n][-1] > low]
                end = max(end, high)
        return self.defects

    def first(self, node: Node) -> int | None:
        if node[0] == "leaf":
            return int(node[1])
        if node[0] in ("map", "list"):
            return next((n for inner in node[1] if (n := self.first(inner)) is not None), None)
        if node[0] == "item":
            key = self.first(node[1])
            return key if key is not None else self.first(node[2])
        return None

    def region(self, node: Node) -> tuple[int | None, int | None]:
        """(first, last) piece of what belongs together."""
        kind = node[0]
        if kind == "leaf":
            place = self.places[node[1]][0]
            self.at = (place + 1, 0)
            return place, place
        if kind in ("small", "fixed"):
            self.literal(node)
            return None, None
        if kind == "item":
            key = node[1]
            if key[0] == "leaf":
                # What belongs to a key stands behind it, wherever the key stands.
                place = self.places[key[1]][0]
                self.at = (place + 1, 0)
                low, high = self.region(node[2])
                if low is None or high is None:
                    return place, place
                if low < place and self.twin.leaves[key[1]].kind == "key":
                    self.defects.append(Defect("order", key[1]))
                return min(place, low), max(place, high)
            self.literal(key)
            return self.region(node[2])
        regions = [(inner, *self.region(inner)) for inner in node[1]]
        spans = [(low, high) for _, low, high in regions if low is not None and high is not None]
        if kind == "list" and spans != sorted(spans):
            self.defects.append(Defect("order", self.first(node)))
        self.reordered |= spans != sorted(spans)
        ordered = sorted(spans)
        if any(a[1] >= b[0] for a, b in itertools.pairwise(ordered)):
            self.defects.append(Defect("order", self.first(node)))
        if not spans:
            return None, None
        return ordered[0][0], max(high for _, high in ordered)

    def literal(self, node: Node) -> None:
        """Find a value or name that is no sentinel in the text behind what was found last."""
        piece, offset = self.at
        small = node[0] == "small"
        value = node[2] if small else node[1]
        leaf = Leaf("value" if small else "name", value, "")
        what: Literal["missing", "glued"] = "missing"
        while piece < len(self.pieces):
            text = self.pieces[piece]
            if isinstance(text, str) and (not small or self.changes(piece)):
                for form in sorted(leaf.forms, key=len, reverse=True):
                    at = text.find(form, offset)
                    while at >= 0:
                        before, behind = text[:at], text[at + len(form) :]
                        if small and not self.turns(piece, at, at + len(form)):
                            at = text.find(form, at + 1)
                            continue
                        if small and _quoted(before, behind):
                            self.defects.append(Defect("quoted", None, repr(value)))
                        elif glued(
                            leaf, before, behind, quoted=_in_quotes(self.pieces, piece, at)
                        ) or (small and self.misread(before, form, behind)):
                            what, at = "glued", text.find(form, at + 1)
                            continue
                        self.at = (piece, at + len(form))
                        self.reach = max(self.reach, self.at)
                        return
            if small:
                break
            piece, offset = piece + 1, 0
        self.defects.append(Defect(what, None, repr(value)))

    def misread(self, before: str, form: str, behind: str) -> bool:
        """Whether what stands between tags around a small value is no value of the row."""
        before, behind = _bare(before, self.controls), _bare(behind, self.controls)
        text = between_tags(before + form + behind, len(before), len(before) + len(form))
        if text is None or (self.twin.names and self.twin.names.search(text)):
            return False
        values = (v for whole, _ in _values(self.twin.message) for v in values_in(whole))
        return not any(is_written(text, value) for value in values)

    def turns(self, piece: int, start: int, end: int) -> bool:
        """Whether a place of a text lies where it is another one with small values turned."""
        if self.turned is None or len(self.turned) != len(self.pieces):
            return True
        text, turned = str(self.pieces[piece]), str(self.turned[piece])
        first, last = _common(text, turned), len(text) - _common(text[::-1], turned[::-1])
        # Two texts that differ by a letter less or more begin and end alike by chance.
        return start < max(first, last) and end > min(first, last)

    def changes(self, piece: int) -> bool:
        """Whether the text is another one where small values are turned."""
        if self.turned is None or len(self.turned) != len(self.pieces):
            return True
        return self.turned[piece] != self.pieces[piece]
