"""Judge a reply with yes-or-no questions: does it end, repeat itself, write another turn, leave its
thinking open, stay empty, copy the prompt, or switch to another script?

input   Asked (a prompt as served, and what its row answers), Reply
does    looks only at text and ids; a reply is not blamed for what the row's own answer also does
output  Said; the shares over several replies
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.behaviour.text import goes_round, other_script, says_again
from truetune.contract.behaviour import Q2, TOOL, Q
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.generate import Reply

# A reply had room to end where it was given so many times the tokens of the row's own answer, and
# a few more.
ROOM, MORE = 2, 8


@dataclass(frozen=True)
class Thinking:
    """How a reply to one prompt may think.

    Attributes:
        opened: whether the prompt leaves a think block open.
        pairs: opening and closing markers.
    """

    opened: bool
    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of_contract(
        cls, contract: PromptContract, template_kwargs: Mapping[str, Any] | None = None
    ) -> Thinking:
        """Of a contract, under a row's own template arguments."""
        seen = contract.behaviour(template_kwargs)
        own = contract.policy.markers(seen)
        known = seen.markers is not None or contract.policy.think_markers is not None
        pairs = (*seen.pairs, *(((own.open, own.close),) if known or seen.opened else ()))
        return cls(bool(seen.opened), tuple(dict.fromkeys(pairs)))

    def split(self, text: str) -> tuple[bool, bool, str]:
        """Whether a reply thinks, whether it ends that, and its answer: what is after; "" of
        thinking that does not end."""
        start = text.lstrip()
        closings = [close for begin, close in self.pairs if self.opened or start.startswith(begin)]
        if not closings:
            return False, False, text
        ends = [(text.find(close), close) for close in closings if close in text]
        if not ends:
            return True, False, ""
        at, close = min(ends)
        return True, True, text[at + len(close) :]


@dataclass(frozen=True)
class Asked:
    """A prompt as served, and what its row answers.

    Attributes:
        where: the row.
        ids: the served prompt.
        expected: ids of the row's answer, without the stop token.
        messages: the messages of the prompt, to be shown with the samples.
        expected_text: the row's answer.
        prompt_text: the end of the prompt, to find replies that repeat it.
        held_out: whether the row is held out of training.
        stop: the stop token that ends the row's answer; None if none does.
    """

    where: str
    ids: tuple[int, ...]
    expected: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...]
    expected_text: str
    prompt_text: str
    held_out: bool = False
    stop: int | None = None

    @property
    def answer(self) -> tuple[int, ...]:
        """Ids of the row's answer, with the stop token that ends it."""
        return self.expected if self.stop is None else (*self.expected, self.stop)

    @property
    def most_tokens(self) -> int:
        """New tokens that a reply needs in order to have had room."""
        return ROOM * len(self.expected) + MORE


# Tokens of a prompt's end that a reply is compared with.
_PROMPT_TOKENS = 512


def ask(
    contract: PromptContract,
    example: SFTExample,
    where: str,
    messages: Sequence[Mapping[str, Any]] = (),
) -> Asked | None:
    """The last answer of an example as a question: what is before it is the served prompt.

    Returns:
        None if nothing is supervised, or no prompt is before it: a single token (one that
        begins every text) is none.
    """
    ends = [at for at, on in enumerate(example.mask) if on]
    if not ends:
        return None
    last = first = ends[-1]
    while first > 0 and example.mask[first - 1]:
        first -= 1
    if first <= 1:
        return None
    stops = set(contract.stop_ids)
    span = example.ids[first : last + 1]
    expected = tuple(span[:-1] if span[-1] in stops else span)
    prompt = tuple(example.ids[:first])
    decode = contract.tokens.decode
    return Asked(
        where,
        prompt,
        expected,
        tuple(messages),
        contract.tokens.decode_after(list(prompt), list(expected)),
        decode(list(prompt[-_PROMPT_TOKENS:])),
        stop=span[-1] if span[-1] in stops else None,
    )


