"""Find answers that say the same as others, that loop, and that begin with part of the prompt.

Each finding counts its rows and shows one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from truetune.behaviour.text import ends_in_circle
from truetune.checks.conversations.rows import (
    CODE,
    SOME,
    DataFacts,
    asked,
    ending,
    is_dense,
    level_of,
    opening,
)
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, rows_finding, share

# ------------------------------------------------------------------ the same answer

_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|i can(?:no|')t|cannot|unable to|as an ai|not able to|won't)\b",
    re.IGNORECASE,
)
# Shorter answers are labels; a set of few answers is a classification.
_LEAST_WORDS, _LABELS = 5, 0.2
_LEAST_COPIES = 5


@check()
def answers_differ(facts: DataFacts) -> Iterator[Finding]:
    """No answer is given word for word to many questions."""
    often = repeated_answers(facts)
    if not often:
        return
    total = sum(bool(text.strip()) for text in facts.first_answers)
    text, first = often[0]
    rows = sorted(i for _, found in often for i in found)
    refusal = bool(_REFUSAL.search(text))
    everywhere = len(first) > _ONE_ANSWER * total
    yield rows_finding(
        facts.names,
        rows,
        code="answers-identical",
        level="warning",
        what=f"{share(len(rows), total)} have an answer that other rows repeat word for word: "
        f"{opening(facts.first_answers[first[0]])} {len(first):,} times",
        why="these are refusals by the model that generated the rows: the tuned model will refuse "
        "such questions too"
        if refusal
        else "nearly all questions have this one answer, so a column or a loop variable was "
        "probably mixed up when the file was written: the model learns to give it to any "
        "question"
        if everywhere
        else "the source used a fallback or a fixed answer: the model learns to give it to any "
        "question",
        fix="match the questions with their own answers again"
        if everywhere and not refusal
        else "remove those rows, or keep a few of them if the answer is intended",
    )


# Answers with this many words are not labels; and the share of one answer that leaves no choice.
_LONG_WORDS, _ONE_ANSWER = 20, 0.6


def repeated_answers(facts: DataFacts) -> list[tuple[str, list[int]]]:
    """(answer, its rows), where many different questions have it; the most frequent first."""
    by_text: dict[str, list[int]] = defaultdict(list)
    # First answers: later ones answer thanks and small talk.
    for index, text in enumerate(facts.first_answers):
        if text.strip():
            by_text[" ".join(text.split()).lower()].append(index)
    total = sum(map(len, by_text.values()))
    labels = len(by_text) < _LABELS * total
    least = max(_LEAST_COPIES, SOME * total)
    often = []
    for text, rows in by_text.items():
        words = len(text.split())
        if len(rows) < least or words < _LEAST_WORDS:
            continue
        # A few answers to choose from are labels or replies to intents; one long one is neither.
        if labels and (words < _LONG_WORDS or len(rows) <= _ONE_ANSWER * total):
            continue
        # Copies of whole rows are reported as such.
        asked = {facts.train[i].key() for i in rows}
        if len(asked) >= max(_LEAST_COPIES, 0.5 * len(rows)):
            often.append((text, rows))
    return sorted(often, key=lambda item: -len(item[1]))


# ------------------------------------------------------------------ loops

_REPEATS = re.compile(
    r"\b(?:repeat\w*|repetition\w*|\d+ times|loops?|chorus|lyrics|songs?|mantra|chant\w*|copies"
    r"|ascii|again and again|over and over)\b",
    re.IGNORECASE,
)


@check()
def answers_come_to_an_end(facts: DataFacts) -> Iterator[Finding]:
    """No answer ends with the same words over and over."""
    rows = [
        i
        for i, text in enumerate(facts.answers)
        if _loops(text) and not _REPEATS.search(asked(facts.train[i]))
    ]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="answer-loops",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} end with the same words "
            f"over and over, such as {ending(facts.answers[rows[0]])}",
            why="the model that generated them did not stop: the tuned model learns to repeat "
            "itself endlessly",
            fix="generate them again, or cut them where the repetition begins",
        )


def _loops(text: str) -> bool:
    words = list(text) if is_dense(text) else text.split()
    # The last word may be cut.
    if not (ends_in_circle(words) or ends_in_circle(words[:-1])):
        return False
    # Signs, figures, cells and code repeat for good reasons.
    tail = "".join(words[-16:])
    letters = 4 * sum(map(str.isalpha, tail)) > len(tail)
    return letters and "|" not in tail and not CODE.search(text)


# ------------------------------------------------------------------ what belongs to a prompt

_ROLE_FIRST = re.compile(
    r"\s*[*#_\[(<]{0,3}\s*(?:assistant|ai assistant|chatgpt|gpt(?:-\d\S*)?|bot|chatbot|ai|model)"
    r"\s*[*\])>]{0,3}\s*:\s",
    re.IGNORECASE,
)


@check()
def answers_without_role(facts: DataFacts) -> Iterator[Finding]:
    """Answers do not open with the name of the speaker."""
    rows = [i for i, text in enumerate(facts.answers) if _ROLE_FIRST.match(text)]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="answer-role-first",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} begin with the name of a "
            f"role, such as {opening(facts.answers[rows[0]])}",
            why="the rows were cut from a transcript without removing the speaker's name: the "
            "template already writes the role, and the model learns to write it again",
            fix="remove the name of the role from the answers",
        )


# Shorter questions are repeated by accident.
_LEAST_ECHO = 20


@check()
def questions_not_echoed(facts: DataFacts) -> Iterator[Finding]:
    """Answers do not begin with the whole question."""
    rows = []
    for index, conversation in enumerate(facts.train):
        asked, said = _last_exchange(conversation)
        if len(asked) < _LEAST_ECHO or not said.startswith(asked):
            continue
        # A text that comes back as it was is an edit with nothing to change; code is gone on with.
        edits = said == asked and conversation.messages[0]["role"] == "system"
        if not edits and not CODE.search(asked):
            rows.append(index)
    if rows:
        answer = facts.answers[rows[0]]
        yield rows_finding(
            facts.names,
            rows,
            code="question-echoed",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} begin with their question, "
            f"word for word: {opening(answer)}",
            why="prompt and completion were saved as one text: the model learns to repeat the "
            "question before it answers",
            fix="remove the question from the answers",
        )


def _last_exchange(conversation: Conversation) -> tuple[str, str]:
    """(the last question, the trained answer after it), spaces and case aside."""
    asked = ""
    found = ("", "")
    for message in conversation.messages:
        text = " ".join(message["content"].split()).lower()
        if message["role"] == "user":
            asked = text
        elif message["role"] == "assistant" and asked:
            found, asked = (asked, text), ""
    return found
