"""Check what is between the markers of a conversation: answers are not empty, end tokens end
turns, and questions are not trained.

The ids suffice; no text of the data is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from truetune.checks.labels.facts import LabelFacts, has_header, of_turns, once, unproved
from truetune.checks.labels.stops import closed_at_limit, over_space
from truetune.checks.labels.table import Indices, TokenTable
from truetune.checks.registry import check
from truetune.contract.frame import served_ids
from truetune.findings import Finding, rows_finding, share

# More rows than these are no accident of the text: the template itself goes on after the token.
_ACCIDENTS = 0.3
# Tokens after an end that are decoded, to see whether a turn begins there.
_LOOK = 12


@check(has_header, of_turns)
def answers_say_something(facts: LabelFacts) -> Iterator[Finding]:
    """No answer that is trained is empty; a template may write an empty turn of the history."""
    table = facts.table
    empty = _empty_answers(facts, table)
    own = _template_empties(facts)
    if facts.proved or own:
        empty = [(row, at) for row, at in empty if table.supervised[at]]
    if rows := {row for row, _ in empty} - set(closed_at_limit(facts)):
        yield rows_finding(
            facts.names,
            rows,
            code="empty-answer",
            level="warning",
            what=f"{share(len(rows), len(table))} have an empty answer",
            why="the template writes an empty answer next to a call, and it has labels: the model "
            "learns to write nothing"
            if own
            else "the data has an empty answer, or its text contains control tokens, which open a "
            "turn: the model learns to write nothing",
            fix="set labels on calls and on non-empty answers, and -100 on the rest"
            if own
            else "remove those rows; if the text contains control tokens, break them up (a space "
            "after the first character)",
        )


def _empty_answers(facts: LabelFacts, table: TokenTable) -> list[tuple[int, int]]:
    """(row, position of its end) of each answer that ends where it begins."""
    header, ends = facts.frame.answer_start_ids, list(facts.frame.ends)
    found = []
    for start in (table.find(header) + len(header)).tolist():
        row = int(table.rows_of(np.array([start - 1]))[0])
        # A line break may belong to the marker.
        tokens = table.ids[start : min(start + 3, int(table.starts[row + 1]))].tolist()
        at = next((n for n, token in enumerate(tokens) if token in ends), None)
        if at is not None and not facts.tokens.decode(tokens[:at]).strip():
            found.append((row, start + at))
    return found


@once
def _template_empties(facts: LabelFacts) -> bool:
    """Whether the template itself writes an empty answer next to a call."""
    ids = np.array(_served_call(facts), np.int64)
    # One that leaves the call out makes an empty answer of it.
    if _NAME not in facts.tokens.decode(ids.tolist()):
        return False
    served = TokenTable.of_documents([(ids, ids, np.ones_like(ids))], ["served"])
    return bool(_empty_answers(facts, served))


@check(of_turns)
def ends_end_turns(facts: LabelFacts) -> Iterator[Finding]:
    """After the token that ends a turn, another turn begins or the row ends."""
    frame, table = facts.frame, facts.table
    end = frame.terminator
    if end is None or end not in frame.tokens.special_ids:
        return
    hits = np.flatnonzero(table.ids == end)
    rows = table.rows_of(hits)
    after = over_space(facts, hits + 1, table.starts[rows + 1])
    inside = after < table.starts[rows + 1]
    hits, rows, after = hits[inside], rows[inside], after[inside]
    special = np.isin(table.ids[after], list(frame.tokens.special_ids | frame.ends))
    openings = _openings(facts)
    suspects: dict[int, int] = {}
    for at, row in zip(after[~special].tolist(), rows[~special].tolist(), strict=True):
        text = frame.tokens.decode(table.ids[at : at + _LOOK].tolist()).lstrip()
        if row not in suspects and not text.startswith(openings):
            suspects[row] = at
    if not suspects or len(suspects) > _ACCIDENTS * len(table):
        return
    name = repr(frame.tokens.decode([end]))
    first = min(suspects)
    going_on = frame.tokens.decode(table.ids[suspects[first] :][:6].tolist())
    yield rows_finding(
        facts.names,
        suspects,
        code="control-token-in-content",
        level="warning",
        what=f"{share(len(suspects), len(table))} continue a turn after {name}",
        why=f"the text itself contains the token, and continues with {going_on!r}: the tokenizer "
        "turns it into the real end token, and a model that is trained on it stops there",
        fix="remove it from the data, or break it up (a space after the first character)",
    )


def _openings(facts: LabelFacts) -> tuple[str, ...]:
    """Texts that begin a turn after an end, where a template writes them in plain letters."""
    end = facts.tokens.decode([facts.frame.terminator or 0])
    found = []
    for marker in (facts.frame.user_start, facts.frame.answer_start):
        behind = marker.rpartition(end)[2].strip()
        found += [text for text in (behind, marker.strip()) if text]
    return tuple(found) or ("\0",)


@check(unproved, has_header, of_turns)
def questions_unlearned(facts: LabelFacts) -> Iterator[Finding]:
    """If the first question has no labels, later questions have none either."""
    table, frame = facts.table, facts.frame
    header, users = frame.answer_start_ids, frame.user_start_ids
    if not users:
        return
    answers, asked = table.find(header), table.find(users) + len(users)
    if not len(answers) or not len(asked):
        return
    rows = table.rows_of(asked - 1)
    # The answer that follows a question, in the same row.
    following = np.searchsorted(answers, asked)
    known = following < len(answers)
    asked, rows, stop = asked[known], rows[known], answers[following[known]]
    first = table.rows_of(answers)
    opened = np.full(len(table), np.iinfo(np.int64).max)
    opened[first[::-1]] = answers[::-1]
    same = (table.rows_of(stop) == rows) & (asked > opened[rows])
    asked, rows, stop = asked[same], rows[same], stop[same]
    counted = np.concatenate([[0], np.cumsum(table.supervised)])
    learned = counted[stop] - counted[asked] > 0.5 * np.maximum(stop - asked, 1)
    starts = table.starts[:-1]
    prompt = np.minimum(opened, table.starts[1:])
    masked = counted[prompt] - counted[starts] == 0
    # Results of tools may stand in turns of the user.
    results = _tool_results(facts)
    is_result = np.isin(asked[:, None] + np.arange(-len(users), 2), results).any(axis=1)
    bad = sorted({int(r) for r in rows[learned & ~is_result] if masked[r]})
    tools = [row for row in _learned(facts, results, answers) if masked[row]]
    if tools:
        yield rows_finding(
            facts.names,
            tools,
            code="question-supervised",
            level="warning",
            what=f"{share(len(tools), len(table))} train on the results of tools, but not on the "
            "question",
            why="the mask ends at the first answer or call: everything after it is a target, and "
            "the model learns to invent what its tools return",
            fix="set labels on every answer and call and -100 on every other turn (truetune does "
            "that)",
        )
    if bad:
        yield rows_finding(
            facts.names,
            bad,
            code="question-supervised",
            level="warning",
            what=f"{share(len(bad), len(table))} train on the user's later turns, but not on the "
            "first one",
            why="the mask ends at the first answer: everything after it is a target, and the "
            "model learns to ask the next question itself",
            fix="set labels on every answer and -100 on every other turn (truetune does that)",
        )


_NAME, _RESULT = "upsilon", "Omicron"


@once
def _served_call(facts: LabelFacts) -> list[int]:
    """A served prompt that ends with the result of a tool; [] if the template takes none."""
    contract = facts.frame.contract
    if contract is None:
        return []
    call = {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {}}}
    talk: list[Mapping[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": _NAME, "tool_call_id": "call00001", "content": _RESULT},
    ]
    return served_ids(contract, {}, talk) or []


@once
def _tool_results(facts: LabelFacts) -> Indices:
    """First positions of what the template writes before the result of a tool; empty if that is
    not known."""
    unknown = np.zeros(0, np.int64)
    text = facts.tokens.decode(_served_call(facts))
    if text.count(_RESULT) != 1:
        return unknown
    before = text.partition(_RESULT)[0]
    for end in (facts.tokens.decode([i]) for i in facts.frame.ends if i >= 0):
        before = before.rpartition(end)[2]
    # What quotes the result is no part of it.
    opening = facts.tokens.encode([re.sub(r"[^\w>\]]+\Z", "", before).strip()])[0]
    special = facts.tokens.special_ids
    if special.isdisjoint(opening):
        return unknown
    # A last token of letters may merge with what follows.
    return facts.table.find(opening if opening[-1] in special else opening[:-1])


def _learned(facts: LabelFacts, begins: Indices, answers: Indices) -> list[int]:
    """Rows with labels on most of the text from one of these positions to the next answer."""
    table, found = facts.table, set()
    ends = np.append(answers, len(table.ids))[np.searchsorted(answers, begins)]
    for begin, end, row in zip(begins, ends, table.rows_of(begins), strict=True):
        stop = min(int(end), int(table.starts[row + 1]))
        if table.supervised[int(begin) : stop].mean() > 0.5:
            found.add(int(row))
    return sorted(found)
