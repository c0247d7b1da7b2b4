"""Check that the model learns to end answers with a token on which the server stops.

The checks judge where each run of labels ends. Whether pad and end share a token, whether a
template has markers and what a setting says do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from truetune.checks.labels.answers import label_holes, labels_chosen, rows_without_targets
from truetune.checks.labels.facts import LabelFacts, of_turns, once, unproved
from truetune.checks.labels.table import Flags, Indices
from truetune.checks.registry import check
from truetune.findings import Finding, Level, rows_finding, share

# Up to this share of the rows, answers without an end are stragglers and no pattern.
_STRAGGLERS = 0.01
# From this share on no row is taught to end.
_ALL = 0.9


@dataclass(frozen=True)
class _Ends:
    """Rows by how their last answer ends; an earlier answer counts where it ends on no special
    token at all.

    Attributes:
        unlabelled: the end tokens that have no label.
        earlier: none of those is the last one of its row.
    """

    last_ids: Indices
    unlabelled: frozenset[int]
    earlier: bool
    masked: list[int]
    missing: list[int]
    cut: list[int]
    headed: list[int]


@check(of_turns)
def answers_end(facts: LabelFacts) -> Iterator[Finding]:
    """Each answer's last label is a stop token."""
    ends = _ends(facts)
    total = int((facts.table.num_supervised > 0).sum())
    names = facts.named(facts.frame.ends)
    # Labels that are dropped everywhere are one cause, reported as holes.
    dropped = labels_chosen(facts) and len({*ends.masked, *ends.missing}) < _ALL * total
    if ends.masked and not dropped:
        by_pad = ends.unlabelled <= {facts.tokens.tokenizer.pad_token_id}
        which = "earlier answers" if ends.earlier else "an answer"
        yield rows_finding(
            facts.names,
            ends.masked,
            code="stop-not-supervised",
            level=_level(ends.masked, total),
            what=f"the token that ends {which} ({facts.named(ends.unlabelled)}) is in the ids of "
            f"{share(len(ends.masked), total)} but not in their labels"
            + (": only that of the last answer is" if ends.earlier else ""),
            why=_why_masked(by_pad, ends.earlier),
            fix="build labels from lengths, not from the pad id: the first end token after an "
            "answer is part of it (truetune's own batches do that)"
            if by_pad
            else "set labels on each answer from its first token through its end token",
        )
    if ends.cut:
        yield rows_finding(
            facts.names,
            ends.cut,
            code="answer-cut",
            level=_level(ends.cut, total),
            what=f"{share(len(ends.cut), total)} lost the end of the answer because of the length "
            f"limit of {facts.cut_at:,} tokens",
            why="they are exactly as long as the limit and do not end with an end token: the "
            "model does not learn to stop, or learns to stop in the middle",
            fix="raise the limit above the longest row, or remove those rows",
        )
    if closed := closed_at_limit(facts):
        longest = int(facts.table.lengths.max())
        yield rows_finding(
            facts.names,
            closed,
            code="answer-cut",
            level=_level(closed, total),
            what=f"{share(len(closed), total)} are cut to {longest:,} tokens and then closed with "
            "an end token",
            why="they are all as long as the longest row and stop in the middle of a sentence, "
            "while the others do not: the model learns to stop at a certain length",
            fix="raise the limit above the longest row, or remove those rows; never append an end "
            "token to a truncated answer",
        )
    if ends.missing and not dropped:
        yield rows_finding(
            facts.names,
            ends.missing,
            code="stop-missing",
            level=_level(ends.missing, total),
            what=f"the answers of {share(len(ends.missing), total)} do not end with an end token",
            why=(f"known end tokens are {names}" if names else "no end token is known")
            + "; these rows end with "
            f"{_tail(facts, ends.missing[0])}",
            fix="end every answer with the token that the server stops on: use a chat template "
            "that writes it, or append it to the ids and labels",
        )
    if ends.headed:
        yield rows_finding(
            facts.names,
            ends.headed,
            code="generation-prompt-trained",
            level="error",
            what=f"{share(len(ends.headed), total)} end with the header of another answer",
            why="the conversation was rendered with the generation prompt, which is only for "
            "serving: the model learns to continue after its answer",
            fix="render training rows with add_generation_prompt=False",
        )


