"""Prove a turn: read its completion back, part by part, and compare the parts with the row.

input   completions, and what the template writes for their twins: the same turns with a sentinel
        for each part
does    takes from a twin what the template writes around the parts; the completion must equal that,
        filled with the parts of the row: each of them once, in its place, and no other words
output  remarks, or `UnfaithfulTemplate` with the reason
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.contract.around import bare
from truetune.contract.enclosed import loose_reasoning
from truetune.contract.encode import Completion
from truetune.contract.held import is_call, is_same, json_objects, values_in
from truetune.contract.refusals import (
    AS_THEY_ARE,
    behind_stop,
    cut_at,
    cut_short,
    defective,
    loose,
    unannounced,
    unlike,
    worded,
    would_be,
)
from truetune.contract.skeleton import Skeleton, skeleton
from truetune.contract.structure import uncarried
from truetune.contract.tokens import Tokens
from truetune.contract.turns import excerpt
from truetune.contract.twin import Twin, twin_of
from truetune.contract.words import (
    PART,
    RESERVED,
    TURNED,
    hollow,
    is_held,
    lone_tag,
    markers_in,
    sign_beside,
    unpaired,
    words_beside_calls,
    words_in,
)
from truetune.errors import UnfaithfulTemplate

# Skeletons kept for turns of one structure: a template writes it differently by what is before.
_MOST_SKELETONS = 16


@dataclass(frozen=True)
class Frame:
    """What may stand around the parts of a turn.

    Attributes:
        marks: texts that templates cut reasoning and content at.
        pairs: opening and closing markers of reasoning among them.
        used: those of them at which a server cuts: the template's own, and what the run writes.
        recipient: see `Behaviour.recipient`.
        header: see `Behaviour.headers`.
        keep_words: whether words of the template become targets, counted.
    """

    marks: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    used: tuple[tuple[str, str], ...]
    recipient: str
    header: str
    keep_words: bool


class Proof:
    """Proves completions; remembers what templates write around turns of each structure."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._skeletons: dict[str, list[Skeleton]] = {}
        self._controls = tuple(
            text for text in tokens.added_texts if not text.replace("_", "").isalnum()
        )
        signs = sorted(filter(str.strip, self._controls), key=len, reverse=True)
        self._control = re.compile("|".join([*map(re.escape, signs), TURNED]))

    def unproved(
        self, completion: Completion, message: Mapping[str, Any], frame: Frame, *, named: bool
    ) -> Twin | None:
        """The twin to render before the turn can be judged; None if nothing is missing."""
        if self._is_exact(completion, message):
            return None
        for names in (False, True)[: 1 + named]:
            twin = twin_of(message, frame.marks, named=names)
            known = self._matching(twin, completion)
            if known and not (named and known.defects):
                return None
        return twin

    def learn(self, twin: Twin, texts: Sequence[str | None]) -> None:
        """Take in what the template writes for a twin's variants after the served prompt."""
        known = self._skeletons.setdefault(twin.key_for(str(texts[0])), [])
        known.append(skeleton(twin, texts, self._control))
        del known[:-_MOST_SKELETONS]

    def require(
        self, completion: Completion, message: Mapping[str, Any], frame: Frame
    ) -> list[str]:
        """Remarks on a turn whose every part is in its completion, once and in its place.

        Raises:
            UnfaithfulTemplate: a part is missing, repeated or elsewhere, or words stand beside
                them.
        """
        turn = completion.text.number
        # Some tokenizers (GPT-2's) have one token for unknown, begin and end: at the end it is a
        # stop.
        unknown = self.tokens.unknown_id
        if unknown is not None and unknown in completion.ids[:-1]:
            raise UnfaithfulTemplate(
                f"the tokenizer has no token for a part of the answer of message {turn}",
                why="it encodes to the unknown token, which decodes to something else",
                fix="remove those characters from the row, or drop the row",
                code="unknown-token",
            )
        self._require_uncut(completion, message, frame)
        if self._is_exact(completion, message):
            return []
        found: tuple[Twin, Skeleton] | None = None
        for named in (False, True):
            twin = twin_of(message, frame.marks, named=named)
            known = self._matching(twin, completion)
            if known and (found is None or (_mendable(found[1]) and not known.defects)):
                found = twin, known
        if found is None:
            raise unlike(completion, message, frame.marks)
        return self._judged(*found, completion, message, frame)

    def _is_exact(self, completion: Completion, message: Mapping[str, Any]) -> bool:
        if message.get("reasoning_content") or message.get("tool_calls"):
            return False
        return completion.error is None and completion.body == (message.get("content") or "")

    def _require_uncut(
        self, completion: Completion, message: Mapping[str, Any], frame: Frame
    ) -> None:
        """A part of the turn must not hold a marker at which a reasoning parser cuts it.

        Raises:
            UnfaithfulTemplate: one does.
        """
        content = str(message.get("content") or "")
        thought = str(message.get("reasoning_content") or "")
        for opening, closing in frame.used:
            if closing and closing in thought:
                raise cut_at(completion.text.number, "the reasoning", closing)
            opened = completion.text.prompt.rstrip().endswith(opening)
            said = content if thought else _without_block(content, opening, closing, opened)
            # A parser cuts at the first closing marker: after a block of its own another one is
            # text.
            for marker in (opening,) if thought else (opening, closing):
                if marker and marker in said:
                    raise cut_at(completion.text.number, "the content", marker)
            # Behind the reasoning of the turn a parser looks for its markers no more.
            for marker in () if thought else (opening, closing):
                if marker and marker in str(message.get("tool_calls") or ""):
                    raise cut_at(completion.text.number, "a tool call", marker)

    def _matching(self, twin: Twin, completion: Completion) -> Skeleton | None:
        for known in (s for key in twin.keys for s in reversed(self._skeletons.get(key, ()))):
            spans = known.spans(completion.written, twin.leaves)
            if spans is None:
                continue
            end = spans[-1][2] if spans else 0
            cut = self._cut(completion)
            if cut is None or len(cut) < end or known.tail.startswith(cut[end:]):
                return known
        return None

    def _cut(self, completion: Completion) -> str | None:
        """The part of the written text that the completion's ids stand for."""
        written, body = completion.written, completion.body
        if completion.error is not None or written.startswith(body):
            return written if completion.error is not None else body
        # The tokenizer's normaliser changes texts: the same change must lead to the body.
        stop, wanted = completion.stop, body.strip()
        ends = [len(written)]
        at = written.find(stop) if stop else -1
        while at >= 0:
            ends.append(at)
            at = written.find(stop, at + 1)
        for end in ends:
            cut = written[:end]
            if wanted in (cut.strip(), self.tokens.normalised(cut).strip()):
                return cut
        # Some decoders write a space behind each added token: the text is compared as it comes
        # back from its own ids.
        for end in ends:
            cut = written[:end]
            if wanted == self.tokens.decode(self.tokens.encode([cut])[0]).strip():
                return cut
        return None

    def _judged(
        self,
        twin: Twin,
        known: Skeleton,
        completion: Completion,
        message: Mapping[str, Any],
        frame: Frame,
    ) -> list[str]:
        turn, cut = completion.text.number, self._cut(completion)
        header = frame.header.strip()
        unheaded = bool(header) and completion.written.lstrip().startswith(header)
        if unheaded and not frame.keep_words:
            raise unannounced(turn, frame.header)
        spans = known.spans(completion.written, twin.leaves)
        assert spans is not None
        error = completion.error
        if error is not None and error.code == "no-stop" and not _is_missing(known):
            raise error
        if known.defects:
            raise defective(known.defects[0], twin, completion, message)
        if completion.error is None:
            self._require_said(known, twin, completion, message, frame)
        if completion.error is not None:
            raise completion.error
        if cut is None:
            raise unlike(completion, message, frame.marks)
        late = [number for number, _, end in spans if end > len(cut)]
        if late:
            raise behind_stop(twin.leaves[late[0]], completion, message)
        if known.reached(spans) > len(cut):
            raise behind_stop(None, completion, message)
        tail = cut[spans[-1][2] if spans else 0 :]
        calls = bool(message.get("tool_calls"))
        if calls:
            thoughts = {m for pair in frame.pairs for m in pair if message.get("reasoning_content")}
            self._require_held(known, twin, tail, completion, thoughts)
            self._require_read(known, spans, twin, cut, completion, message)
        text = known.frame(tail, twin.leaves)
        words = words_in(
            text,
            (*self._controls, *frame.marks),
            calls=calls,
            empties=bool(twin.filled),
            prompt=completion.text.prompt,
            recipient=frame.recipient,
            own="".join(filter(str.isspace, _texts(message))),
        )
        between = _between(known, twin, tail)
        plain = not (calls or message.get("reasoning_content"))
        if calls and not words:
            words = self._sign_beside(known, twin, tail) or words_beside_calls(
                between, (*self._controls, *frame.marks), completion.text.prompt, frame.recipient
            )
        if not (plain or words):
            words = lone_tag(between, (*self._controls, *frame.marks), completion.text.prompt)
        for _, closing in frame.pairs:
            # A channel is named after what opens a turn, and never after reasoning.
            named = re.search(rf"{re.escape(closing)}\s*([A-Za-z_]+)[ \t]*\n", text)
            words = words or (named[1] if named else "")
        if any(
            sign in piece
            for piece in (*known.pieces[:-1], tail)
            if isinstance(piece, str)
            for sign in RESERVED
        ):
            words = words or "a control character"
        if words and not frame.keep_words:
            raise worded(turn, words, tail.strip().startswith(words), calls)
        wrong = loose_reasoning(
            [*known.pieces[:-1], tail],
            twin.leaves,
            completion.text.prompt,
            frame.pairs,
            frame.marks,
            self._control,
            str(message.get("content") or ""),
        )
        if wrong:
            raise loose(wrong, completion)
        self._require_paired(known, text, completion, frame)
        for opening, closing in frame.pairs:
            # A think block without a part of the row in it, empty or with words.
            block = f"{re.escape(opening)}[^{PART}]*?{re.escape(closing)}"
            if invented := re.search(block, text):
                raise worded(turn, invented.group(), False, calls)
        remarks = ["template-words"] if words else []
        content = str(message.get("content") or "")
        if content.strip() and content not in cut:
            # Between markers in the content there is other whitespace than in the row.
            remarks.append("stripped" if content.strip() in cut else "respaced")
        thought = str(message.get("reasoning_content") or "")
        if thought.strip() and thought not in cut and thought.strip() in cut:
            remarks += ["stripped"] * ("stripped" not in remarks)
        if not completion.written.startswith(completion.body) and cut.strip() != (
            completion.body.strip()
        ):
            remarks.append("normalised")
        if known.reordered:
            remarks.append("reordered")
        if known.as_text:
            remarks.append("arguments-as-text")
        around = text.replace(PART, "")
        if plain and content.strip() and cut.strip() == content.strip() and content in cut:
            # Markers in it are the row's own.
            around = cut.replace(content, "", 1)
        held = not plain and is_held(between, (*self._controls, *frame.marks))
        if held or (plain and around.strip() and not words and not completion.text.lead):
            remarks.append("framed")
        # Many formats have one space before an answer; a client gets any other whitespace.
        elif plain and not around.strip() and around not in ("", " ") and not remarks:
            remarks.append("respaced")
        return remarks

    def _require_paired(
        self, known: Skeleton, text: str, completion: Completion, frame: Frame
    ) -> None:
        """No pair of markers may hold nothing, unless a value of the row is empty, and none may
        lack its other side: a server reads a call there that nobody made, or none where one is.

        Raises:
            UnfaithfulTemplate: one does.
        """
        thoughts = tuple(mark for mark in (*frame.marks, *itertools.chain(*frame.pairs)) if mark)
        for pair, count in hollow(text, self._control).items():
            if known.empties is None or any(mark in pair for mark in thoughts):
                continue
            if count > known.empties.get(pair, 0):
                raise UnfaithfulTemplate(
                    f"the template writes {pair!r} into message {completion.text.number}, with "
                    "nothing inside",
                    why=f"the row has no such part; {would_be(completion, pair)}",
                    fix="use a template that writes markers only around parts that exist",
                    code="target-invented",
                )
        calls = bool(known.in_json)
        if alone := unpaired(
            text, self._control, thoughts, self._controls, completion.text.prompt, calls=calls
        ):
            shown = alone.replace(PART, "\u2026")
            raise UnfaithfulTemplate(
                f"the template writes {shown!r} into message {completion.text.number} without its "
                "counterpart",
                why=would_be(completion, alone),
                fix="use a template that closes the markers that it opens",
                code="target-invented",
            )

    def _sign_beside(self, known: Skeleton, twin: Twin, tail: str) -> str:
        """A sign beside the text of a turn with calls, "" if there is none."""
        pieces = [*known.pieces[:-1], tail]
        for number, piece in enumerate(pieces):
            if isinstance(piece, int) and twin.leaves[piece].kind in ("reasoning", "content"):
                found = sign_beside(str(pieces[number - 1]), str(pieces[number + 1]), self._control)
                if found:
                    return found
        return ""

    def _require_held(
        self, known: Skeleton, twin: Twin, tail: str, completion: Completion, thoughts: set[str]
    ) -> None:
        """No part of a turn with calls may hold a marker of its format: a server cuts there.

        Args:
            thoughts: markers of reasoning that the turn has closed before its calls.

        Raises:
            UnfaithfulTemplate: one does.
        """
        pieces = [str(p) for p in (*known.pieces[:-1], tail) if isinstance(p, str)]
        markers = markers_in(pieces, self._control)
        whole = [*known.pieces[:-1], tail]
        for at, piece in enumerate(whole):
            if isinstance(piece, int) and twin.leaves[piece].kind in ("name", "key"):
                leaf = twin.leaves[piece]
                before, behind = (bare(whole[n], self._control) for n in (at - 1, at + 1))
                if sign := uncarried(before, str(leaf.value), behind):
                    raise cut_short(completion.text.number, leaf.label, sign)
        for leaf in twin.leaves:
            own = thoughts if leaf.kind not in ("reasoning", "content") else ()
            held = (
                next((m for m in markers if m not in own and m in str(leaf.value or "")), "")
                if isinstance(leaf.value, str)
                else ""
            )
            if held:
                raise cut_at(completion.text.number, leaf.label, held)

    def _require_read(
        self,
        known: Skeleton,
        spans: Sequence[tuple[int, int, int]],
        twin: Twin,
        cut: str,
        completion: Completion,
        message: Mapping[str, Any],
    ) -> None:
        """Arguments that are written as JSON read back as the row has them.

        Raises:
            UnfaithfulTemplate: some do not.
        """
        said = (end for n, _, end in spans if twin.leaves[n].kind in ("reasoning", "content"))
        found = list(json_objects(cut[max(said, default=0) :], elements=False))
        calls = message["tool_calls"]
        values = [v for c in calls for v in values_in(c["function"].get("arguments"))]
        at = 0
        for call, in_json in zip(calls, known.in_json, strict=False):
            arguments, name = call["function"].get("arguments"), str(call["function"].get("name"))
            if not in_json:
                continue
            place = next((n for n in range(at, len(found)) if is_call(found[n], arguments)), None)
            if place is not None:
                at = place + 1
                continue
            # A template may leave out arguments if there are none; it must not make some up.
            if not arguments and all(
                json.dumps(name) in json.dumps(held) or any(is_same(held, v) for v in values)
                for held in found
            ):
                continue
            raise UnfaithfulTemplate(
                f"the arguments of a call of {name!r} in message {completion.text.number} change "
                "when they are parsed back",
                why=would_be(completion, name),
                fix=AS_THEY_ARE,
                code="target-dropped",
            )

    def _require_said(
        self,
        known: Skeleton,
        twin: Twin,
        completion: Completion,
        message: Mapping[str, Any],
        frame: Frame,
    ) -> None:
        """Content must not stand where the template writes reasoning: a server would return it so.

        Raises:
            UnfaithfulTemplate: it does, and the row did not put it there.
        """
        content = str(message.get("content") or "")
        for number, piece in enumerate(known.pieces):
            if not isinstance(piece, int) or twin.leaves[piece].kind != "content":
                continue
            before = str(known.pieces[number - 1]).rstrip()
            if any(before.endswith(o) and o not in content for o, _ in frame.pairs):
                turn = completion.text.number
                raise UnfaithfulTemplate(
                    f"the template writes the content of message {turn} as reasoning",
                    why=f"it follows {excerpt(before[-40:])}: a server returns it as "
                    "reasoning, not as content",
                    fix="put it into reasoning_content if it is reasoning, or into a turn of its "
                    "own",
                    code="target-dropped",
                )


