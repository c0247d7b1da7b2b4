"""Check that labels lie on the answers, where the template shows what precedes an answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts, has_header, of_turns, once, unproved
from truetune.checks.labels.table import Indices
from truetune.checks.registry import check
from truetune.contract.frame import served_ids
from truetune.findings import Finding, Level, rows_finding, share

# A mask may be off by a few tokens; more is a choice, such as leaving the reasoning out.
_SLIP = 4
# Tokens of a hole in the labels of an answer, and holes an answer beyond which they are chosen.
_HOLE, _CHOSEN = 8, 3


@once
def rows_without_targets(facts: LabelFacts) -> list[int]:
    """Rows with answers and labels, but no label on an answer."""
    if not (unproved(facts) and has_header(facts) and of_turns(facts)):
        return []
    table, header = facts.table, facts.frame.answer_start_ids
    # The line break after the marker belongs to the prompt.
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
    return np.flatnonzero(has & ~trained & (table.num_supervised > 0)).tolist()


@check()
def answers_are_targets(facts: LabelFacts) -> Iterator[Finding]:
    """A row with answers and labels has labels on an answer."""
    if bad := rows_without_targets(facts):
        yield rows_finding(
            facts.names,
            bad,
            code="answers-masked",
            level="error",
            what=f"{share(len(bad), len(facts.table))} have labels, but none of them on an answer",
            why="the mask is inverted, or marks another turn: prompts are learned and answers are "
            "not",
            fix="set labels to -100 on the prompt, and to the ids on the answer",
        )


@check(unproved, has_header, of_turns)
def answers_are_whole(facts: LabelFacts) -> Iterator[Finding]:
    """Labels begin where the prompt ends, not a few tokens later."""
    table, header = facts.table, facts.frame.answer_start_ids
    if not len(table.runs) or labels_chosen(facts):
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
            why="the mask is a few tokens too long: the model never learns how answers begin",
            fix="compute the prompt's length with the template's generation prompt, and mask "
            "exactly those tokens",
        )


@check(unproved, has_header, of_turns)
def headers_unlearned(facts: LabelFacts) -> Iterator[Finding]:
    """The header of an answer, written by the server, is no target unless the question is one."""
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
    fix = (
        "mask as many tokens as the served prompt has, including the template's generation prompt "
        "(add_generation_prompt=True)"
    )
    behind = starts + len(header)
    blanks = _blanks_behind(facts)
    if blanks:
        # The first of them that has a label: what is before it is masked.
        inside = behind + len(blanks) < table.starts[table.rows_of(starts) + 1]
        served = inside & ~asked & ~on
        for offset, token in enumerate(blanks):
            at = np.where(inside, behind + offset, 0)
            served &= table.ids[at] == token
        last = np.where(inside, behind + len(blanks) - 1, 0)
        # Labels that were shifted lie there too, and are reported as that.
        learned = table.supervised[last] & (table.labels[last] == table.ids[last])
        lines = sorted({int(r) for r in table.rows_of(starts[served & learned])})
        if lines:
            judged = np.unique(table.rows_of(starts[served]))
            # The templates of some trainers mark it in every row, which has no other effect.
            everywhere = len(lines) > 0.9 * len(judged)
            yield rows_finding(
                facts.names,
                lines,
                code="header-supervised",
                level="note" if everywhere else "warning",
                what="the text between the header of the answer and its first word, "
                f"{facts.tokens.decode(blanks)!r}, has labels in "
                f"{share(len(lines), len(table))}, but the header has none",
                why="it belongs to the served prompt, so the labels begin too early: the prompt "
                "was measured without the generation prompt, the header is searched for without "
                "its line break, or the template marks the text as part of the answer (TRL's "
                "templates for assistant_only_loss do); "
                + (
                    "the model learns one token per answer that the server always writes, and "
                    "nothing else changes"
                    if everywhere
                    else "the rows are masked in two ways, so they probably come from two pipelines"
                ),
                fix="nothing to do, or " + fix if everywhere else fix,
            )
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="header-supervised",
            level="warning",
            what=f"the header of the answer, {facts.frame.answer_start!r}, has labels in "
            f"{share(len(rows), len(table))}, but the question before it has none",
            why="the server writes the header itself: the labels begin a few tokens too early, and "
            "the model learns to open a turn",
            fix=fix,
        )


@once
def _blanks_behind(facts: LabelFacts) -> list[int]:
    """The white space that a served prompt has after the header of the answer, as ids; [] if
    it has none, or more than that."""
    contract, header = facts.frame.contract, list(facts.frame.answer_start_ids)
    if contract is None or not header:
        return []
    ids = served_ids(contract, {}, [{"role": "user", "content": "What is 2 + 2?"}]) or []
    starts = [i for i in range(len(ids) - len(header) + 1) if ids[i : i + len(header)] == header]
    tail = ids[starts[-1] + len(header) :] if starts else []
    special = facts.tokens.special_ids
    blank = not special & set(tail) and not facts.tokens.decode(tail).strip()
    return tail if blank else []


@once
def labels_chosen(facts: LabelFacts) -> bool:
    """Whether many tokens of most answers have no label, here and there: they were chosen, or drawn
    at random. Where labels begin and end then says nothing of the mask."""
    table, holes = facts.table, label_holes(facts)
    if not (unproved(facts) and of_turns(facts) and len(holes)):
        return False
    pad = _letters_pad(facts)
    if pad is not None and all({pad} == set(_gap(facts, hole)) for hole in holes.tolist()):
        return False
    rows, times = np.unique(table.rows_of(table.runs[holes, 0]), return_counts=True)
    judged = int((table.num_supervised > 0).sum())
    return float(times.mean()) > _CHOSEN and len(rows) > 0.5 * judged


@check(unproved, of_turns)
def answers_have_no_holes(facts: LabelFacts) -> Iterator[Finding]:
    """Labels do not stop and resume inside an answer."""
    table = facts.table
    holes = label_holes(facts)
    if not len(holes):
        return
    rows = np.unique(table.rows_of(table.runs[holes, 0]))
    judged = int((table.num_supervised > 0).sum())
    first = int(holes[0])
    gap = _gap(facts, first)
    pad = _letters_pad(facts)
    padded = pad is not None and all({pad} == set(_gap(facts, hole)) for hole in holes.tolist())
    # Who trains on chosen tokens alone leaves many out of each answer, knowingly; whether the end
    # is among them, each learns from its own row.
    chosen = labels_chosen(facts)
    endless = _ends_unlabelled(facts) if chosen else 0
    level: Level = "error" if len(rows) > 0.01 * judged else "warning"
    yield rows_finding(
        facts.names,
        rows.tolist(),
        code="answer-hole",
        level="warning" if endless else "note" if chosen else level,
        what=f"{share(len(rows), judged)} have tokens without a label inside an answer, such as "
        f"{facts.tokens.decode(gap)!r}"
        + (f", and {endless:,} of them on the token that ends it" if endless else ""),
        why=f"{facts.tokens.decode([pad])!r} is the pad token of this tokenizer ({pad}) and also "
        "occurs in the text: the collator removes the label from every pad token, and the "
        "model is never trained to write it"
        if padded and pad is not None
        else "labels stop and resume many times in most answers: they were dropped at random, or "
        "only selected tokens are supervised"
        if chosen
        else "labels stop and resume: the model is trained on what follows these tokens, but "
        "never to write them",
        fix="pad with a token that occurs in no text (a reserved one, or add one: "
        "tokenizer.add_special_tokens({'pad_token': '<|pad|>'})), or build labels from lengths"
        if padded
        else "set labels on every token of the answer, from the end of the served prompt through "
        "the end token" + (", or include the end token in the selection" if endless else ""),
    )


def _ends_unlabelled(facts: LabelFacts) -> int:
    """Rows whose last end token has no label, of those that have labels."""
    table = facts.table
    at = np.flatnonzero(np.isin(table.ids, sorted(facts.frame.ends)))
    rows = table.rows_of(at)
    last = np.append(rows[1:] != rows[:-1], True) if len(rows) else np.zeros(0, bool)
    lost = last & ~table.supervised[at] & (table.num_supervised[rows] > 0)
    return int(lost.sum())


def _gap(facts: LabelFacts, run: int) -> list[int]:
    """The ids without a label after a run of labels."""
    runs = facts.table.runs
    return facts.table.ids[runs[run, 1] + 1 : runs[run + 1, 0]].tolist()


def _letters_pad(facts: LabelFacts) -> int | None:
    """The pad token, where it is a word of the vocabulary as any other; else None."""
    tokenizer = facts.tokens.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None or pad in facts.frame.ends or pad in tokenizer.get_added_vocab().values():
        return None
    return int(pad)


def label_holes(facts: LabelFacts) -> Indices:
    """Runs of labels after which a few tokens of the same line have none before the labels resume,
    unless a turn or an inserted text lies between."""
    table, tokens = facts.table, facts.tokens
    runs = table.runs
    if len(runs) < 2:
        return np.zeros(0, np.int64)
    rows = table.rows_of(runs[:, 0])
    gaps = runs[1:, 0] - runs[:-1, 1] - 1
    near = np.flatnonzero((rows[1:] == rows[:-1]) & (gaps <= _HOLE))
    special = (tokens.special_ids | facts.frame.ends) - {_letters_pad(facts)}
    found = []
    for run in near.tolist():
        gap = _gap(facts, run)
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