@check(of_turns)
def stops_served(facts: LabelFacts) -> Iterator[Finding]:
    """The trained end token is one on which the server stops."""
    frame = facts.frame
    ends = _ends(facts)
    known = np.array(sorted(frame.served_stops), np.int64)
    special = _special(facts, ends.last_ids)
    unserved = special & ~np.isin(ends.last_ids, known) & (ends.last_ids >= 0)
    rows = np.flatnonzero(unserved).tolist()
    if not rows:
        return
    trained = facts.named(frozenset(int(i) for i in np.unique(ends.last_ids[rows])))
    served = facts.named(frame.served_stops) or "nothing"
    ids = sorted({*frame.served_stops, *(int(i) for i in np.unique(ends.last_ids[rows]))})
    yield rows_finding(
        facts.names,
        rows,
        code="stop-not-served",
        level="error",
        what=f"the model is trained to end answers with {trained}, but the server stops on "
        f"{served}",
        why="the model will write its end token, and generation will continue after it",
        fix=f"set eos_token_id: {ids} in generation_config.json, or end the rows with a token on "
        "which the server stops",
    )


@check(unproved, of_turns)
def ends_once(facts: LabelFacts) -> Iterator[Finding]:
    """Answers have one end token: a server stops on the first and never reads a second."""
    table = facts.table
    if not len(table.runs):
        return
    on = table.supervised & np.isin(table.ids, sorted(facts.frame.ends))
    twice = np.flatnonzero(on[1:] & on[:-1] & (table.ids[1:] == table.ids[:-1]))
    twice = twice[table.rows_of(twice) == table.rows_of(twice + 1)]
    if not len(twice):
        return
    rows = table.rows_of(twice)
    inside = twice + 2 < table.starts[rows + 1]
    # White space after the last end is no turn.
    inside &= over_space(facts, twice + 2, table.starts[rows + 1]) < table.starts[rows + 1]
    name = facts.named(frozenset(np.unique(table.ids[twice]).tolist()))
    found = np.unique(rows)
    yield rows_finding(
        facts.names,
        found.tolist(),
        code="stop-doubled",
        level="warning" if inside.any() else "note",
        what=f"the answers of {share(len(found), len(table))} end with {name} twice, with labels "
        "on both",
        why="the template writes one, and the tokenizer or the script added another"
        + (
            "; inside a conversation, no server sends the second one back"
            if inside.any()
            else "; the server stops at the first, so the second one does almost no harm"
        ),
        fix="end each answer once, with the template's own end token",
    )


