"""Find turns in an order that does not occur in served conversations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from truetune.checks.conversations.rows import DataFacts
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, rows_finding, share


@check()
def one_question_at_a_time(facts: DataFacts) -> Iterator[Finding]:
    """No user turn follows a user turn."""
    rows = [i for i, c in enumerate(facts.train) if _doubled(c, "user")]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="user-twice",
            level="warning",
            what=f"{share(len(rows), len(facts.train))} have two consecutive user turns",
            why="templates write both one after the other, but a server receives one question at "
            "a time",
            fix="join them, or remove one",
        )


@check()
def one_answer_at_a_time(facts: DataFacts) -> Iterator[Finding]:
    """No assistant turn follows an assistant turn."""
    rows = [i for i, c in enumerate(facts.train) if _doubled(c, "assistant")]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="assistant-twice",
            level="warning",
            what=f"{share(len(rows), len(facts.train))} have two consecutive assistant turns",
            why="the model is trained to write the second answer after a prompt that ends with an "
            "answer, which no server sends",
            fix="join them, or remove one",
        )


def _doubled(conversation: Conversation, role: str) -> bool:
    messages = conversation.messages
    return any(
        a["role"] == b["role"] == role and a.get("name") == b.get("name")
        for a, b in pairwise(messages)
    )


@check()
def turns_say_something(facts: DataFacts) -> Iterator[Finding]:
    """No user turn is empty; empty answers are refused when rows are read."""
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
            why="the model learns to answer without a question",
            fix="remove those rows, or fill in the turn",
        )


@check()
def ends_with_an_answer(facts: DataFacts) -> Iterator[Finding]:
    """Conversations end with an answer: later turns are not trained, and suggest truncation."""
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
            what=f"{share(len(rows), len(facts.train))} end with an unanswered turn ({last})",
            why="the conversations were cut in the middle; the model is not trained on the last "
            "turn",
            fix="nothing to do; or cut the conversations after their last answer",
        )


@check()
def system_first(facts: DataFacts) -> Iterator[Finding]:
    """System messages come first."""
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
            why="many chat templates refuse it, drop it or move it to the front",
            fix="put it first, or move its text into the user turn",
        )
