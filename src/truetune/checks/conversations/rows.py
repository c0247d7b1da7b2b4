"""What the data checks examine: conversations as they were read, before any template."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from truetune.data.conversation import Conversation
from truetune.findings import Level


@dataclass(frozen=True, eq=False)
class DataFacts:
    """Conversations, with the held-out ones separate.

    Attributes:
        train, held_out: in the order of the files.
        control: special tokens of the tokenizer, as text; those that a template writes around
            turns, not those that data may hold (reasoning and tool markers).
    """

    train: Sequence[Conversation]
    held_out: Sequence[Conversation] = ()
    control: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def names(self) -> list[str]:
        """Places of the training rows."""
        return [conversation.where for conversation in self.train]

    @cached_property
    def first_answers(self) -> list[str]:
        """The first answer of each training row; "" for plain text."""
        return [_first_answer(conversation) for conversation in self.train]

    @cached_property
    def answers(self) -> list[str]:
        """The last trained answer of each training row; "" for plain text."""
        return [_last_answer(conversation) for conversation in self.train]


# ------------------------------------------------------------------ reasoning without an end

OPEN_ENDED = "the model learns to think endlessly and never to answer"
OPEN_FIX = "generate them again with a higher limit, or remove those rows"
_THINKS = re.compile(r"\s*(<(think|thinking|thought|reasoning)>|\[(THINK)\])", re.IGNORECASE)


def begins_with_reasoning(answer: str) -> bool:
    """Whether an answer begins with a marker of reasoning."""
    return _THINKS.match(answer) is not None


def open_reasoning(conversation: Conversation) -> str:
    """The marker that opens the reasoning of a trained answer and is never closed; "" for none."""
    for message in conversation.messages:
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        hit = _THINKS.match(message["content"])
        if hit is None:
            continue
        closing = f"</{hit[2]}>" if hit[2] else f"[/{hit[3]}]"
        if closing.lower() not in message["content"].lower():
            return str(hit[1])
    return ""


# ------------------------------------------------------------------ texts


def said(conversation: Conversation) -> str:
    """All text of a row without its system message."""
    if conversation.text is not None:
        return conversation.text
    return "\n".join(_spoken(conversation))


def asked(conversation: Conversation) -> str:
    """All text of a row that is no answer."""
    return "\n".join(m["content"] for m in conversation.messages if m["role"] != "assistant")


def _spoken(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        if message["role"] in ("system", "developer"):
            continue
        if reasoning := message.get("reasoning_content"):
            yield reasoning
        if message["content"]:
            yield message["content"]
        for call in message.get("tool_calls", ()):
            yield f"{call['function']['name']} {call['function']['arguments']}"


def _first_answer(conversation: Conversation) -> str:
    found = (m["content"] for m in conversation.messages if m["role"] == "assistant")
    return str(next(found, ""))


def _last_answer(conversation: Conversation) -> str:
    for message in reversed(conversation.messages):
        if message["role"] == "assistant" and message.get("train") is not False:
            return str(message["content"])
    return ""


# A smaller share of the rows is only a note.
SOME = 0.01
LEAST_ROWS = 3
_SHOWN = 60

# What source text, markup and queries hold, and prose does not.
CODE = re.compile(
    r"```|[{};]\s*$|^\s*(?:def|class|import|from|return|SELECT|INSERT|UPDATE|function|const|let|var"
    r"|public|private|#include|<\?php|<!DOCTYPE)\b|</?[a-zA-Z][\w-]*(?:\s[^<>]*)?/?>|=>|\w\(\w*\)\s*$"
    r"|^\s*\$ |==|:=",
    re.MULTILINE,
)


def level_of(rows: Collection[int], total: int) -> Level:
    """Of a finding about some of all rows."""
    return "warning" if len(rows) >= max(LEAST_ROWS, SOME * total) else "note"


def ending(text: str) -> str:
    """The end of a text, for a finding."""
    return repr("\u2026" + text[-_SHOWN:] if len(text) > _SHOWN else text)


def opening(text: str) -> str:
    """The beginning of a text, for a finding."""
    return repr(text[:_SHOWN] + "\u2026" if len(text) > _SHOWN else text)


_DENSE = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")


def is_dense(text: str) -> bool:
    """Whether a text is of a script in which a few letters say much."""
    return len(_DENSE.findall(text)) >= 0.3 * len(text)
