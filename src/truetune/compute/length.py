"""The length policy: which examples fit, which are dropped or truncated, and how much is lost.

input   Encoded rows, the longest length allowed, the policy
output  examples that fit, and a count with a reason for everything that did not

Plain text is split into blocks whatever the policy is: it is never dropped for its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from truetune.contract.encode import Encoded
from truetune.contract.example import SFTExample

Overlong = Literal["drop", "error", "truncate-prompt", "split-text"]

# Candidate limits of the length table.
_TABLE = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Fitted:
    """What the length policy made of the rows.

    Attributes:
        examples: all that fit, in row order.
        rows: where each example came from.
        dropped: (where, length in tokens) of each row with a dropped example.
        num_dropped_supervised: supervised tokens of the dropped examples.
        num_supervised: supervised tokens before the policy.
        num_truncated: examples that lost the beginning of their prompt.
        num_split: plain texts that became several blocks.
        num_cuttable: dropped examples that would fit without the beginning of their prompt.
    """

    examples: list[SFTExample]
    rows: list[str]
    dropped: list[tuple[str, int]]
    num_dropped_supervised: int
    num_supervised: int
    num_truncated: int
    num_split: int
    num_cuttable: int

    @property
    def dropped_share(self) -> float:
        """Of the supervised tokens, the share that was dropped."""
        return self.num_dropped_supervised / max(self.num_supervised, 1)


def longest(encoded: Sequence[Encoded]) -> int:
    """Tokens of the longest chat example; plain text does not count, it is split."""
    return max((len(e.ids) for row in encoded if not is_text(row) for e in row), default=0)


def is_text(row: Encoded) -> bool:
    """Plain text supervises no turn."""
    return row.turns == ((),)


def fit_length(encoded: Sequence[Encoded], *, max_length: int, overlong: Overlong) -> Fitted:
    """Apply the policy: "drop" and "error" drop (the caller stops on an error), "truncate-prompt"
    cuts the beginning of prompts, "split-text" splits what is plain text, as always, and drops
    the rest."""
    examples: list[SFTExample] = []
    rows: list[str] = []
    dropped: list[tuple[str, int]] = []
    num_dropped = num_total = num_truncated = num_split = num_cuttable = 0
    for row in encoded:
        for example in row:
            num_total += example.num_supervised
            kept: list[SFTExample] = [example]
            if len(example.ids) > max_length:
                if is_text(row):
                    kept = _blocks(example, max_length)
                    num_split += 1
                else:
                    cut = _truncated(example, max_length)
                    keeps = cut is not None and overlong == "truncate-prompt"
                    kept = [cut] if cut is not None and keeps else []
                    num_truncated += keeps
                    num_cuttable += cut is not None and not keeps
            if not kept:
                dropped.append((row.row, len(example.ids)))
                num_dropped += example.num_supervised
            examples += kept
            rows += [row.row] * len(kept)
    counts = (num_dropped, num_total, num_truncated, num_split, num_cuttable)
    return Fitted(examples, rows, dropped, *counts)


def length_table(encoded: Sequence[Encoded]) -> list[tuple[int, int, float]]:
    """(limit, examples kept, share of supervised tokens kept) for each candidate limit."""
    examples = [e for row in encoded if not is_text(row) for e in row]
    total = max(sum(e.num_supervised for e in examples), 1)
    table = []
    for limit in _TABLE:
        kept = [e for e in examples if len(e.ids) <= limit]
        table.append((limit, len(kept), sum(e.num_supervised for e in kept) / total))
        if len(kept) == len(examples):
            break
    return table


def _blocks(example: SFTExample, size: int) -> list[SFTExample]:
    """Blocks that overlap by one token, so that every token but the first is a target once."""
    ids, mask = example
    starts = range(0, len(ids) - 1, size - 1)
    blocks = [SFTExample(ids[i : i + size], mask[i : i + size]) for i in starts]
    return [SFTExample(b.ids, [0, *b.mask[1:]] if i else b.mask) for i, b in enumerate(blocks)]


def _truncated(example: SFTExample, size: int) -> SFTExample | None:
    """Without the beginning of its prompt; None if the supervised part alone is too long.

    At least one prompt token stays: the first target needs a predecessor.
    """
    first = example.mask.index(1) if 1 in example.mask else 0
    cut = len(example.ids) - size
    if cut > first - 1:
        return None
    return SFTExample(example.ids[cut:], example.mask[cut:])