@once
def _ends(facts: LabelFacts) -> _Ends:
    """Judge the last token that is no whitespace of every run of labels."""
    table = facts.table
    ends = np.array(sorted(facts.frame.ends), np.int64)
    runs = table.runs
    # The label is what is trained; it differs from the id if labels are shifted.
    last = back_over_space(facts, table.labels, runs[:, 0], runs[:, 1])
    said = ~_blank(facts, table.labels[last])
    runs, last = runs[said], last[said]
    rows = table.rows_of(runs[:, 0])
    final = np.ones(len(runs), bool)
    final[:-1] = rows[1:] != rows[:-1]
    ended = np.isin(table.labels[last], ends)
    # An earlier answer may hand over with a special token that no server stops on; whether the
    # server knows the last one is judged below, in `stops_served`.
    ended |= _special(facts, table.labels[last]) & ~(final & _at_limit(facts, rows))
    after = over_space(facts, runs[:, 1] + 1, table.starts[rows + 1])
    inside = after < table.starts[rows + 1]
    follows = np.zeros(len(runs), bool)
    follows[inside] = np.isin(table.ids[after[inside]], ends)
    headed = _end_on_header(facts)
    if len(headed) < 0.9 * len(table):
        # A row may be cut right there.
        headed = {row for row in headed if table.lengths[row] != facts.cut_at}
    # Labels that go on after a few tokens have not come to the end of the answer.
    ended |= np.isin(runs[:, 0], table.runs[label_holes(facts), 0])
    # Labels may end a few words early: the end token is after the rest of the answer.
    for run in np.flatnonzero(~ended & ~follows & final).tolist():
        if (at := _end_behind(facts, int(after[run]), int(rows[run]))) is not None:
            after[run], follows[run] = at, True
    # One cause explains what else is odd of rows that were cut and closed.
    headed -= set(closed_at_limit(facts))
    masked = set(rows[~ended & follows].tolist()) - headed
    cut = set(rows[~ended & ~follows & final & _at_limit(facts, rows)].tolist()) - headed - masked
    missing = set(rows[~ended & ~follows].tolist()) - headed - masked - cut
    # Where prompts are trained and answers are not, labels end where no answer does.
    astray = set(rows_without_targets(facts))
    masked, cut, missing = masked - astray, cut - astray, missing - astray
    if facts.max_length is None and len(missing) > len(cut):
        # Shorter rows end like that too: the longest are no pile at a limit.
        missing, cut = missing | cut, set()
    last_ids = np.full(len(table), -1, np.int64)
    last_ids[rows[final]] = table.labels[last[final]]
    last_ids[sorted(headed | cut | astray)] = -1
    lost = ~ended & follows & np.isin(rows, sorted(masked))
    unlabelled = frozenset(np.unique(table.ids[after[lost]]).tolist())
    earlier = not bool((lost & final).any())
    return _Ends(last_ids, unlabelled, earlier, *map(sorted, (masked, missing, cut, headed)))


def _end_behind(facts: LabelFacts, at: int, row: int) -> int | None:
    """The end token of the answer whose labels stop before a position; None if another turn
    begins first, or none is there."""
    table, frame = facts.table, facts.frame
    if not frame.answer_start_ids or not facts.answer_starts[row]:
        return None
    behind = table.ids[at : table.starts[row + 1]]
    ends = np.flatnonzero(np.isin(behind, sorted(frame.ends)))
    turns = np.flatnonzero(np.isin(behind, facts.turn_markers))
    if not len(ends) or (len(turns) and turns[0] < ends[0]):
        return None
    return at + int(ends[0])


# A pile at the longest length: rows, and their share among those that are judged.
_PILE, _PILE_SHARE = 3, 0.02


@once
def closed_at_limit(facts: LabelFacts) -> list[int]:
    """Rows of the greatest length whose answers break off, where those of the others do not.

    Judged by the last character before the end token: prose, code and numbers end in many ways, so
    only a group of rows of one length that differs from all others counts as cut.
    """
    table = facts.table
    longest = int(table.lengths.max(initial=0))
    pile = np.flatnonzero(table.lengths == longest)
    if facts.proved or longest < 32 or len(pile) < max(_PILE, _PILE_SHARE * len(table)):
        return []
    others = [row for row in facts.sample if table.lengths[row] < longest]
    if len(others) < 2 * _PILE:
        return []
    broken = [row for row in pile[:200].tolist() if _breaks_off(facts, row)]
    usual = sum(_breaks_off(facts, row) for row in others) / len(others)
    if len(broken) < _PILE or len(broken) < 0.5 * len(pile[:200]) or usual > 0.1:
        return []
    return pile.tolist()


def _breaks_off(facts: LabelFacts, row: int) -> bool:
    """Whether the text before the closing end token ends in a letter, a space or a comma."""
    ids, ends = facts.table.row_ids(row), facts.frame.ends
    while ids and _blank(facts, np.array(ids[-1:]))[0]:
        ids.pop()
    if not ids or ids.pop() not in ends:
        return False
    text = facts.tokens.decode(ids[-8:])
    return bool(text) and (text[-1].isalpha() or text[-1] in " ,;:-(")