@dataclass(frozen=True)
class Said:
    """A reply, judged.

    Attributes:
        text: as written, without the stop token.
        tokens: the stop token included.
        stopped: it ended by itself.
        had_room: it was given room to end.
        repeats: it repeats itself in a loop.
        other_turn: it writes the header of another turn: of the user, the system or a tool, or
            once more its own after its text.
        thinks_open: it ended, or reached its limit, inside a think block.
        empty: it ended by itself with nothing but whitespace.
        copied: it repeats the prompt.
        other_script: it is written in letters of neither prompt nor answer.
        would_stop: the model's likeliest token after the row's own answer is the stop token; None
            if that was not read.
    """

    text: str
    tokens: int
    stopped: bool
    had_room: bool
    repeats: bool
    other_turn: bool
    thinks_open: bool
    empty: bool
    copied: bool
    other_script: bool
    would_stop: bool | None = None

    @property
    def ends(self) -> bool | None:
        """Whether the model ends an answer by itself: by the reply if that had room, else by
        what the model predicts after the row's own answer; None if neither can say."""
        return self.stopped if self.had_room else self.would_stop


class Judge:
    """Judges the replies that one contract's prompts get.

    Args:
        contract: says how turns begin and how a reply may think.
    """

    def __init__(self, contract: PromptContract) -> None:
        self.thinking = Thinking.of_contract(contract)
        self.turns = _next_turns(contract)

    def judge(self, asked: Asked, reply: Reply, limit: int, would_stop: bool | None = None) -> Said:
        """One reply.

        Args:
            limit: new tokens that it was given.
            would_stop: see `Said`.
        """
        text = reply.text
        thought, closed, answer = self.thinking.split(text)
        had_room = reply.stopped or limit >= asked.most_tokens
        ids = reply.ids[: len(reply.ids) - reply.stopped]
        return Said(
            text=text,
            tokens=len(reply.ids),
            stopped=reply.stopped,
            had_room=had_room,
            repeats=goes_round(ids, text) and not goes_round(asked.expected, asked.expected_text),
            other_turn=self._goes_on(text) and not self._goes_on(asked.expected_text),
            thinks_open=thought and not closed and had_room,
            # Whitespace without an end is a circle: a base passes through it before it knows
            # which words its rows are made of.
            empty=reply.stopped and not text.strip() and bool(asked.expected_text.strip()),
            copied=says_again(answer, asked.prompt_text, asked.expected_text),
            other_script=other_script(text, asked.prompt_text + asked.expected_text),
            would_stop=would_stop,
        )

    def _goes_on(self, text: str) -> bool:
        return any(turn.search(text) for turn in self.turns)


# A header of fewer characters could stand in any answer.
_FEWEST_CHARS = 4
# How the next turn begins in formats that are written as plain text.
_NEXT_TURN = re.compile(
    r"(?:\n|\A)[ \t]*(?:#{2,} ?(?:instruction|human|user|input)\b:?"
    r"|(?:human|user)[ \t]*:|<\|(?:im_start|start_header_id)\|>(?:user|human)|<\|user\|>"
    r"|<start_of_turn>user)",
    re.IGNORECASE,
)
# A header with one of these is a marker; one without is a word that an answer may hold too.
_BRACKETS = frozenset("<[|\uff5c\u25c1\u300a\u3010")


