"""Find template markers in rendered rows that were split into pieces or written twice."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from truetune.checks.labels.facts import LabelFacts, once
from truetune.findings import Finding, Level, rows_finding, share

# Up to this share of the rows they are stragglers.
_STRAGGLERS = 0.01
# A header in plain letters may be a word of the text; one with a sign of markup is none.
_MARKUP = re.compile(r"[#<\[|]")
_SEES = 60


@once
def split_rows(facts: LabelFacts) -> tuple[int, ...]:
    """Rows whose text has the header of an answer, but whose ids have no marker of the template:
    the control tokens were tokenized as letters."""
    if facts.frame.contract is None or not facts.frame.answer_start_ids or not facts.turn_markers:
        return ()
    table, header = facts.table, facts.frame.answer_start
    without = table.per_row(np.isin(table.ids, facts.turn_markers)) == 0
    rows = [
        row
        for row in np.flatnonzero(without).tolist()
        if header in facts.tokens.decode(table.row_ids(row))
    ]
    # A text about such a header is one row.
    return tuple(rows) if len(rows) >= min(2, len(table)) else ()


def markers_split(facts: LabelFacts) -> tuple[Finding, Sequence[int]] | None:
    """Control tokens are single tokens, not their letters."""
    rows = split_rows(facts)
    if not rows:
        return None
    marker = facts.turn_markers[0]
    name = facts.tokens.decode([marker])
    end = facts.frame.terminator
    closing = name if end is None else facts.tokens.decode([end])
    finding = rows_finding(
        facts.names,
        rows,
        code="marker-in-pieces",
        level=_level(rows, facts),
        what=f"{share(len(rows), len(facts.table))} contain the template's control tokens as plain "
        f"letters: {name!r} is one token of this tokenizer ({marker}), and it does not occur "
        "in them",
        why="the text was tokenized with split_special_tokens=True, or by a tokenizer without "
        "these tokens: no server sends such a prompt, and the model learns to spell "
        f"{closing!r}, on which no server stops",
        fix="tokenize rendered text with split_special_tokens=False, or let apply_chat_template "
        "return the ids",
    )
    return finding, rows


@once
def nested_rows(facts: LabelFacts) -> tuple[int, ...]:
    """Rows in which a turn, or a whole conversation, begins right after the header of a turn."""
    pattern = _twice(facts)
    if pattern is None:
        return ()
    decode, table = facts.tokens.decode, facts.table
    looked = [row for row in facts.sample if pattern.search(decode(table.row_ids(row)))]
    if not looked:
        return ()
    rows = range(len(table)) if len(table) > len(facts.sample) else looked
    found = [row for row in rows if pattern.search(decode(table.row_ids(row)))]
    return tuple(found) if len(found) >= min(2, len(table)) else ()


def template_twice(facts: LabelFacts) -> tuple[Finding, Sequence[int]] | None:
    """No turn contains a rendered conversation: the template was applied once."""
    rows, pattern = nested_rows(facts), _twice(facts)
    if not rows or pattern is None:
        return None
    hit = pattern.search(facts.tokens.decode(facts.table.row_ids(rows[0])))
    shown = hit.group() if hit else ""
    finding = rows_finding(
        facts.names,
        rows,
        code="template-twice",
        level=_level(rows, facts),
        what=f"the chat template was applied twice to {share(len(rows), len(facts.table))}: the "
        f"content of a turn begins with a turn, {shown[:_SEES]!r}",
        why="text that was already rendered (by apply_chat_template, or by hand) was passed as "
        "the content of a message and rendered again: answers are learned after a prompt that "
        "no server sends",
        fix="pass the messages from before they were rendered; or tokenize the rendered text "
        "(add_special_tokens=False) without a chat template",
    )
    return finding, rows


@once
def _twice(facts: LabelFacts) -> re.Pattern[str] | None:
    """What opens a turn with what opens a turn or a conversation after it; None if that is part
    of the template itself, or cannot be distinguished from words."""
    cuts = facts.separators
    if cuts is None or facts.plain:
        return None
    ends = [facts.tokens.decode([i]) for i in facts.frame.ends if i >= 0]
    question = _behind(cuts.question, ends)
    answered = _behind(cuts.answered, ends)
    # What a system message stands in is the user's own turn in some templates.
    system = (cuts.system or ("",))[0].strip()
    pairs = [(question, question), (answered, answered), (question, system), (answered, system)]
    if facts.frame.terminator is not None:
        # Without an end between them it is an empty answer.
        pairs.append((answered, question))
    pairs = [(a, b) for a, b in pairs if _MARKUP.search(a) and _MARKUP.search(b)]
    if not pairs:
        return None
    begin = facts.tokens.tokenizer.bos_token_id
    bos = "" if begin is None else rf"(?:{re.escape(facts.tokens.decode([begin]))}\s*)?"
    pattern = re.compile(
        "|".join(rf"{re.escape(a)}\s*{bos}{re.escape(b)}" for a, b in dict.fromkeys(pairs))
    )
    own = f"{cuts.head}?{cuts.answered}a{cuts.asked}?{cuts.served}"
    with_system = "?".join(cuts.system) if cuts.system else ""
    return None if pattern.search(own) or pattern.search(with_system) else pattern


def _behind(separator: str, ends: Sequence[str]) -> str:
    """A separator without the end of the turn before it."""
    for end in filter(None, ends):
        separator = separator.rpartition(end)[2]
    return separator.strip()


def _level(rows: Sequence[int], facts: LabelFacts) -> Level:
    return "error" if len(rows) > _STRAGGLERS * len(facts.table) else "warning"