def stops_trained(facts: LabelFacts) -> frozenset[int]:
    """The special tokens that answers are trained to end on."""
    last = _ends(facts).last_ids
    return frozenset(np.unique(last[_special(facts, last) & (last >= 0)]).tolist())


def _at_limit(facts: LabelFacts, rows: Indices) -> Flags:
    return facts.table.lengths[rows] == (facts.cut_at or -1)


def _end_on_header(facts: LabelFacts) -> set[int]:
    """Rows that stop right after what is before an answer."""
    table, frame = facts.table, facts.frame
    if not frame.answer_start:
        return set()
    header = frame.answer_start_ids
    if header:
        hits = table.find(header)
        rows = table.rows_of(hits)
        near = table.starts[rows + 1] - (hits + len(header)) <= _BEHIND_HEADER
        candidates = sorted(set(rows[near].tolist()))
    else:
        candidates = facts.sample
    return {row for row in candidates if _is_header_tail(facts, row, len(header) or 16)}


# Tokens that a served prompt may have after its marker: line breaks, empty reasoning; and an end
# token that a collator put there.
_BEHIND_HEADER = 8


def _is_header_tail(facts: LabelFacts, row: int, size: int) -> bool:
    frame = facts.frame
    ids = facts.table.row_ids(row)[-(size + _BEHIND_HEADER) :]
    start = frame.tokens.encode([frame.answer_start])[0]
    while ids and ids[-1] in frame.ends and ids[-len(start) :] != start:
        ids.pop()
    text = frame.tokens.decode(ids).rstrip()
    for marker in reversed(frame.think):
        text = text.removesuffix(marker).rstrip()
    # Some tokenizers decode a space more than was encoded.
    return text.endswith((frame.answer_start, frame.tokens.decode(start).strip()))


def back_over_space(
    facts: LabelFacts, values: np.ndarray, first: Indices, last: Indices
) -> Indices:
    """The last position of each stretch whose token is more than whitespace."""
    at = last.copy()
    while True:
        blank = _blank(facts, values[at]) & (at > first)
        if not blank.any():
            return at
        at[blank] -= 1


def over_space(facts: LabelFacts, first: Indices, end: Indices) -> Indices:
    """The first position from `first` on, before `end`, whose token is more than whitespace."""
    at = first.copy()
    while True:
        inside = at < end
        blank = np.zeros(len(at), bool)
        blank[inside] = _blank(facts, facts.table.ids[at[inside]])
        if not blank.any():
            return at
        at[blank] += 1


def _blank(facts: LabelFacts, ids: np.ndarray) -> np.ndarray:
    """Which ids decode to whitespace or nothing, special tokens not."""
    tokens = facts.tokens
    unique, back = np.unique(ids, return_inverse=True)
    blank = np.array(
        [i not in tokens.special_ids and not tokens.decode([i]).strip() for i in unique.tolist()],
        bool,
    )
    return blank[back] if len(unique) else np.zeros(0, bool)


def _special(facts: LabelFacts, ids: np.ndarray) -> np.ndarray:
    return np.isin(ids, list(facts.tokens.special_ids | facts.frame.ends))


def _level(rows: list[int], total: int) -> Level:
    return "error" if len(rows) > _STRAGGLERS * max(total, 1) else "warning"


def _why_masked(by_pad: bool, earlier: bool) -> str:
    if by_pad:
        return (
            "the pad token is also an end token, and the collator masks every pad token: the real "
            "end token is masked with the padding, and the model never learns to stop"
        )
    if earlier:
        return (
            "the mask stops before the end token of every answer but the last: the model is "
            "trained on answers that do not end, and learns to stop only from the last ones"
        )
    return "the mask stops before the end token: the model never learns to stop"


def _tail(facts: LabelFacts, row: int) -> str:
    return repr("\u2026" + facts.tokens.decode(facts.table.row_ids(row)[-8:]))
