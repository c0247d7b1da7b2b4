"""Find ids of another tokenizer, which stand for other tokens in this vocabulary.

A tokenizer that encodes its own decoded ids again finds the same tokens. If rows were sampled (BPE
dropout) or joined from parts, it finds fewer tokens, whose borders are all among the old ones. Only
ids that it did not make lack a border where it puts one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product

import numpy as np

from truetune.checks.labels.facts import LabelFacts
from truetune.checks.labels.markers import split_rows
from truetune.contract.tokens import Tokens
from truetune.findings import Finding, rows_finding

# Tokens of a row that are read back.
_LOOK = 512
# Borders of the tokenizer's own that the ids do not have, as a share of all: measured on published
# tokenizers 0 for their own ids, up to 0.015 with BPE dropout of 0.3, from 0.039 for foreign ids.
_FOREIGN = 0.02
# Bytes that a character takes at most, and what is read where some of them are missing.
_CHARACTER, _UNREADABLE = 4, "\ufffd"
# A seam between prompt and answer may move one border in each row.
_SEAM = 2


def other_tokenizer(facts: LabelFacts) -> Iterator[Finding]:
    """This tokenizer splits the text of each row as the row's ids do."""
    table, tokens = facts.table, facts.tokens
    # A row that has the marker of the served template was written in this vocabulary.
    # So was one that has its letters: the control tokens were split, which is reported separately.
    split = set(split_rows(facts))
    rows = [row for row in facts.sample if not facts.answer_starts[row] and row not in split]
    if facts.proved or len(rows) < 3 or 2 * len(rows) < len(facts.sample):
        return
    moved = {row: moved_borders(tokens, table.row_ids(row)[:_LOOK]) for row in rows}
    strange = {row: new for row, (new, _) in moved.items() if new}
    new, total = (sum(values) for values in zip(*moved.values(), strict=True))
    if 2 * len(strange) < len(rows) or new < _SEAM * len(strange) or new <= _FOREIGN * total:
        return
    worst = max(strange, key=lambda row: strange[row])
    shown = tokens.decode(table.row_ids(worst)[:12])
    everywhere = len(strange) > 0.9 * len(rows)
    absent = np.setdiff1d(np.flatnonzero(facts.answer_starts == 0), sorted(split))
    yield rows_finding(
        facts.names,
        absent.tolist() if everywhere else strange,
        code="ids-of-another-tokenizer",
        level="error",
        what=f"{len(strange):,} of {len(rows):,} examined rows were not made by this tokenizer: it "
        f"would split their text differently ({new / total:.0%} of the boundaries that it sets "
        "are not boundaries in the rows)",
        why="the ids are valid in its vocabulary but stand for other tokens: such a row begins "
        f"with {shown!r}",
        fix="tokenize the data again with the model's own tokenizer",
    )


def moved_borders(tokens: Tokens, ids: Sequence[int]) -> tuple[int, int]:
    """(token borders of the re-encoded text that `ids` do not have, all of its borders). A cut may
    leave parts of a character at either end, which cannot be decoded: the best result without them
    counts.
    """
    best = _moved(tokens, ids)
    if best[0] and _UNREADABLE in tokens.decode(ids):
        for first, last in product(range(_CHARACTER), repeat=2):
            best = min(best, _moved(tokens, ids[first : len(ids) - last]))
            if not best[0]:
                break
    return best


def _moved(tokens: Tokens, ids: Sequence[int]) -> tuple[int, int]:
    again = tokens.encode([tokens.decode(ids)])[0]
    if list(ids) == again:
        return 0, len(again)
    own = set(_borders(tokens, again))
    return len(own - set(_borders(tokens, ids))), max(len(own), 1)


def _borders(tokens: Tokens, ids: Sequence[int]) -> Iterator[int]:
    """The number of the vocabulary's characters up to the end of each token. The character that
    represents a space in some vocabularies does not count, because decoders drop it at the ends and
    next to special tokens."""
    pieces = tokens.tokenizer.convert_ids_to_tokens(list(ids))
    return accumulate(len((piece or "").replace("\u2581", "")) for piece in pieces)
