"""Derive what a template writes around the parts of a turn from a twin, and find its defects."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from truetune.contract.around import bare, glued, in_quotes, is_cut_from, listed, quoted
from truetune.contract.defects import (
    Defect,
    added,
    called,
    empties_of,
    in_objects,
    is_lost,
    is_misread,
    is_typed,
    misread,
    pieces_of,
    stripped,
    unreadable,
    without_section,
)
from truetune.contract.enclosed import mixed
from truetune.contract.held import between_tags, is_written, values_in
from truetune.contract.structure import broken, emptied, is_text, misshapen, moved, split
from truetune.contract.tokens import common_prefix
from truetune.contract.twin import FILLER, MOST_FLIPS, Leaf, Node, Small, Twin, argument_values
from truetune.contract.words import PART


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the parts of a turn.

    Attributes:
        pieces: texts, and between them the numbers of leaves; a text is first and last.
        defects: parts that it leaves out, repeats or puts elsewhere.
        reordered: whether arguments stand in another order than in the row.
        reach: (piece, offset) where the last part ends that has no sentinel.
        empties: of brackets and pairs of markers with nothing between them, how many stand for an
            empty value of the row; None if that cannot be asked.
        in_json: of each call, whether its arguments are written as one JSON object.
        as_text: whether arguments are written as JSON text inside JSON.
    """

    pieces: tuple[str | int, ...]
    defects: tuple[Defect, ...]
    reordered: bool
    reach: tuple[int, int] = (0, 0)
    empties: Mapping[str, int] | None = None
    in_json: tuple[bool, ...] = ()
    as_text: bool = False

    def spans(self, written: str, leaves: Sequence[Leaf]) -> list[tuple[int, int, int]] | None:
        """(leaf, start, end) of each part in a text that is this skeleton with its parts filled in;
        None for any other text."""
        return _spans(self.pieces, written, leaves, 0, 0)

    def reached(self, spans: Sequence[tuple[int, int, int]]) -> int:
        """The end of the last part that has no sentinel, in a text with these spans."""
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
                in_json = leaves[piece].kind == "value"
                if before and in_json and not last.endswith(before):
                    last = _ESCAPED_END.sub("", last)
                if behind and in_json and not first.startswith(behind):
                    first = _ESCAPED_START.sub("", first)
                last, first = last.removesuffix(before), first.removeprefix(behind)
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
        texts: what follows the served prompt, for each of the twin's variants; None if the
            template takes no such message. The first one is there.
        controls: the tokenizer's control tokens: no sign in one of them belongs to a part.
    """
    written, *others = texts
    assert written is not None
    flips, others = others[: len(twin.flips)], others[len(twin.flips) :]
    pieces = pieces_of(twin, written)
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
        Defect("text" if twin.leaves[n].kind == "arguments" else "quoted", n)
        for n, found in places.items()
        if (twin.leaves[n].kind == "arguments" or isinstance(twin.leaves[n].value, int | float))
        and any(quoted(str(pieces[at - 1]), str(pieces[at + 1])) for at in found)
    ]
    defects += [
        Defect("glued", n)
        for n, found in places.items()
        if all(
            glued(
                twin.leaves[n],
                bare(pieces[at - 1], controls),
                bare(pieces[at + 1], controls),
                quoted=isinstance(twin.leaves[n].value, str) or in_quotes(pieces, at),
            )
            for at in found
        )
    ]
    defects += [
        Defect("stripped", n)
        for n, found in places.items()
        if twin.leaves[n].kind == "value" and stripped(twin.leaves[n], pieces, found[0])
    ]
    others_read = misread(twin, bare(written, controls))
    defects += [Defect("glued", n) for n in others_read if Defect("glued", n) not in defects]
    defects += [
        Defect("listed", n)
        for n, found in places.items()
        if twin.leaves[n].kind == "key"
        and all(listed(str(pieces[at - 1]), str(pieces[at + 1])) for at in found)
    ]
    for (what, message, key), full in zip(twin.filled, others, strict=True):
        if full is None:
            continue
        if FILLER not in full or (what == "{}" and emptied(written, full)):
            defects.append(Defect("filled", None, what))
            continue
        # An argument that is there only where it holds something is lost if it does not.
        filler = FILLER + "zqheld" * (what == "{}")
        if key.strip() and full.count(key) - filler.count(key) > written.count(key):
            defects.append(Defect("missing", None, repr(key)))
            continue
        marked = bare(full, controls)
        empty: Any = {"{}": {}, "[]": []}.get(what)
        if not is_cut_from(written, full) or any(
            is_misread(twin, marked, "zqfilled", value, whole)
            for value, whole in argument_values(message)
            if "zqfilled" in whole
        ):
            defects.append(Defect("filled", None, what))
        elif empty is not None and is_lost(bare(written, controls), marked, key, empty):
            defects.append(Defect("missing", None, what))
        elif what == "{}" and listed(*full.partition("zqfilled")[::2]):
            defects.append(Defect("listed", None, what))
    defects += [Defect("added", None, key) for key in added(twin, written, pieces)]
    defects += [Defect("called", None, before) for before in called(twin, pieces)]
    defects += [Defect("unreadable", n) for n in unreadable(twin, written, pieces)]
    if twin.calls:
        shown = [bare(piece, controls) if isinstance(piece, str) else piece for piece in pieces]
        wrong = {d.leaf for d in defects}
        defects += [Defect("whole", n) for n in misshapen(twin, shown) if n not in wrong]
        defects += [Defect("unreadable", None, text) for text in broken(twin, written, shown)]
        defects += [Defect("called", n) for n in split(twin, pieces)]
        apart = mixed(twin.leaves, pieces)
        defects += [Defect("glued", apart)] if apart is not None else []
    reader = _Reader(twin, pieces, places, written, flips, controls)
    if not defects:
        defects = reader.order()
    if not defects:
        defects = [Defect("moved") for _ in moved(twin, written)]
    empties = empties_of(twin, written, others, controls)
    in_json = tuple(in_objects(twin, written, others))
    return Skeleton(
        tuple(pieces),
        tuple(defects),
        reader.reordered,
        reader.reach,
        empties,
        in_json,
        is_text(twin, written),
    )


class _Reader:
    """Judges where the parts of a twin stand.

    Args:
        pieces: of the twin's text.
        places: leaf -> indices of its pieces.
        written: the twin's text.
        flips: the texts with a small value turned; None if the template takes none.
        controls: see `skeleton`.
    """

    def __init__(
        self,
        twin: Twin,
        pieces: list[str | int],
        places: dict[int, list[int]],
        written: str,
        flips: Sequence[str | None],
        controls: re.Pattern[str] | None,
    ) -> None:
        self.twin, self.pieces, self.places = twin, pieces, places
        self.written, self.flips, self.controls = written, flips, controls
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
        if kind == "small":
            self.small(node[1])
            return None, None
        if kind == "fixed":
            self.fixed(node[1])
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
            self.fixed(key[1])
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

    def fixed(self, name: str) -> None:
        """Find a name that is no sentinel in the text after what was found last."""
        piece, offset = self.at
        leaf = Leaf("name", name, "")
        what: Literal["missing", "glued"] = "missing"
        while piece < len(self.pieces):
            text = self.pieces[piece]
            for form in sorted(leaf.forms, key=len, reverse=True) if isinstance(text, str) else ():
                at = str(text).find(form, offset)
                while at >= 0:
                    before, behind = str(text)[:at], str(text)[at + len(form) :]
                    if not glued(leaf, before, behind, quoted=in_quotes(self.pieces, piece, at)):
                        self.found(piece, at + len(form))
                        return
                    what, at = "glued", str(text).find(form, at + 1)
            piece, offset = piece + 1, 0
        self.defects.append(Defect(what, None, repr(name)))

    def found(self, piece: int, offset: int) -> None:
        self.at = (piece, offset)
        self.reach = max(self.reach, self.at)

    def small(self, value: Small) -> None:
        """Find a true, false, null or zero: where the text changes once the value is turned."""
        written, flip = self.written, self.flips[min(value.number, len(self.flips) - 1)]
        alone = value.number < MOST_FLIPS - 1 or len(self.flips) < MOST_FLIPS
        if flip is None or not alone:
            self.somewhere(value)
            return
        start = common_prefix(written, flip)
        end = len(written) - common_prefix(written[start:][::-1], flip[start:][::-1])
        start -= len(_WORD_END.search(written[:start])[0])  # type: ignore[index]
        end += len(_WORD_START.match(written[end:])[0])  # type: ignore[index]
        form = written[start:end]
        turned = flip[start : len(flip) - len(written) + end]
        piece, offset = self.place(start)
        text = str(self.pieces[piece])
        before, behind = text[:offset], text[offset + len(form) :]
        leaf = Leaf("value", value.value, "")
        if written == flip:
            self.defects.append(Defect("missing", None, repr(value.value)))
        elif value.pairs.get(form) != turned or (piece, offset) < self.at:
            self.defects.append(Defect("glued", None, repr(value.value)))
        elif quoted(before, behind):
            self.defects.append(Defect("quoted", None, repr(value.value)))
        elif (
            (form != str(value.value) and self.in_python(piece, before))
            or glued(leaf, before, behind, quoted=in_quotes(self.pieces, piece, offset))
            or self.misread(before, form, behind, value.value, written[:start])
        ):
            self.defects.append(Defect("glued", None, repr(value.value)))
        self.found(piece, offset + len(form))

    def in_python(self, piece: int, before: str) -> bool:
        """Whether a value is the keyword argument of a call as Python writes it."""
        around = self.pieces[max(piece - 2, 0) : piece]
        text = "".join(p if isinstance(p, str) else "k" for p in around) + before
        return re.search(r"(?:\(|,\s*)[\w.]+=$", text) is not None

    def somewhere(self, value: Small) -> None:
        """Find one of many small values in the text after what was found last."""
        piece, offset = self.at
        for form in value.pairs:
            at = str(self.pieces[piece]).find(form, offset)
            if at >= 0:
                self.found(piece, at + len(form))
                return
        self.defects.append(Defect("missing", None, repr(value.value)))

    def place(self, at: int) -> tuple[int, int]:
        """(piece, offset) of a place in the whole text."""
        for number, piece in enumerate(self.pieces):
            length = len(piece if isinstance(piece, str) else self.twin.leaves[piece].sentinel)
            if at < length or (at == length and number == len(self.pieces) - 1):
                return number, at
            at -= length
        return len(self.pieces) - 1, 0

    def misread(self, before: str, form: str, behind: str, value: Any, whole: str) -> bool:
        """Whether what is between tags around a small value is no value of the row.

        Args:
            whole: all that is before it.
        """
        before, behind = bare(before, self.controls), bare(behind, self.controls)
        text = between_tags(before + form + behind, len(before), len(before) + len(form))
        if text is None or (self.twin.names and self.twin.names.search(text)):
            return False
        typed = is_typed(without_section(bare(whole, self.controls)), text, value)
        if typed is not None and text.strip() == form:
            return not typed
        values = (v for whole, _ in argument_values(self.twin.message) for v in values_in(whole))
        return not any(is_written(text, value) for value in values)


# The letters and digits at the end of a text, and at its beginning.
_WORD_END, _WORD_START = re.compile(r"[A-Za-z0-9]*$"), re.compile(r"^[A-Za-z0-9]*(?:\.\d+)?")
