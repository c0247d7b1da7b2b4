"""Token rows as the loss sees them: the ids and labels of all rows in two flat arrays.

input   our own examples; rows that an audit read, with their padding marked
does    removes padding, splits packed rows into their documents
output  TokenTable, which the checks judge row by row or all at once
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from truetune.contract.example import SFTExample
from truetune.errors import UsageError

IGNORED = -100

Ints = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Row = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Unpadded token rows.

    Attributes:
        ids: (N,) ids of all rows, one after the other.
        labels: (N,) the label at each position as the model is given it (not shifted); IGNORED
            if there is none.
        starts: (R + 1,) row r is ids[starts[r]:starts[r + 1]].
        where: R names of rows.
        padding_supervised: rows that had a label on padding, before the padding was removed.
        blocks: (R,) for each document, the number of the original row that contained it; None
            if nothing was packed.
    """

    ids: Ints
    labels: Ints
    starts: Indices
    where: Sequence[str]
    padding_supervised: tuple[int, ...] = ()
    blocks: Indices | None = None

    @classmethod
    def of_examples(cls, examples: Sequence[SFTExample], where: Sequence[str]) -> TokenTable:
        """Our own examples; a mask of 1 is a label."""
        ids, mask, ends = array("i"), array("b"), [0]
        for example in examples:
            ids.extend(example.ids)
            mask.extend(example.mask)
            ends.append(len(ids))
        flat = np.frombuffer(ids, dtype=np.int32) if ids else np.zeros(0, np.int32)
        supervised = np.frombuffer(mask, dtype=np.int8) if mask else np.zeros(0, np.int8)
        labels = np.where(supervised != 0, flat, np.int32(IGNORED))
        return cls(flat, labels, np.array(ends, dtype=np.int64), where)

    @classmethod
    def of_documents(cls, rows: Iterable[tuple[Row, Row, Row]], where: Sequence[str]) -> TokenTable:
        """Rows of any trainer, each cut into its documents.

        Args:
            rows: (ids, labels, 0 for padding or the number of the document), each (T,).
            where: names of the rows.

        Raises:
            UsageError: ids and labels of different lengths.
        """
        ids, labels, ends = array("i"), array("i"), [0]
        names: list[str] = []
        padded: list[int] = []
        blocks: list[int] = []
        for number, (row, targets, real) in enumerate(rows):
            if row.shape != targets.shape:
                raise UsageError(
                    f"{where[number]} has {len(row)} input_ids and {len(targets)} labels",
                    fix="provide labels of the same length: an id or -100 for each token",
                    code="audit-labels-length",
                )
            kept = np.flatnonzero(real)
            if (targets[real == 0] != IGNORED).any():
                padded.append(len(names))
            borders = np.flatnonzero(np.diff(real[kept])) + 1
            for start, end in pairwise([0, *borders.tolist(), len(kept)]):
                names.append(where[number])
                blocks.append(number)
                ids.extend(row[kept[start:end]].tolist())
                labels.extend(targets[kept[start:end]].tolist())
                ends.append(len(ids))
        return cls(
            np.array(ids, dtype=np.int32),
            np.array(labels, dtype=np.int32),
            np.array(ends, dtype=np.int64),
            names,
            tuple(padded),
            np.array(blocks, dtype=np.int64) if len(where) < len(names) else None,
        )

    def select(self, keep: Flags) -> TokenTable:
        """The table of some of its rows; `keep` is (R,)."""
        tokens = np.repeat(keep, self.lengths)
        rows = np.flatnonzero(keep).tolist()
        place = {row: number for number, row in enumerate(rows)}
        return TokenTable(
            self.ids[tokens],
            self.labels[tokens],
            np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            [self.where[row] for row in rows],
            tuple(place[row] for row in self.padding_supervised if row in place),
            None if self.blocks is None else self.blocks[rows],
        )

    def __len__(self) -> int:
        return len(self.where)

    @cached_property
    def lengths(self) -> Indices:
        """(R,) tokens of each row."""
        return np.diff(self.starts)

    @cached_property
    def supervised(self) -> Flags:
        """(N,) if there is a label that a causal model can be trained on: the first token of
        a row has no predictor."""
        on = self.labels != IGNORED
        on[self.starts[:-1][self.lengths > 0]] = False
        return on

    @cached_property
    def num_supervised(self) -> Indices:
        """(R,) labels of each row."""
        return self.per_row(self.supervised)

    @cached_property
    def runs(self) -> Indices:
        """(K, 2) first and last position of each stretch of labels, in order."""
        on = self.supervised
        if not on.size:
            return np.zeros((0, 2), np.int64)
        before = np.zeros_like(on)
        before[1:] = on[:-1]
        before[self.starts[:-1][self.lengths > 0]] = False
        after = np.zeros_like(on)
        after[:-1] = on[1:]
        after[self.starts[1:][self.lengths > 0] - 1] = False
        return np.stack([np.flatnonzero(on & ~before), np.flatnonzero(on & ~after)], axis=1)

    def per_row(self, flags: Flags) -> Indices:
        """(R,) how many positions of each row are set."""
        totals = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]

    def rows_of(self, positions: Indices) -> Indices:
        """The rows that positions lie in."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def find(self, sequence: Sequence[int]) -> Indices:
        """First positions at which a sequence of ids stands, inside a row."""
        size, total = len(sequence), len(self.ids)
        if not size or size > total:
            return np.zeros(0, np.int64)
        hits = np.flatnonzero(self.ids[: total - size + 1] == sequence[0])
        for offset, token in enumerate(sequence[1:], 1):
            hits = hits[self.ids[hits + offset] == token]
        inside = self.rows_of(hits) == self.rows_of(hits + size - 1)
        return hits[inside]

    def row_ids(self, row: int) -> list[int]:
        return self.ids[self.starts[row] : self.starts[row + 1]].tolist()
