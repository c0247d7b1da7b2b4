"""Check that answers are trained after the prompts that a server sends.

The rows' ids are compared with sentinels rendered by the served template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts, of_turns, unproved
from truetune.checks.labels.questions import asks_nothing
from truetune.checks.labels.stops import closed_at_limit
from truetune.checks.registry import check
from truetune.contract.frame import Separators
from truetune.errors import UnfaithfulTemplate
from truetune.findings import Finding, rows_finding, share

_MARKER = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>\s]{1,40}\uff5c>|</?[a-z]+_of_[a-z]+>|\[/?INST\]"
)


@check()
def begins_once(facts: LabelFacts) -> Iterator[Finding]:
    """The beginning-of-sequence token occurs as often as in a served prompt."""
    table = facts.table
    bos = facts.tokens.tokenizer.bos_token_id
    if bos is None or not len(table) or facts.is_stream:
        return
    first, second = _token_at(facts, 0), _token_at(facts, 1)
    rows = np.flatnonzero((first == bos) & (second == bos)).tolist()
    name = repr(facts.tokens.decode([bos]))
    if rows and not _served_doubled(facts, bos):
        yield rows_finding(
            facts.names,
            rows,
            code="bos-doubled",
            level="warning",
            what=f"{share(len(rows), len(table))} begin with {name} twice, but served prompts "
            "begin with it once",
            why="the template writes it, and the tokenizer added another one",
            fix="tokenize rendered text with add_special_tokens=False",
        )
    missing = np.flatnonzero((first != bos) & (table.lengths > 0)).tolist()
    # Truetune's own rows begin as they are served; the blocks of a split text go on.
    if facts.frame.bos is not None and missing and not facts.proved:
        yield rows_finding(
            facts.names,
            missing,
            code="bos-missing",
            level="warning",
            what=f"{share(len(missing), len(table))} do not begin with {name}, but served prompts "
            "do",
            why="rows and served prompts are tokenized in different ways",
            fix="tokenize both the same way: let the chat template write it, or use "
            "add_special_tokens=True",
        )


def _token_at(facts: LabelFacts, offset: int) -> np.ndarray:
    """(R,) the token of each row at an offset, -1 after its end."""
    table = facts.table
    at = table.starts[:-1] + offset
    inside = at < table.starts[1:]
    found = np.full(len(table), -1, np.int64)
    found[inside] = table.ids[at[inside]]
    return found


def _served_doubled(facts: LabelFacts, bos: int) -> bool:
    """A template may write the token twice: then that is what is served."""
    contract = facts.frame.contract
    if contract is None:
        return False
    try:
        ids = contract.prompt_ids([{"role": "user", "content": "a"}])
    except UnfaithfulTemplate:
        return False
    return ids[:2] == [bos, bos]


@check(unproved)
def template_runs(facts: LabelFacts) -> Iterator[Finding]:
    """The served template renders within limits of time and memory."""
    error = facts.frame.broken
    if error is not None:
        yield Finding(
            code="template-unusable",
            level="error",
            what=error.what,
            where=error.where or "tokenizer.chat_template",
            why=error.why or "no server can render a prompt with it",
            fix="use the chat template of the model that the tokenizer belongs to",
        )


@check(unproved)
def served_form(facts: LabelFacts) -> Iterator[Finding]:
    """Rows have the form of the served prompt: they contain what precedes every answer."""
    frame, table = facts.frame, facts.table
    if facts.plain or not frame.answer_start or not len(table):
        return
    absent = (facts.answer_starts == 0) & (table.num_supervised > 0)
    absent[closed_at_limit(facts)] = False
    # A row that was cut may have lost it.
    without = np.flatnonzero(absent & (table.lengths != (facts.cut_at or -1))).tolist()
    if not without:
        return
    everywhere = len(without) > 0.9 * len(table)
    if everywhere and facts.is_stream:
        return
    tuned = frame.own_stop_is_terminator
    first = table.row_ids(without[0])
    shown = facts.tokens.decode(first).strip()
    if facts.separators and _opened(facts.separators, shown) and asks_nothing(facts, first):
        why = (
            f"they contain only what the template writes before the first turn ({shown!r}): it "
            "drops turns of unknown roles, such as human and gpt"
        )
    else:
        why = (
            f"their text has a different form ({_form(facts, without[0])}): what is learned in it "
            "has no effect when the model is served with its chat template"
        )
    yield rows_finding(
        facts.names,
        without,
        code="prompt-not-served",
        # A base model may well be served in the form of its rows; an instruct model is not.
        level="error" if tuned or not everywhere else "note",
        what=f"{share(len(without), len(table))} do not contain what the served chat template "
        f"writes before an answer, {frame.answer_start!r}",
        why=why,
        fix="provide the rows as messages with the roles user and assistant, so that the "
        "tokenizer's chat template renders them; or save the form of the rows as the chat "
        "template",
    )


def _opened(cuts: Separators, text: str) -> bool:
    """Whether a text begins as conversations of the template do."""
    return bool(text) and (
        cuts.head.startswith(text) or (cuts.system is not None and text.startswith(cuts.system[0]))
    )


def _form(facts: LabelFacts, row: int) -> str:
    if facts.scaffold:
        return ", ".join(map(repr, facts.scaffold[:3]))
    text = facts.tokens.decode(facts.table.row_ids(row)[:24])
    return repr(text[:60] + "\u2026")


@check()
def markers_whole(facts: LabelFacts) -> Iterator[Finding]:
    """The marker that closes an answer is one token: no server can stop on several pieces."""
    tokens, table = facts.tokens, facts.table
    if facts.plain or not len(table):
        return
    counts: dict[str, list[int]] = {}
    for row in facts.sample:
        for marker in set(_MARKER.findall(tokens.decode(table.row_ids(row)))):
            counts.setdefault(marker, []).append(row)
    least = max(1, (len(facts.sample) + 1) // 2)
    broken = {m: r for m, r in counts.items() if len(r) >= least and tokens.single_id(m) is None}
    closing = [m for m in broken if _closes(facts, m, broken[m])]
    if not closing:
        return
    marker = closing[0]
    pieces = tokens.encode([marker])[0]
    everywhere = len(broken[marker]) == len(facts.sample)
    yield rows_finding(
        facts.names,
        range(len(table)) if everywhere else broken[marker],
        code="marker-in-pieces",
        level="error",
        what=f"{marker!r} closes the answers but is {len(pieces)} tokens of this tokenizer, not one"
        + ("" if everywhere else f" ({len(facts.sample)} rows were examined)"),
        why="the template belongs to another model family (also split: "
        f"{', '.join(repr(m) for m in list(broken)[:4] if m != marker) or 'nothing else'}); a "
        "server stops only on a single token",
        fix="use the tokenizer's chat template, or the tokenizer that belongs to the template",
    )


def _closes(facts: LabelFacts, marker: str, rows: list[int]) -> bool:
    """Whether rows end with the marker, and no end token follows."""
    tokens, table = facts.tokens, facts.table
    tails = [tokens.decode(table.row_ids(row)[-24:]).rstrip() for row in rows]
    return sum(tail.endswith(marker) for tail in tails) > len(rows) // 2


@check(unproved, of_turns)
def answers_start_where_prompts_end(facts: LabelFacts) -> Iterator[Finding]:
    """The first token of an answer is a target and contains nothing of the prompt."""
    table, frame = facts.table, facts.frame
    runs = table.runs
    rows = table.rows_of(runs[:, 0]) if len(runs) else np.zeros(0, np.int64)
    masked_before = runs[:, 0] > table.starts[rows] + 1
    runs, rows = runs[masked_before], rows[masked_before]
    if not len(runs):
        return
    decode = frame.tokens.decode
    swallowed: list[int] = []
    looked = 0
    for start, row in _spread(runs[:, 0], rows):
        looked += 1
        before = decode(table.ids[max(start - 4, table.starts[row]) : start].tolist())
        first = decode(table.ids[start : start + 1].tolist())
        joined = decode(table.ids[start - 1 : start + 1].tolist())
        if _inside_word(before, first, joined):
            swallowed.append(int(row))
    if len(swallowed) < max(2, looked // 5):
        return
    yield rows_finding(
        facts.names,
        swallowed,
        code="answer-start-masked",
        level="warning",
        what=f"the mask ends inside the answer in {len(swallowed)} of {looked} examined answers",
        why="prompt and answer were tokenized together and merged at the boundary, so the first "
        "token of the answer counts as prompt (a prompt that ends with a space causes this)",
        fix="move the space from the end of the prompt to the beginning of the answer, or end "
        "prompts with a token that nothing merges with",
    )


@check(unproved, of_turns)
def labels_begin_behind_headings(facts: LabelFacts) -> Iterator[Finding]:
    """In rows without a template, labels begin right after the heading of the answer, `Answer:`."""
    table = facts.table
    if facts.answer_starts.any():
        return
    tails: dict[int, str] = {}
    looked, heading = 0, ""
    for row in facts.sample:
        on = np.flatnonzero(table.supervised[table.starts[row] : table.starts[row + 1]])
        if not len(on) or on[0] < 2:
            continue
        looked += 1
        begin = int(on[0])
        ids = table.row_ids(row)
        before = facts.tokens.decode(ids[: begin - 1]).rstrip()
        # One token after the heading, and it begins a word.
        swallowed = facts.tokens.decode(ids[:begin])[len(before) :]
        above = next((text for text in facts.scaffold if before.endswith(text)), "")
        if above and swallowed.strip().isalnum():
            heading, tails[row] = above, swallowed
    if len(tails) < max(3, 0.5 * looked):
        return
    shown = ", ".join(repr(text) for text in sorted(set(tails.values()))[:3])
    yield rows_finding(
        facts.names,
        tails,
        code="answer-start-masked",
        level="warning",
        what=f"the first word of the answer has no label in {len(tails)} of {looked} examined "
        f"rows: {shown}",
        why="prompt and answer were tokenized together and merged at the boundary after "
        f"{heading!r}, so the first token of the answer counts as prompt (a prompt that ends "
        "with a space causes this)",
        fix="move the space from the end of the prompt to the beginning of the answer",
    )


def _spread(starts: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    most = 400
    step = max(1, len(starts) // most)
    yield from zip(starts[::step].tolist(), rows[::step].tolist(), strict=True)


def _inside_word(before: str, first: str, joined: str) -> bool:
    """Whether a seam lies inside running text: a word before it, and what can only continue one
    after it."""
    if not before or not before[-1].isalnum():
        return False
    # `Paris` + `.`, or `Par` + `is`: an answer begins with a space, a line or a marker instead.
    return bool(first) and (first[0] in ".,;:!?" or (first[0].isalnum() and joined[:1] == " "))
