"""What stands between the markers of a conversation: answers that say something, ends that end,
and questions that nobody is trained to ask. Told from ids; no text of the data is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from truetune.checks.facts import LabelFacts, rows_finding, share
from truetune.checks.table import Indices
from truetune.findings import Finding

# More rows than these are no accident of the text: the template itself goes on behind the token.
_ACCIDENTS = 0.3
# Tokens behind an end that are decoded, to see whether a turn begins there.
_LOOK = 12


def answers_say_something(facts: LabelFacts) -> Iterator[Finding]:
    """Behind what opens an answer stands more than its end."""
    table, header = facts.table, facts.markers.answer_start_ids
    if facts.plain or facts.is_stream or not header or not len(table):
        return
    starts = table.find(header) + len(header)
    ends = list(facts.markers.ends)
    empty = []
    for start in starts.tolist():
        row = int(table.rows_of(np.array([start - 1]))[0])
        # A line break may belong to the marker.
        tokens = table.ids[start : min(start + 3, int(table.starts[row + 1]))].tolist()
        at = next((n for n, token in enumerate(tokens) if token in ends), None)
        if at is not None and not facts.markers.tokens.decode(tokens[:at]).strip():
            empty.append(row)
    if empty:
        rows = set(empty)
        yield rows_finding(
            facts,
            rows,
            code="empty-answer",
            level="warning",
            what=f"{share(len(rows), len(table))} have an answer that ends where it begins",
            why="an empty answer in the data, or control tokens in what somebody wrote, which open "
            "a turn of their own: the model learns to say nothing",
            fix="leave those rows out; where it is text that was written, break the tokens up "
            "(a space after the first character)",
        )


def ends_end_turns(facts: LabelFacts) -> Iterator[Finding]:
    """Behind the token that ends a turn begins another one, or nothing."""
    markers, table = facts.markers, facts.table
    end = markers.terminator
    if facts.plain or facts.is_stream or end is None or not len(table):
        return
    if end not in markers.tokens.special_ids:
        return
    hits = np.flatnonzero(table.ids == end)
    rows = table.rows_of(hits)
    after = _next_solid(facts, hits + 1, table.starts[rows + 1])
    inside = after < table.starts[rows + 1]
    hits, rows, after = hits[inside], rows[inside], after[inside]
    special = np.isin(table.ids[after], list(markers.tokens.special_ids | markers.ends))
    openings = _openings(facts)
    suspects: dict[int, int] = {}
    for at, row in zip(after[~special].tolist(), rows[~special].tolist(), strict=True):
        text = markers.tokens.decode(table.ids[at : at + _LOOK].tolist()).lstrip()
        if row not in suspects and not text.startswith(openings):
            suspects[row] = at
    if not suspects or len(suspects) > _ACCIDENTS * len(table):
        return
    name = repr(markers.tokens.decode([end]))
    first = min(suspects)
    going_on = markers.tokens.decode(table.ids[suspects[first] :][:6].tolist())
    yield rows_finding(
        facts,
        suspects,
        code="control-token-in-content",
        level="warning",
        what=f"{share(len(suspects), len(table))} go on inside a turn behind {name}",
        why=f"the text itself holds the token, and goes on with {going_on!r}: the tokenizer makes "
        "the real end of it, and a model that was trained on it stops there",
        fix="take it out of the data, or break it up (a space after the first character)",
    )


def _openings(facts: LabelFacts) -> tuple[str, ...]:
    """Texts that begin a turn behind an end, where a template writes them in plain letters."""
    end = facts.markers.tokens.decode([facts.markers.terminator or 0])
    found = []
    for marker in (facts.markers.user_start, facts.markers.answer_start):
        behind = marker.rpartition(end)[2].strip()
        found += [text for text in (behind, marker.strip()) if text]
    return tuple(found) or ("\0",)


def _next_solid(facts: LabelFacts, first: Indices, end: Indices) -> Indices:
    """The first position from `first` on, before `end`, that is no whitespace."""
    at, tokens = first.copy(), facts.markers.tokens
    while True:
        inside = np.flatnonzero(at < end)
        ids = facts.table.ids[at[inside]]
        blank = {
            i
            for i in np.unique(ids).tolist()
            if i not in tokens.special_ids and not tokens.decode([i]).strip()
        }
        moving = inside[np.isin(ids, list(blank))]
        if not len(moving):
            return at
        at[moving] += 1


def questions_unlearned(facts: LabelFacts) -> Iterator[Finding]:
    """Where the first question has no labels, later ones have none either."""
    table, markers = facts.table, facts.markers
    header, users = markers.answer_start_ids, markers.user_start_ids
    if facts.proved or facts.plain or facts.is_stream or not header or not users:
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
    bad = sorted({int(r) for r in rows[learned] if masked[r]})
    if bad:
        yield rows_finding(
            facts,
            bad,
            code="question-supervised",
            level="warning",
            what=f"{share(len(bad), len(table))} train on the user's later turns, and not on the "
            "first one",
            why="the mask was made once, up to the first answer: everything behind it is a target, "
            "and the model learns to ask the next question itself",
            fix="labels on every answer and -100 on every turn between them (truetune does that)",
        )


CHECKS: tuple[Callable[[LabelFacts], Iterator[Finding]], ...] = (
    answers_say_something,
    ends_end_turns,
    questions_unlearned,
)
