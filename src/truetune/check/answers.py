"""Do the labels lie on the answers? Asked where the template says what stands before one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from truetune.check.facts import LabelFacts, rows_finding, share
from truetune.findings import Finding

# A mask that is off by some tokens; more is a choice, such as leaving the reasoning out.
_SLIP = 4


def answers_are_targets(facts: LabelFacts) -> Iterator[Finding]:
    """A row that has answers and labels has labels on an answer."""
    table, header = facts.table, facts.markers.answer_start_ids
    if facts.proved or facts.plain or facts.is_stream or not header or not len(table):
        return
    # The line break behind the marker belongs to the prompt.
    starts = table.find(header) + len(header) + 1
    rows = table.rows_of(starts - 1)
    ends = np.flatnonzero(np.isin(table.ids, list(facts.markers.ends)))
    after = np.searchsorted(ends, starts)
    stops = np.minimum(np.append(ends, len(table.ids))[after], table.starts[rows + 1])
    counted = np.concatenate([[0], np.cumsum(table.supervised)])
    filled = stops > starts
    on = np.zeros(len(starts), np.int64)
    on[filled] = counted[stops[filled]] - counted[starts[filled]]
    has = np.bincount(rows[filled], minlength=len(table)) > 0
    trained = np.bincount(rows, weights=on, minlength=len(table)) > 0
    bad = np.flatnonzero(has & ~trained & (table.num_supervised > 0)).tolist()
    if bad:
        yield rows_finding(
            facts,
            bad,
            code="answers-masked",
            level="error",
            what=f"{share(len(bad), len(table))} have labels, and none of them on an answer",
            why="the mask is the wrong way round, or marks another turn: prompts are learned and "
            "answers are not",
            fix="-100 on what the server sends, the ids themselves on what the model must write",
        )


def answers_are_whole(facts: LabelFacts) -> Iterator[Finding]:
    """Labels begin where the prompt ends, not a few tokens later."""
    table, header = facts.table, facts.markers.answer_start_ids
    if facts.proved or facts.plain or facts.is_stream or not header or not len(table.runs):
        return
    begins = table.runs[:, 0]
    heads = table.find(header) + len(header)
    if not len(heads):
        return
    before = np.searchsorted(heads, begins, side="right") - 1
    rows = table.rows_of(begins)
    known = (before >= 0) & (begins - heads[np.maximum(before, 0)] <= _SLIP + 1)
    known &= table.rows_of(heads[np.maximum(before, 0)] - 1) == rows
    bad = {
        int(rows[i])
        for i in np.flatnonzero(known)
        if _is_text(facts, int(heads[before[i]]), int(begins[i]))
    }
    if len(bad) > 0.2 * max(int(known.sum()), 1):
        yield rows_finding(
            facts,
            bad,
            code="answer-start-masked",
            level="warning",
            what=f"the first tokens of the answer have no label in {share(len(bad), len(table))}",
            why="the mask is some tokens too long: the model never learns how answers begin",
            fix="count the prompt with the template's own generation prompt: its ids are the ones "
            "without a label",
        )


def _is_text(facts: LabelFacts, start: int, end: int) -> bool:
    """Whether tokens between marker and labels are part of an answer: more than white space, and
    nothing that a template writes (special tokens, reasoning markers)."""
    gap = facts.table.ids[start:end].tolist()
    if any(token in facts.markers.tokens.special_ids for token in gap):
        return False
    text = facts.markers.tokens.decode(gap).strip()
    return bool(text) and not any(marker.strip("<>/") in text for marker in facts.markers.think)


CHECKS: tuple[Callable[[LabelFacts], Iterator[Finding]], ...] = (
    answers_are_targets,
    answers_are_whole,
)