def _next_turns(contract: PromptContract) -> tuple[re.Pattern[str], ...]:
    """What a reply that goes on with another turn holds.

    A header that is only words counts at the beginning of a line, the user's anywhere. The
    assistant's own counts after some text: a reply writes it first where the served prompt lacks
    it. A header that the template writes within one answer (between reasoning and answer, or
    between two calls) is no sign.
    """
    seen, decode = contract.behaviour(), contract.tokens.decode
    stops = [text for stop in contract.stop_ids if (text := decode([stop]))]

    def without_stops(text: str) -> str:
        for stop in stops:
            text = text.replace(stop, "")
        return text

    def header(text: str, line: int) -> str:
        return (without_stops(text).strip().splitlines() or [""])[line].strip()

    asked = seen.user_end.removesuffix(seen.opened or seen.closed)
    within = "\n".join(
        [
            *(_before_stop(end, stops) for end in (seen.answer_end[0], seen.call_end[0])),
            *(mark for pair in seen.pairs for mark in pair),
            *([seen.markers.open_text, seen.markers.close_text] if seen.markers else []),
            seen.call_between,
            seen.lead,
        ]
    )
    user, tool = (header(_added(end, without_stops), 0) for end in (seen.answer_end, seen.call_end))
    # The tool's own name is another one in each answer.
    tool = tool.partition(TOOL["function"]["name"])[0]
    others = dict.fromkeys([tool, header(_system_start(contract), 0)])
    own = header(asked, -1)
    found = [_NEXT_TURN]
    found += [re.compile(re.escape(user))] if _tells(user, within) else []
    found += [re.compile(_at(text)) for text in others if _tells(text, within)]
    if _tells(own, within):
        # Some text of its own, then the header.
        said = rf"\A\s*(?:{re.escape(own)}\s*)*(?!{re.escape(own)})\S(?s:.*?)"
        found.append(re.compile(said + _at(own)))
    return tuple(found)


def _tells(header: str, within: str) -> bool:
    """Whether a header can be distinguished from an answer."""
    letters = any(c.isalnum() for c in header) and any(not c.isalnum() for c in header)
    return letters and len(header) >= _FEWEST_CHARS and header not in within


def _at(header: str) -> str:
    """A pattern: the header where it begins a turn."""
    return ("" if _BRACKETS & set(header) else r"(?:\n|\A)[ \t]*") + re.escape(header)


def _before_stop(end: str, stops: Sequence[str]) -> str:
    """What an answer's end holds before the token on which a reply ends."""
    return end[: min((at for stop in stops if (at := end.find(stop)) >= 0), default=len(end))]


def _added(ends: tuple[str, str], without_stops: Callable[[str], str]) -> str:
    """What follows an answer's end where another turn does."""
    last, later = map(without_stops, ends)
    return later[len(os.path.commonprefix([last, later])) :]  # noqa: RUF071 (of texts)


def _system_start(contract: PromptContract) -> str:
    """What the template writes before a system message; "" if it takes none."""
    messages = [{"role": "system", "content": Q}, {"role": "user", "content": Q2}]
    try:
        text = contract.prompt_text(messages)
    except ValueError:
        return ""
    before, found, _ = text.partition(Q)
    begins = contract.tokenizer.bos_token or ""
    return before.strip().removeprefix(begins) if found else ""


# The shares that are counted of replies: name -> whether a reply counts, and among which.
_COUNTED: Mapping[str, tuple[Callable[[Said], bool], Callable[[Said], bool]]] = {
    "stop_rate": (lambda said: bool(said.ends), lambda said: said.ends is not None),
    "repetition": (lambda said: said.repeats, lambda said: True),
    "role_leak": (lambda said: said.other_turn, lambda said: True),
    "open_thinking": (lambda said: said.thinks_open, lambda said: said.had_room),
    "empty": (lambda said: said.empty, lambda said: True),
    "copied": (lambda said: said.copied, lambda said: True),
    "other_language": (lambda said: said.other_script, lambda said: True),
}


def shares(replies: Sequence[Said]) -> dict[str, float]:
    """Each share among the replies that can show it, 0 to 1, and their mean length; a share that
    no reply can show is left out."""
    found: dict[str, float] = {}
    for name, (counts, among) in _COUNTED.items():
        able = [said for said in replies if among(said)]
        if able:
            found[name] = sum(map(counts, able)) / len(able)
    if replies:
        found["reply_tokens"] = sum(said.tokens for said in replies) / len(replies)
    return found
