"""Turns in an order that a served conversation would not have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from truetune.checks.conversations.rows import DataFacts
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, rows_finding, share


@check()
def one_question_at_a_time(facts: DataFacts) -> Iterator[Finding]:
    """Two questions in a row are two prompts, or one that was cut."""
    rows = [i for i, c in enumerate(facts.train) if _doubled(c, "user")]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="user-twice",
            level="warning",
            what=f"{share(len(rows), len(facts.train))} have two user turns in a row",
            why="templates write both one after the other; a server is sent one question",
            fix="join them, or leave one out",
        )


@check()
def one_answer_at_a_time(facts: DataFacts) -> Iterator[Finding]:
    """The second of two answers is trained on a prompt that ends in an answer."""
    rows = [i for i, c in enumerate(facts.train) if _doubled(c, "assistant")]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="assistant-twice",
            level="warning",
            what=f"{share(len(rows), len(facts.train))} have two assistant turns in a row",
            why="no server sends a prompt that ends in an answer",
            fix="join them, or leave one out",
        )


def _doubled(conversation: Conversation, role: str) -> bool:
    messages = conversation.messages
    return any(
        a["role"] == b["role"] == role and a.get("name") == b.get("name")
        for a, b in pairwise(messages)
    )


@check()
def turns_say_something(facts: DataFacts) -> Iterator[Finding]:
    """An empty question; empty answers are refused when rows are read."""
    rows = [
        i
        for i, c in enumerate(facts.train)
        if any(m["role"] == "user" and not m["content"].strip() for m in c.messages)
    ]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="question-empty",
            level="warning",
            what=f"{share(len(rows), len(facts.train))} have an empty user turn",
            why="the model learns to answer what nobody asked",
            fix="leave those rows out, or fill the turn",
        )


@check()
def ends_with_an_answer(facts: DataFacts) -> Iterator[Finding]:
    """What follows the last answer is not trained, and costs nothing but shows a cut."""
    rows = [
        i for i, c in enumerate(facts.train) if c.messages and c.messages[-1]["role"] != "assistant"
    ]
    if rows:
        last = facts.train[rows[0]].messages[-1]["role"]
        yield rows_finding(
            facts.names,
            rows,
            code="answer-not-last",
            level="warning" if len(rows) > 0.01 * len(facts.train) else "note",
            what=f"{share(len(rows), len(facts.train))} end on a turn that nobody answers ({last})",
            why="conversations were cut in the middle; the last turn teaches nothing",
            fix="nothing to do, or cut them after their last answer",
        )


@check()
def system_first(facts: DataFacts) -> Iterator[Finding]:
    """A system message in the middle of a conversation."""
    rows = [
        i
        for i, c in enumerate(facts.train)
        if any(m["role"] in ("system", "developer") for m in c.messages[1:])
        and not all(m["role"] in ("system", "developer") for m in c.messages[:2])
    ]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="system-late",
            level="warning",
            what=f"{share(len(rows), len(facts.train))} have a system message after the first turn",
            why="many templates refuse it, drop it or move it to the front",
            fix="put it first, or into the user's turn",
        )
