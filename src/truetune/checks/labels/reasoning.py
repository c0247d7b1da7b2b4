"""Check reasoning in token rows: closed, not empty, and present where a served prompt has it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts, has_header, unproved
from truetune.checks.labels.table import Indices
from truetune.checks.registry import check
from truetune.findings import Finding, Level, rows_finding, share


@check()
def reasoning_closed(facts: LabelFacts) -> Iterator[Finding]:
    """Reasoning that begins in a row ends in it."""
    found = _thoughts(facts)
    if found is None:
        return
    opened, closed = found
    rows = np.flatnonzero(opened > closed).tolist()
    if not rows:
        return
    total = int(((opened > 0) | (closed > 0)).sum())
    opening, closing = facts.frame.think
    lengths = facts.table.lengths
    cut = [row for row in rows if lengths[row] == (facts.cut_at or -1)]
    level: Level = "error" if len(rows) > 0.05 * max(total, 1) else "warning"
    yield rows_finding(
        facts.names,
        rows,
        code="reasoning-unclosed",
        level=level,
        what=f"{share(len(rows), total)} that have reasoning never close its {opening!r}",
        why=f"{len(cut):,} of them were cut at {facts.cut_at:,} tokens: the model would never "
        "learn to stop thinking"
        if cut
        else f"{closing!r} is missing in the data",
        fix="raise the length limit, or remove those rows",
    )


@check(unproved)
def reasoning_not_empty(facts: LabelFacts) -> Iterator[Finding]:
    """An empty reasoning block that the template wrote is not a target."""
    found = _thoughts(facts)
    if found is None:
        return
    pairs = _blocks(facts)
    if pairs is None or not len(pairs):
        return
    table = facts.table
    empty = np.array([_is_blank(facts, start, end) for start, end in pairs.tolist()], bool)
    trained = table.supervised[pairs[:, 1]]
    hollow, real = pairs[empty & trained], pairs[~empty & trained]
    if not len(hollow):
        return
    rows = np.unique(table.rows_of(hollow[:, 0])).tolist()
    mixed = len(real) > 0
    yield rows_finding(
        facts.names,
        rows,
        code="reasoning-empty",
        level="warning" if mixed else "note",
        what=f"an empty reasoning block is a target in {share(len(rows), len(table))}",
        why="the template writes it for rows without reasoning"
        + (f"; {len(real):,} other answers reason: the model learns to skip it" if mixed else ""),
        fix="mask it, or render those rows with the template's non-thinking prompt",
    )


@check(unproved, has_header)
def reasoning_as_served(facts: LabelFacts) -> Iterator[Finding]:
    """Rows and served prompts agree on whether earlier turns keep their reasoning."""
    if facts.frame.keeps_reasoning is not False or facts.is_stream:
        return
    header, users = facts.frame.answer_start_ids, facts.frame.user_start_ids
    closings = _positions(facts, facts.frame.think[1])
    if not users or closings is None or not len(closings):
        return
    table = facts.table
    starts = table.find(header)
    asked = table.find(users)
    shown, lost = [], []
    for row in np.unique(table.rows_of(closings)).tolist():
        low, high = table.starts[row], table.starts[row + 1]
        turns = _within(starts, low, high)
        if len(turns) < 2:
            continue
        questions = _within(asked, low, high)
        last_question = max(questions, default=low)
        thoughts = _within(closings, low, high)
        earlier = [t for t in turns if t <= last_question]
        spans = list(zip(turns, [*turns[1:], int(high)], strict=True))
        thought = {a for a, b in spans if any(a <= t < b for t in thoughts)}
        if any(turn in thought for turn in earlier):
            shown.append(row)
        elif turns[-1] in thought and any(bool(table.supervised[a:b].any()) for a, b in spans[:-1]):
            lost.append(row)
    if shown:
        yield rows_finding(
            facts.names,
            shown,
            code="history-not-served",
            level="error",
            what=f"{share(len(shown), len(table))} keep the reasoning of earlier turns, but served "
            "prompts drop it",
            why="the served template deletes it from the history: the model is trained on "
            "later turns after prompts that no server sends",
            fix="train each turn on the prompt that is served before it: one row per turn, with a "
            "history without reasoning (truetune does that)",
        )
    if lost:
        yield rows_finding(
            facts.names,
            lost,
            code="reasoning-lost",
            level="warning",
            what=f"in {share(len(lost), len(table))}, the model is trained on earlier answers "
            "without their reasoning, but on the last one with it",
            why="when a conversation is rendered as a whole, the template deletes the reasoning "
            "of all turns but the last: that reasoning is not learned, and the model learns "
            "to answer first turns without thinking",
            fix="train one row per turn, so that each answer is rendered as the last one "
            "(truetune does that)",
        )


def _within(positions: Indices, low: int, high: int) -> list[int]:
    a, b = np.searchsorted(positions, [low, high])
    return positions[a:b].tolist()


def _positions(facts: LabelFacts, marker: str) -> Indices | None:
    """Where a think marker stands; None if its tokens depend on what is around it."""
    ids = facts.tokens.encode([marker])[0]
    return facts.table.find(ids) if len(ids) == 1 else None


def _thoughts(facts: LabelFacts) -> tuple[Indices, Indices] | None:
    """(R,) openings and closings of each row; None if there is no reasoning at all."""
    table = facts.table
    counts = []
    for marker in facts.frame.think:
        at = _positions(facts, marker)
        if at is not None:
            counts.append(np.bincount(table.rows_of(at), minlength=len(table)).astype(np.int64))
            continue
        if not any(marker in facts.tokens.decode(table.row_ids(r)) for r in facts.sample):
            counts.append(np.zeros(len(table), np.int64))
            continue
        counts.append(np.array([text.count(marker) for text in facts.texts], np.int64))
    return (counts[0], counts[1]) if counts[0].any() or counts[1].any() else None


def _blocks(facts: LabelFacts) -> np.ndarray | None:
    """(K, 2) positions of opening and closing markers that belong together."""
    opened, closed = (_positions(facts, marker) for marker in facts.frame.think)
    if opened is None or closed is None:
        return None
    after = np.searchsorted(closed, opened)
    inside = after < len(closed)
    opened, ends = opened[inside], closed[after[inside]]
    same = facts.table.rows_of(opened) == facts.table.rows_of(ends)
    return np.stack([opened[same], ends[same]], axis=1)


def _is_blank(facts: LabelFacts, start: int, end: int) -> bool:
    between = facts.table.ids[start + 1 : end]
    return len(between) <= 4 and not facts.tokens.decode(between.tolist()).strip()
