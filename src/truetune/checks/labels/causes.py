"""Find rows for which one cause explains all other symptoms; only that cause is reported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from truetune.checks.labels import targets, vocabulary
from truetune.checks.labels.facts import LabelFacts
from truetune.checks.labels.markers import markers_split, template_twice
from truetune.checks.registry import ask
from truetune.findings import Finding, rows_finding, share

# A finding and the rows that it explains; None if there are none.
Told = tuple[Finding, Sequence[int]] | None


def told_apart(facts: LabelFacts) -> tuple[list[Finding], LabelFacts]:
    """(findings that explain whole rows, the facts of the other rows). Labels of documents are
    still compared with their ids.
    """
    found: list[Finding] = []
    for cause in _CAUSES:
        if facts.proved or not len(facts.table) or (said := cause(facts)) is None:
            continue
        finding, rows = said
        found.append(finding)
        keep = np.ones(len(facts.table), bool)
        keep[list(rows)] = False
        if cause is _plain_rows:
            documents = dataclasses.replace(facts, table=facts.table.select(~keep), is_text=True)
            found += [f for room in (vocabulary, targets) for f in ask(room, documents)]
        facts = dataclasses.replace(facts, table=facts.table.select(keep))
    return found, facts


# ------------------------------------------------------------------ markers

_WORD = re.compile(r"[A-Za-z_]{2,20}")


def _markers_lost(facts: LabelFacts) -> Told:
    """Rows keep the control tokens around the template's role names."""
    table, cuts = facts.table, facts.separators
    if cuts is None or not facts.turn_markers:
        return None
    question, answered = (_without_tokens(facts, text) for text in (cuts.question, cuts.answered))
    if not all(_WORD.fullmatch(t.strip()) and t.endswith("\n") for t in (question, answered)):
        return None
    openings = (
        question,
        *(_without_tokens(facts, t) for t in (cuts.head, *(cuts.system or ())[:1])),
    )
    first = {text.lstrip().partition("\n")[0].strip() for text in openings} - {""}
    turn = re.compile(rf"(?<![^\W_]){re.escape(question.lstrip())}[\s\S]+?{re.escape(answered)}")
    rows = []
    for row in np.flatnonzero(~_has(facts, facts.turn_markers)).tolist():
        # A role word in the middle of a text is no turn: the first line has one alone.
        text = facts.tokens.decode(table.row_ids(row)).lstrip()
        line = text.partition("\n")[0].strip()
        if line in first and turn.search(text):
            rows.append(row)
    # A text about such a form is one row.
    if len(rows) < min(2, len(table)):
        return None
    everywhere = len(rows) > 0.9 * len(table)
    finding = rows_finding(
        facts.names,
        rows,
        code="markers-lost",
        # A base model may well be served in the form of its rows; an instruct model is not.
        level="warning" if everywhere and not facts.frame.own_stop_is_terminator else "error",
        what=f"{share(len(rows), len(table))} contain the role names of the chat template, "
        f"{question.strip()!r} and {answered.strip()!r}, without the control tokens around "
        "them",
        why="rendered rows were decoded with skip_special_tokens=True, or saved without their "
        "control tokens, and tokenized again: no server sends such a prompt, and the model "
        "learns neither where a turn begins nor how to end it",
        fix="provide the rows as messages, so that the tokenizer's chat template renders them once",
    )
    return finding, rows


def _without_tokens(facts: LabelFacts, text: str) -> str:
    """A text as it is decoded without the added tokens."""
    for token in sorted(facts.tokens.added_texts, key=len, reverse=True):
        text = text.replace(token, "") if token.strip() else text
    return text


def _has(facts: LabelFacts, ids: Sequence[int]) -> np.ndarray:
    """(R,) rows that hold one of the ids."""
    return facts.table.per_row(np.isin(facts.table.ids, list(ids))) > 0


# ------------------------------------------------------------------ the length limit


def _beginnings_cut(facts: LabelFacts) -> Told:
    """Rows as long as the limit begin as the other rows do."""
    table = facts.table
    if facts.plain or facts.is_stream:
        return None
    # Rows that were cut in front end well: the longest length is the limit where rows share it.
    limit = facts.cut_at or int(table.lengths.max())
    at_limit = np.flatnonzero(table.lengths == limit)
    others = np.flatnonzero((table.lengths != limit) & (table.lengths > 0))
    if len(at_limit) < 2 or len(others) < 3:
        return None
    first = table.ids[table.starts[:-1][others]]
    values, counts = np.unique(first, return_counts=True)
    if counts.max() < 0.9 * len(others):
        return None
    usual = int(values[counts.argmax()])
    cut = [int(row) for row in at_limit if table.ids[table.starts[row]] != usual]
    if not cut:
        return None
    name = facts.tokens.decode([usual])
    # A row that was cut at the border of a turn begins as the others do.
    explained = [row for row in at_limit.tolist() if row in cut or not _opens(facts, row, others)]
    finding = rows_finding(
        facts.names,
        cut,
        code="prompt-cut",
        level="error" if len(cut) > 0.05 * len(table) else "warning",
        what=f"{share(len(cut), len(table))} lost their beginning because of the length limit of "
        f"{limit:,} tokens",
        why=f"they are as long as the limit and do not begin with {name!r} as the other rows do: "
        "their answers are learned after an incomplete prompt",
        fix="raise the limit above the longest row, or remove those rows",
    )
    return finding, explained


def _opens(facts: LabelFacts, row: int, others: np.ndarray) -> bool:
    """Whether a row begins with the two tokens that another one begins with."""
    table = facts.table
    begin = table.row_ids(row)[:2]
    return any(table.row_ids(int(other))[:2] == begin for other in others[:200])


# ------------------------------------------------------------------ plain text


def _plain_rows(facts: LabelFacts) -> Told:
    """No row among conversations is a plain document, without markers and with every token a
    target."""
    table = facts.table
    if facts.plain or facts.is_stream or not facts.turn_markers:
        return None
    ends = np.isin(table.ids, list(facts.frame.ends))
    unlearned = ~table.supervised & ~ends
    unlearned[table.starts[:-1][table.lengths > 0]] = False
    # An end token closes a document, or the one before it.
    inside = ends.copy()
    filled = table.lengths > 0
    inside[table.starts[:-1][filled]] = inside[table.starts[1:][filled] - 1] = False
    plain = filled & ~_has(facts, facts.turn_markers)
    plain &= (table.per_row(unlearned) == 0) & (table.per_row(inside) == 0)
    if not plain.any() or plain.all():
        return None
    # Questions and answers in a form of their own are judged as such.
    if dataclasses.replace(facts, table=table.select(plain)).scaffold:
        return None
    rows = np.flatnonzero(plain).tolist()
    finding = rows_finding(
        facts.names,
        rows,
        code="plain-text-rows",
        level="note",
        what=f"{share(len(rows), len(table))} are plain text: they contain no marker of the chat "
        "template, and every token is a target",
        why="the model is trained on documents together with conversations, for example as replay "
        "of pretraining text; they are not judged as conversations",
        fix="nothing to do if this is intended; otherwise render them with the chat template",
    )
    return finding, rows


_CAUSES: tuple[Callable[[LabelFacts], Told], ...] = (
    markers_split,
    _markers_lost,
    template_twice,
    _beginnings_cut,
    _plain_rows,
)