def _texts(message: Mapping[str, Any]) -> str:
    return f"{message.get('reasoning_content') or ''}{message.get('content') or ''}"


def _between(known: Skeleton, twin: Twin, tail: str) -> list[tuple[str, str, str]]:
    """(kind of part before, text, kind of part after) of what is around the parts."""
    pieces = [*known.pieces[:-1], tail]

    def kind(at: int) -> str:
        piece = pieces[at] if 0 <= at < len(pieces) else ""
        if not isinstance(piece, int):
            return ""
        return "text" if twin.leaves[piece].kind in ("reasoning", "content") else "call"

    return [
        (kind(at - 1), piece, kind(at + 1))
        for at, piece in enumerate(pieces)
        if isinstance(piece, str)
    ]


def _is_missing(known: Skeleton) -> bool:
    return any(defect.what == "missing" for defect in known.defects)


def _mendable(known: Skeleton) -> bool:
    """Whether a template may write it rightly for the names that it knows: what it adds to
    arguments, or makes of them, it does under any name."""
    by_any = ("added", "listed", "behind", "called", "unreadable", "moved", "whole")
    return bool(known.defects) and not any(d.what in by_any for d in known.defects)


def _without_block(content: str, opening: str, closing: str, opened: bool) -> str:
    """The content without the markers of its own think block, which the prompt may open."""
    inside, closed, rest = content.partition(closing)
    if closed and inside.lstrip().startswith(opening):
        return inside.lstrip()[len(opening) :] + rest
    return inside + rest if closed and opened else content
