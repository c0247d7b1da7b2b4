"""Do the labels lie on the answers? Asked where the template says what stands before one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts, has_header, of_turns, unproved
from truetune.checks.labels.table import Indices
from truetune.checks.registry import check
from truetune.findings import Finding, Level, rows_finding, share

# A mask that is off by some tokens; more is a choice, such as leaving the reasoning out.
_SLIP = 4
# Tokens of a hole in the labels of an answer, and holes an answer beyond which they are chosen.
_HOLE, _CHOSEN = 8, 3


@check(unproved, has_header, of_turns)
def answers_are_targets(facts: LabelFacts) -> Iterator[Finding]:
    """A row that has answers and labels has labels on an answer."""
    table, header = facts.table, facts.frame.answer_start_ids
    # The line break behind the marker belongs to the prompt.
    starts = table.find(header) + len(header) + 1
    rows = table.rows_of(starts - 1)
    ends = np.flatnonzero(np.isin(table.ids, list(facts.frame.ends)))
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
            facts.names,
            bad,
            code="answers-masked",
            level="error",
            what=f"{share(len(bad), len(table))} have labels, and none of them on an answer",
            why="the mask is the wrong way round, or marks another turn: prompts are learned and "
            "answers are not",
            fix="-100 on what the server sends, the ids themselves on what the model must write",
        )


@check(unproved, has_header, of_turns)
def answers_are_whole(facts: LabelFacts) -> Iterator[Finding]:
    """Labels begin where the prompt ends, not a few tokens later."""
    table, header = facts.table, facts.frame.answer_start_ids
    if not len(table.runs):
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
            facts.names,
            bad,
            code="answer-start-masked",
            level="warning",
            what=f"the first tokens of the answer have no label in {share(len(bad), len(table))}",
            why="the mask is some tokens too long: the model never learns how answers begin",
            fix="count the prompt with the template's own generation prompt: its ids are the ones "
            "without a label",
        )


@check(unproved, has_header, of_turns)
def headers_unlearned(facts: LabelFacts) -> Iterator[Finding]:
    """What opens an answer is written by the server, and no target where the question is none."""
    table, header = facts.table, facts.frame.answer_start_ids
    blank = [not facts.tokens.decode([i]).strip() for i in header]
    starts = table.find(header)
    starts = starts[starts > table.starts[table.rows_of(starts)]]
    asked = table.supervised[starts - 1]
    # The token that ends the question belongs to it; what is only white space teaches nothing.
    on = np.zeros(len(starts), bool)
    for offset, is_blank in enumerate(blank):
        if not is_blank:
            on |= table.supervised[starts + offset]
    rows = sorted({int(r) for r in table.rows_of(starts[on & ~asked])})
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="header-supervised",
            level="warning",
            what=f"the header of the answer, {facts.frame.answer_start!r}, has labels in "
            f"{share(len(rows), len(table))}, and the question before it has none",
            why="the server writes the header itself: the mask ends some tokens early, and the "
            "model learns to open a turn",
            fix="mask as many tokens as the served prompt has: the template's generation prompt "
            "(add_generation_prompt=True) included",
        )


@check(unproved, of_turns)
def answers_have_no_holes(facts: LabelFacts) -> Iterator[Finding]:
    """Labels do not stop and go on again inside an answer."""
    table = facts.table
    holes = label_holes(facts)
    if not len(holes):
        return
    rows, times = np.unique(table.rows_of(table.runs[holes, 0]), return_counts=True)
    judged = int((table.num_supervised > 0).sum())
    # Who trains on chosen tokens alone leaves many out of each answer, knowingly.
    chosen = float(times.mean()) > _CHOSEN and len(rows) > 0.5 * judged
    first = int(holes[0])
    gap = table.ids[table.runs[first, 1] + 1 : table.runs[first + 1, 0]].tolist()
    level: Level = "error" if len(rows) > 0.01 * judged else "warning"
    yield rows_finding(
        facts.names,
        rows.tolist(),
        code="answer-hole",
        level="note" if chosen else level,
        what=f"{share(len(rows), judged)} have tokens without a label inside an answer, such as "
        f"{facts.tokens.decode(gap)!r}",
        why="labels stop and go on again: the model is trained on what follows these tokens, and "
        "never to write them",
        fix="labels on every token of the answer, from the served prompt through the end token",
    )


def label_holes(facts: LabelFacts) -> Indices:
    """The runs of labels behind which a few tokens of the same line have none, before the labels
    go on; not where a turn or an inserted text lies between."""
    table, tokens = facts.table, facts.tokens
    runs = table.runs
    if len(runs) < 2:
        return np.zeros(0, np.int64)
    rows = table.rows_of(runs[:, 0])
    gaps = runs[1:, 0] - runs[:-1, 1] - 1
    near = np.flatnonzero((rows[1:] == rows[:-1]) & (gaps <= _HOLE))
    special = tokens.special_ids | facts.frame.ends
    found = []
    for run in near.tolist():
        gap = table.ids[runs[run, 1] + 1 : runs[run + 1, 0]].tolist()
        if special.isdisjoint([*gap, int(table.ids[runs[run, 1]])]):
            text = tokens.decode(gap)
            if text.strip() and "\n" not in text:
                found.append(run)
    return np.array(found, np.int64)


def _is_text(facts: LabelFacts, start: int, end: int) -> bool:
    """Whether tokens between marker and labels are part of an answer: more than white space, and
    nothing that a template writes (special tokens, reasoning markers)."""
    gap = facts.table.ids[start:end].tolist()
    if any(token in facts.tokens.special_ids for token in gap):
        return False
    text = facts.tokens.decode(gap).strip()
    return bool(text) and not any(marker.strip("<>/") in text for marker in facts.frame.think)
