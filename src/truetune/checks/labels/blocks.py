"""Find conversations that were packed into blocks of one length and cut at the blocks' borders.

input   rows that were cut where positions or segments restart, with their blocks
does    compares how documents begin and end at the border of a block with how they do inside
output  one finding on the pieces; the other checks judge the whole conversations
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts
from truetune.checks.labels.stops import back_over_space
from truetune.checks.labels.table import Flags
from truetune.findings import Finding, rows_finding, share

# Inside the blocks nearly all documents begin and end alike, else a border cannot be
# distinguished from rows that are broken everywhere.
_USUAL = 0.9
# Pieces at a border must be this much more frequent than the same beginnings or ends inside.
_TIMES, _LEAST = 3.0, 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """(R,) rows that begin inside a conversation, and those that end inside one."""

    heads_lost: Flags
    ends_lost: Flags

    @property
    def any(self) -> Flags:
        return self.heads_lost | self.ends_lost


def pieces(facts: LabelFacts) -> Pieces | None:
    """What the borders of blocks cut off; None if blocks contain whole documents, if each row is
    one document, or for plain text, which may be cut anywhere."""
    table, blocks = facts.table, facts.table.blocks
    if blocks is None or len(table) < 4 or facts.plain:
        return None
    opens = np.ones(len(table), bool)
    opens[1:] = blocks[1:] != blocks[:-1]
    closes = np.roll(opens, -1)
    sizes = np.bincount(blocks, weights=table.lengths)
    full = (sizes == sizes.max())[blocks]
    filled = table.lengths > 0
    inside_begins, inside_ends = ~opens & filled, ~closes & filled
    if inside_begins.sum() < 3 or (closes & full).sum() < 2:
        return None
    unended = filled & ~_ended(facts)
    # A question alone ends on an end token as well; it is half a conversation all the same.
    for missing in (facts.answer_starts == 0, table.num_supervised == 0):
        if missing[inside_ends].mean() <= 1 - _USUAL:
            unended |= filled & missing
    unusual = filled & ~_begin_as(facts, inside_begins)
    ends_lost = _at_border(unended, closes & full & filled, inside_ends)
    heads_lost = _at_border(unusual, opens & filled, inside_begins)
    found = Pieces(heads_lost, ends_lost)
    # What fills a block alone was cut by the limit on rows, before anything was packed.
    shared = (np.bincount(blocks) > 1)[blocks]
    return found if len(np.unique(blocks[found.any & shared])) > 1 else None


def _at_border(odd: Flags, border: Flags, inside: Flags) -> Flags:
    """The odd rows at a border, where they are odd there and not inside."""
    usual = float(odd[inside].mean())
    cut = odd & border
    seen = float(cut.sum()) / max(int(border.sum()), 1)
    said = usual <= 1 - _USUAL and seen > max(_LEAST, _TIMES * usual)
    return cut if said else np.zeros(len(odd), bool)


def _ended(facts: LabelFacts) -> Flags:
    """(R,) rows whose last token other than whitespace ends an answer for the server, the template
    or the tokenizer."""
    table = facts.table
    filled = table.lengths > 0
    first = table.starts[:-1][filled]
    last = back_over_space(facts, table.ids, first, table.starts[1:][filled] - 1)
    ended = np.zeros(len(table), bool)
    # Answers may end on a special token that no server knows; that is reported for the whole ones.
    known = (facts.frame.ends | facts.tokens.special_ids) - set(facts.turn_markers)
    ended[filled] = np.isin(table.ids[last], list(known))
    return ended


def _begin_as(facts: LabelFacts, judged: Flags) -> Flags:
    """(R,) rows that begin with the most frequent first token of the judged ones."""
    table = facts.table
    first = np.full(len(table), -1, np.int64)
    filled = table.lengths > 0
    first[filled] = table.ids[table.starts[:-1][filled]]
    values, counts = np.unique(first[judged], return_counts=True)
    return first == values[counts.argmax()]


def borders(facts: LabelFacts, found: Pieces) -> Iterator[Finding]:
    """Packed blocks hold whole conversations."""
    table, blocks = facts.table, facts.table.blocks
    assert blocks is not None
    heads, ends = (len(np.unique(blocks[flags])) for flags in (found.heads_lost, found.ends_lost))
    _, first = np.unique(blocks, return_index=True)
    cut = np.unique(blocks[found.any])
    yield rows_finding(
        facts.names,
        first[np.searchsorted(blocks[first], cut)].tolist(),
        code="block-cuts-conversation",
        level="error" if len(cut) > 0.01 * len(first) else "warning",
        what=f"{share(len(cut), len(first))} are blocks whose borders cut conversations: "
        f"{heads:,} begin inside a conversation, and {ends:,} stop before its end",
        why="conversations were joined and cut into blocks of "
        f"{int(np.bincount(blocks, weights=table.lengths).max()):,} tokens. The model is "
        "trained on the rest of a cut answer without its "
        "prompt, and an answer without its end does not teach the model to stop",
        fix="fill blocks with whole conversations and leave the rest of each block empty "
        '(packing_strategy="bfd" in TRL; truetune always packs this way)',
    )


def without_pieces(facts: LabelFacts, found: Pieces) -> LabelFacts:
    """The facts without the pieces of cut conversations."""
    return dataclasses.replace(facts, table=facts.table.select(~found.any))
