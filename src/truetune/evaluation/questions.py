"""Rows to questions: what a model is asked, and what the row answers.

input   conversations of a data source
does    cuts each before its last assistant turn; puts other rows before it where shots are asked
        for, never the asked row nor one that asks the same; counts rows that cannot be asked
output  Question, LeftOut
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from truetune.behaviour.text import normalised
from truetune.data.conversation import Conversation, Message
from truetune.data.load import Loaded
from truetune.errors import DataError, UsageError
from truetune.evaluation.match import Match
from truetune.findings import merged


@dataclass(frozen=True)
class Question:
    """A row as it is asked.

    Attributes:
        where: the row's place.
        asked: shots, then the row's messages before its last assistant turn.
        answer: that turn; None if the row has none.
    """

    where: str
    asked: Conversation
    answer: Message | None

    @property
    def whole(self) -> Conversation:
        """The question with the row's answer."""
        assert self.answer is not None
        return replace(self.asked, messages=(*self.asked.messages, self.answer))

    @property
    def expected(self) -> str:
        """The row's answer as text, "" if it has none."""
        return "" if self.answer is None else str(self.answer["content"])

    @property
    def last_words(self) -> str:
        """What the user said last."""
        said = [m["content"] for m in self.asked.messages if m["role"] == "user"]
        return str(said[-1]) if said else ""


@dataclass(frozen=True)
class LeftOut:
    """Rows that are not asked, for one reason.

    Attributes:
        reason: in words.
        count: rows.
        where: the first of them.
        model: whose template or context it is; "" if it is the row alone.
    """

    reason: str
    count: int
    where: str
    model: str = ""


def questions_of(
    loaded: Loaded, match: Match, *, shots: int = 0, seed: int = 0, limit: int | None = None
) -> tuple[list[Question], list[LeftOut]]:
    """The questions of a data source, and what was left out.

    Args:
        match: rows whose answer it cannot compare with are left out.
        shots: other rows put before each question.
        seed: of their choice, which the row decides beside it: not its place among others.
        limit: the first so many conversations; shots come from all.

    Raises:
        DataError: no row can be asked.
        UsageError: there are not as many other rows as shots.
    """
    found: list[Question] = []
    missing: list[tuple[str, str]] = []
    for conversation in loaded.conversations[:limit]:
        made = _question(conversation, match)
        if isinstance(made, Question):
            found.append(made)
        else:
            missing.append((made, conversation.where))
    left = [
        LeftOut(f.what, f.count, f.where) for f in merged(loaded.findings) if f.level == "error"
    ] + grouped(missing)
    if not found:
        raise DataError(
            "no row can be used",
            why="; ".join(f"{out.count:,} rows: {out.reason} ({out.where})" for out in left[:4]),
            fix="pass rows with a prompt and an answer",
            code="nothing-to-ask",
        )
    if shots:
        pool = _Shots(loaded.conversations, shots, seed)
        found = [replace(q, asked=pool.before(q)) for q in found]
    return found, left


def grouped(missing: Iterable[tuple[str, str]], model: str = "") -> list[LeftOut]:
    """Pairs of a reason and a place, one entry a reason, the most frequent first."""
    places: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason, where in missing:
        places.setdefault(reason, where)
        counts[reason] += 1
    return [LeftOut(reason, n, places[reason], model) for reason, n in counts.most_common()]


def _question(conversation: Conversation, match: Match) -> Question | str:
    """A question, or why the row is none."""
    if conversation.text is not None:
        return "plain text has no prompt"
    messages = [{k: v for k, v in m.items() if k != "train"} for m in conversation.messages]
    at = _last_answer(messages)
    if at is None:
        if match.needs_expected:
            return "the row has no answer to compare with"
        return Question(conversation.where, replace(conversation, messages=tuple(messages)), None)
    if at == 0:
        return "nothing precedes the answer"
    asked = replace(conversation, messages=tuple(messages[:at]))
    question = Question(conversation.where, asked, messages[at])
    # A call is compared as the model's template writes it.
    unfit = "" if messages[at].get("tool_calls") else match.unfit(question.expected)
    return unfit or question


def _last_answer(messages: Sequence[Message]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if is_answer(messages[i])), None)


def is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


class _Shots:
    """Rows that can be put before a question."""

    def __init__(self, conversations: Sequence[Conversation], shots: int, seed: int) -> None:
        self.shots, self.seed = shots, seed
        self.turns: list[list[Message]] = []
        # Rows of the pool by what their users ask, in any turn.
        self.asking: dict[str, set[int]] = {}
        for conversation in conversations:
            turns = _turns(conversation)
            if not turns:
                continue
            for message in turns:
                if message["role"] == "user":
                    same = self.asking.setdefault(normalised(message["content"]), set())
                    same.add(len(self.turns))
            self.turns.append(turns)

    def before(self, question: Question) -> Conversation:
        """The question with shots before it, after its system message."""
        messages = question.asked.messages
        same = set[int]()
        for message in messages:
            if message["role"] == "user":
                same |= self.asking.get(normalised(message["content"]), set())
        if (others := len(self.turns) - len(same)) < self.shots:
            raise UsageError(
                f"--shots {self.shots} needs that many other rows, but there are only {others:,}",
                where=question.where,
                why="shots are plain rows with a question and an answer, without tools, that ask "
                "a different question from the row itself",
                fix="use fewer --shots, or more rows",
                code="too-few-shots",
            )
        rng = random.Random(f"{self.seed}/shots/{question.asked.key()}")
        drawn = rng.sample(range(len(self.turns)), self.shots + len(same))
        chosen = [row for row in drawn if row not in same][: self.shots]
        start = sum(m["role"] in ("system", "developer") for m in messages[:1])
        shown = [message for row in chosen for message in self.turns[row]]
        return replace(question.asked, messages=(*messages[:start], *shown, *messages[start:]))


def _turns(conversation: Conversation) -> list[Message]:
    """A row as an example: through its last answer, without a system message; [] for others."""
    at = _last_answer(conversation.messages)
    if not at or conversation.tools:
        return []
    kept = [
        {"role": m["role"], "content": m["content"]}
        for m in conversation.messages[: at + 1]
        if m["role"] not in ("system", "developer")
    ]
    plain = all(m["role"] in ("user", "assistant") and m["content"].strip() for m in kept)
    return kept if plain and kept[0]["role"] == "user" else []
