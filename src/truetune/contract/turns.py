"""Derive the text of one trained turn: what the server sends, and what the model must write after
it.

If the template's rendering of the turn continues the served prompt, the completion is that
continuation. Otherwise, the completion follows from the observed behaviour: a prompt that opens a
think block is continued with the reasoning, the closing marker and the turn as the template writes
it without reasoning; a prompt that closes one is continued with the turn; a prompt that differs
only in an earlier part (a system text that moves to the last question) is continued with what
follows the same question. Everything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from truetune.contract.behaviour import Behaviour, tail_of
from truetune.contract.shape import COMPOSED, Markers, split_reasoning
from truetune.contract.tokens import common_prefix
from truetune.data import rows
from truetune.errors import UnfaithfulTemplate


@dataclass(frozen=True)
class TurnText:
    """One trained turn: the served prompt, the text through the turn, and what was done to it.

    Attributes:
        turn: index of the message.
        prompt: what the server sends.
        through: the prompt and what follows it, from which the completion is taken by tokens.
        remarks: see `Encoded.remarks`.
        lead: what was put before the answer that is not in the row: the marker of a block that is
            closed at once.
        merged: messages that the row has before this one and its prepared form has not.
    """

    turn: int
    prompt: str
    through: str
    remarks: tuple[str, ...] = ()
    lead: str = ""
    merged: int = 0

    @property
    def number(self) -> int:
        """The index of the message in the row."""
        return self.turn + self.merged


@dataclass(frozen=True)
class Situation:
    """The conditions under which a turn is derived.

    Attributes:
        behaviour: the template's behaviour under the row's arguments.
        route: how reasoning reaches the template.
        markers: the markers around composed reasoning.
        empty: whether a row without reasoning may close an opened block at once, or replace an
            empty block that the template would write.
        merged: see `TurnText`.
        unlearn: returns whether the user set a think switch, so that an empty block is left out.
    """

    behaviour: Behaviour
    route: str
    markers: Markers
    empty: bool
    merged: int
    unlearn: Callable[[], bool]


def derive(
    turn: int,
    message: Mapping[str, Any],
    before: Mapping[str, Any],
    prompt: str,
    through: str,
    situation: Situation,
) -> TurnText:
    """The text of a turn.

    Args:
        turn: index of the message.
        message: the turn, canonical.
        before: the message before it.
        prompt: the served prompt.
        through: the template's rendering of the conversation through the turn; without its
            reasoning under a composing route.

    Raises:
        UnfaithfulTemplate: the two cannot be brought together, or an empty block would be learned.
    """
    number = turn + situation.merged
    markers = situation.markers
    opened, closed, pair = tail_of(prompt, situation.behaviour.pairs)
    if pair and pair != (markers.open, markers.close):
        markers = Markers(pair[0], pair[1], f"{pair[0]}\n", f"\n{pair[1]}\n\n")
    reasoning = str(message.get("reasoning_content") or "").strip("\n")
    inline = split_reasoning(dict(message), [(markers.open, markers.close)])
    if closed and inline.get("reasoning_content"):
        raise _off(number, closed)
    rest, remarks = _behind(prompt, through, opened or closed, before, message)
    if rest is None:
        raise _diverging(number, prompt, through)
    rest = _once(rest, opened, closed, markers)
    composed = situation.route in COMPOSED and bool(reasoning)
    pairs = dict.fromkeys([(markers.open, markers.close), *situation.behaviour.pairs])
    rest, empty = _without_block(rest, pairs, bool(opened), situation.behaviour.lead)
    if composed:
        start = "" if opened else markers.open_text
        return _joined(turn, prompt, start + reasoning + markers.close_text + rest, *remarks)
    if opened and (empty or markers.close not in rest):
        if reasoning:
            raise _dropped(number, opened)
        if not situation.empty:
            raise _thinks(number, opened)
        # The prompt's own line break serves; a second one would merge with it into another token.
        close = markers.close_text.lstrip("\n") if opened.endswith("\n") else markers.close_text
        made = _joined(turn, prompt, close + rest, *remarks, "reasoning-empty")
        return replace(made, lead=close)
    if empty and not reasoning and not (situation.empty or situation.unlearn()):
        raise _invented(number, markers)
    if not (reasoning or opened or closed) and (empty or situation.unlearn()):
        remarks = [*remarks, "thinking-unlearned"]
    return _joined(turn, prompt, rest, *remarks)


def _behind(
    prompt: str,
    through: str,
    tail: str,
    before: Mapping[str, Any],
    message: Mapping[str, Any],
) -> tuple[str | None, list[str]]:
    """What the template writes for the turn, and remarks.

    Args:
        tail: a think block that the prompt opens or closes at its end: the rendering may continue
            after the block, or from its beginning.
    """
    base = prompt.removesuffix(tail)
    for start in dict.fromkeys((prompt, base)):
        if through.startswith(start):
            return through[len(start) :], []
    for start in dict.fromkeys((prompt, base)):
        rest = _realigned(start, through, before, message)
        if rest is not None:
            return rest, ["prompt-realigned"]
    return None, []


def _once(rest: str, opened: str, closed: str, markers: Markers) -> str:
    """The turn without a think block that the prompt already contains."""
    if opened and rest.lstrip().startswith(markers.open):
        return rest.lstrip()[len(markers.open) :].lstrip("\n")
    if closed:
        rest = _without_block(rest, [(markers.open, markers.close)], opened=False)[0]
        if rest.lstrip().startswith(markers.close):
            return rest.lstrip()[len(markers.close) :].lstrip("\n")
    return rest


def _joined(turn: int, prompt: str, text: str, *remarks: str) -> TurnText:
    return TurnText(turn, prompt, prompt + text, remarks)


def _realigned(
    prompt: str, through: str, before: Mapping[str, Any], message: Mapping[str, Any]
) -> str | None:
    """What follows the same last message in both texts; None if it cannot be found.

    The end of the prompt, from the text of its last message on, must also be in the rendering,
    before the turn.
    """
    said = str(before.get("content") or "").strip()
    answer = str(message.get("content") or "").strip()
    limit = through.rfind(answer) if answer else -1
    limit = limit if limit >= 0 else len(through)
    for form in dict.fromkeys((said, json.dumps(said)[1:-1], json.dumps(json.dumps(said))[3:-3])):
        at = prompt.rfind(form) if form else -1
        if at < 0:
            continue
        seam = prompt[at:]
        found = through.rfind(seam, 0, limit)
        if found >= 0:
            return through[found + len(seam) :]
        # The same message, set apart by other whitespace: trimmed, or one line break more. A call
        # after it may hold its text too.
        found = through.rfind(form, 0, limit)
        while found >= 0:
            end = _past(seam[len(form) :], through, found + len(form))
            if end is not None:
                return through[end:]
            found = through.rfind(form, 0, found + len(form) - 1)
    return None


def _past(tail: str, text: str, at: int) -> int | None:
    """The index at which `text` continues after `tail`, which begins at `at` and may have other
    whitespace between its words; None if it is not there."""
    body = tail.rstrip()
    for char in body:
        if char.isspace():
            continue
        while at < len(text) and text[at].isspace():
            at += 1
        if text[at : at + 1] != char:
            return None
        at += 1
    rest = tail[len(body) :]
    return at + len(rest) if text.startswith(rest, at) else at


def _without_block(
    text: str, pairs: Iterable[tuple[str, str]], opened: bool, lead: str = ""
) -> tuple[str, bool]:
    """(the text after an empty think block at its beginning, whether there was one).

    `lead` is what the template writes before every answer: where that is the block, its line breaks
    are known from those of the answer.
    """
    for opening, closing in pairs:
        block = closing if opened else opening + closing
        if "".join(lead.split()) == block and text.startswith(lead):
            return text[len(lead) :], True
        rest = text.lstrip()
        if not opened:
            if not rest.startswith(opening):
                continue
            rest = rest[len(opening) :].lstrip()
        if rest.startswith(closing):
            return rest[len(closing) :].lstrip("\n"), True
    return text, False


def _dropped(turn: int, opened: str) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(
        f"the template drops the reasoning of message {turn}",
        why=f"the prompt ends with {opened!r}, and the rendered turn has no such block",
        fix="use --reasoning inline to write it between think markers, or --reasoning drop to "
        "omit it",
        code="target-dropped",
    )


def _thinks(turn: int, opened: str) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(
        f"the served prompt opens a think block before message {turn}, which has no reasoning",
        why=f"the prompt ends with {opened!r}: training there would begin inside the block",
        fix="give the row reasoning, set the template's own thinking switch with --template-arg, "
        "if it has one, or close the block immediately with --reasoning empty",
        code="thinking-only",
    )


def _invented(turn: int, markers: Markers) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(
        f"the template writes an empty think block before the answer of message {turn}",
        why=f"{markers.open}{markers.close} is not in the data: the model would learn to write it "
        "and not to think",
        fix="set the template's own thinking switch with --template-arg, if it has one, or train "
        "on the answer without the block with --reasoning empty",
        code="target-invented",
    )


def _off(turn: int, closed: str) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(
        f"message {turn} has reasoning, but the served prompt closes the think block before it",
        why=f"the prompt ends with {closed!r}",
        fix="remove the template argument that disables thinking, or leave the reasoning out "
        "with --reasoning drop",
        code="thinking-off",
    )


def _diverging(turn: int, prompt: str, through: str) -> UnfaithfulTemplate:
    at = common_prefix(prompt, through)
    return UnfaithfulTemplate(
        f"the served prompt before message {turn} differs from what the template writes there in "
        "the full conversation",
        why=f"the served prompt continues with {excerpt(prompt[at:])}, the rendered conversation "
        f"with {excerpt(through[at:])}",
        fix="use a template that renders history as it renders prompts, or set the template's "
        "arguments",
        code="prompt-differs",
    )


def excerpt(text: str, limit: int = 60) -> str:
    """A quoted beginning, or the word "nothing"."""
    return rows.excerpt(text, limit) if text else "nothing"


def trained_turns(messages: Sequence[Mapping[str, Any]], loss_on: str) -> list[int]:
    """Indices of the assistant turns that are targets.

    Raises:
        UnfaithfulTemplate: there is none, or one has nothing before it.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message.get("role") == "assistant" and message.get("train") is not False
    ]
    if not turns:
        raise UnfaithfulTemplate(
            "the conversation has no assistant turn to train on",
            fix="add an answer, or drop the row with --bad-rows drop",
            code="no-assistant-turn",
        )
    turns = turns[-1:] if loss_on == "last" else turns
    if turns[0] == 0:
        raise UnfaithfulTemplate(
            "the conversation begins with an answer to train on",
            why="a server cannot send an empty conversation as the prompt",
            fix="add a message before it, or set train: false on it",
            code="no-prompt",
        )
    return turns
