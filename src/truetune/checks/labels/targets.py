"""Check which tokens are targets: the right ones, at the right positions, neither none nor all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts, of_turns
from truetune.checks.labels.table import IGNORED
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding, share


@check()
def labels_in_place(facts: LabelFacts) -> Iterator[Finding]:
    """Each label is the id at its position: causal models shift the labels themselves."""
    table = facts.table
    on = table.labels != IGNORED
    wrong = on & (table.labels != table.ids)
    if not wrong.any():
        return
    positions = np.flatnonzero(wrong)
    rows = np.unique(table.rows_of(positions))
    shift = _shift(facts, positions)
    name = {1: "the next token", -1: "the token before"}.get(shift, "")
    yield rows_finding(
        facts.names,
        rows.tolist(),
        code="labels-misaligned",
        level="error",
        what=f"labels are {name} instead of the token at their position"
        if name
        else "labels differ from the tokens at their positions",
        why="the labels were shifted, and the model shifts them again, so each position learns "
        "the token after the next; the loss looks healthy"
        if shift == 1
        else "a label that differs from its token teaches a continuation that is not in the data",
        fix="use labels = input_ids, with -100 where nothing is to be learned, and do not shift "
        "them",
    )


def _shift(facts: LabelFacts, positions: np.ndarray) -> int:
    """By how much the wrong labels are off; 0 where they are off by no constant."""
    ids, labels = facts.table.ids, facts.table.labels
    for step in (1, -1):
        at = positions + step
        inside = (at >= 0) & (at < len(ids))
        if inside.any() and (ids[at[inside]] == labels[positions[inside]]).mean() > 0.9:
            return step
    return 0


@check()
def something_supervised(facts: LabelFacts) -> Iterator[Finding]:
    """A row without a label costs compute and teaches nothing."""
    table = facts.table
    rows = np.flatnonzero(table.num_supervised == 0).tolist()
    if not rows:
        return
    yield rows_finding(
        facts.names,
        rows,
        code="nothing-supervised",
        level="error",
        what=f"no token is a target in {share(len(rows), len(table))}",
        why=_why_nothing(facts, rows),
        fix="remove those rows, or correct the code that marks the answers",
    )


def _why_nothing(facts: LabelFacts, rows: list[int]) -> str:
    lengths = facts.table.lengths[rows]
    if facts.cut_at and (lengths == facts.cut_at).mean() > 0.5:
        return (
            f"the prompt alone fills the length limit of {facts.cut_at:,} tokens: the answer was "
            "cut off"
        )
    if not lengths.any():
        return "the rows are empty"
    if facts.frame.answer_start and not facts.answer_starts[rows].any():
        return (
            f"they do not contain what precedes an answer, {facts.frame.answer_start!r}: the mask "
            "looks for a marker that the rendered text does not have"
        )
    return (
        "nothing in them was recognised as an answer: the marker or mask that separates answers "
        "from prompts does not fit the rendered rows"
    )


@check()
def padding_unsupervised(facts: LabelFacts) -> Iterator[Finding]:
    """Padding has no labels: the model would learn to pad."""
    rows = facts.table.padding_supervised
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="padding-supervised",
            level="warning",
            what=f"padding has labels in {share(len(rows), len(facts.table))}",
            why="the model is trained to write pad tokens, and real tokens count less in the loss",
            fix="set labels to -100 wherever the attention mask is 0",
        )


@check(of_turns)
def prompts_masked(facts: LabelFacts) -> Iterator[Finding]:
    """Prompts are trained in all rows or in none."""
    table = facts.table
    with_labels = table.num_supervised > 0
    everything = (table.num_supervised >= table.lengths - 1) & with_labels
    num, total = int(everything.sum()), int(with_labels.sum())
    if not num:
        return
    if facts.loss_on in ("assistant", "last"):
        yield rows_finding(
            facts.names,
            np.flatnonzero(everything).tolist(),
            code="prompt-supervised",
            level="error",
            what="loss on answers only was requested, but all tokens are targets in "
            f"{share(num, total)}",
            why="the mask that marks the answers was lost",
            fix="build the labels with a mask, or request loss on all tokens",
        )
    elif 0 < num < total and 0.01 < num / total < 0.99:
        yield rows_finding(
            facts.names,
            np.flatnonzero(everything).tolist(),
            code="loss-mask-mixed",
            level="error",
            what=f"{share(num, total)} train on prompt and answer, but the others only on the "
            "answer",
            why="the rows come from two pipelines, or the mask was not found in some of them",
            fix="mask the prompt in all rows, or in none",
        )
    elif num == total and facts.loss_on is None:
        yield rows_finding(
            facts.names,
            np.flatnonzero(everything).tolist(),
            code="loss-on-everything",
            level="note",
            what=f"every token is a target, including prompts: {int(table.num_supervised.sum()):,} "
            "tokens",
            why="several trainers do this by default for chat rows",
            fix="nothing to do if this is intended; otherwise mask everything but the answers",
        )
