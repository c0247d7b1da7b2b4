"""Token rows as the loss sees them: ids and labels of all rows in two flat arrays.

input   rows from anywhere: our own examples, a dataset's `input_ids` and `labels`, a collator's
        padded batches
does    takes padding off (attention mask 0), cuts packed rows where positions or segments restart
output  TokenTable: what the check families judge, row by row or all at once
who     labels.py, preflight.py; nothing here knows a tokenizer
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from truetune.contract.example import SFTExample

IGNORED = -100

Ints = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Unpadded token rows.

    Attributes:
        ids: (N,) ids of all rows, one after the other.
        labels: (N,) the label at each position as the model is given it (not shifted); IGNORED
            where there is none.
        starts: (R + 1,) row r is ids[starts[r]:starts[r + 1]].
        where: R names of rows.
        padding_supervised: rows that had a label on padding, before it was taken off.
        blocks: (R,) number of the row as it was given that each document lay in; None where
            nothing was packed.
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
    def of_rows(
        cls,
        rows: Iterable[Any],
        *,
        pad_id: int | None = None,
        where: Callable[[int], str] = "row {}".format,
    ) -> TokenTable:
        """Rows of any trainer.

        Args:
            rows: each a mapping with `input_ids` and `labels` (and `attention_mask`,
                `position_ids` where there are some), or a tuple (input_ids, labels) or
                (input_ids, labels, attention_mask); lists, arrays or tensors, of one row (T,) or
                of a batch (B, T). A mask of segment numbers (1, 2, ...) cuts a packed row, and so
                do positions that restart at 0.
            pad_id: what to take off the ends where there is no attention mask.
            where: the name of row n, counted from 0 over all batches.

        Raises:
            ValueError: a row without ids or labels, or of different lengths.
        """
        ids, labels, ends = array("i"), array("i"), [0]
        names: list[str] = []
        padded: list[int] = []
        blocks: list[int] = []
        number = 0
        for row in rows:
            for fields in _single_rows(row):
                name = where(number)
                number += 1
                for part_ids, part_labels, on_padding in _segments(fields, pad_id, name):
                    if on_padding:
                        padded.append(len(names))
                    names.append(name)
                    blocks.append(number - 1)
                    ids.extend(part_ids.tolist())
                    labels.extend(part_labels.tolist())
                    ends.append(len(ids))
        return cls(
            np.array(ids, dtype=np.int32),
            np.array(labels, dtype=np.int32),
            np.array(ends, dtype=np.int64),
            names,
            tuple(padded),
            np.array(blocks, dtype=np.int64) if number < len(names) else None,
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
    def row_of(self) -> Indices:
        """(N,) the row of each position."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @cached_property
    def supervised(self) -> Flags:
        """(N,) where there is a label that a causal model can be trained on: the first token of
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

    def row_labels(self, row: int) -> list[int]:
        return self.labels[self.starts[row] : self.starts[row + 1]].tolist()


def _single_rows(row: Any) -> Iterable[dict[str, npt.NDArray[np.int64]]]:
    """A row, or the rows of a batch, as 1-D arrays by name."""
    if isinstance(row, Mapping) or hasattr(row, "keys"):
        fields = {name: row[name] for name in _FIELDS if row.get(name) is not None}
    else:
        fields = {n: v for n, v in zip(_FIELDS, row, strict=False) if v is not None}
    for name in ("input_ids", "labels"):
        if name not in fields:
            raise ValueError(f"a row has no {name}")
    arrays = {name: _array(value) for name, value in fields.items()}
    if arrays["input_ids"].ndim == 1:
        yield {name: value.reshape(-1) for name, value in arrays.items()}
        return
    for index in range(len(arrays["input_ids"])):
        # Positions of a packed batch may stand there once for all rows.
        yield {n: (v[index] if len(v) > index else v[0]) for n, v in arrays.items() if v.ndim == 2}


_FIELDS = ("input_ids", "labels", "attention_mask", "position_ids")


def _array(value: Any) -> npt.NDArray[np.int64]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.int64)


def _segments(
    fields: Mapping[str, npt.NDArray[np.int64]], pad_id: int | None, name: str
) -> Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], bool]]:
    """(ids, labels, whether its padding had a label) of each document of a row."""
    ids, labels = fields["input_ids"], fields["labels"]
    if ids.shape != labels.shape:
        raise ValueError(f"{name} has {len(ids)} input_ids and {len(labels)} labels")
    mask, positions = fields.get("attention_mask"), fields.get("position_ids")
    if mask is None or mask.shape != ids.shape:
        kept = _without_pads(ids, labels, pad_id)
        on_padding = False
    else:
        kept = np.flatnonzero(mask)
        on_padding = bool((labels[mask == 0] != IGNORED).any())
    ids, labels = ids[kept], labels[kept]
    restarts = np.zeros(len(ids), dtype=bool)
    if positions is not None and len(positions) > (kept[-1] if len(kept) else -1):
        inside = positions[kept]
        if not stand_still(inside):
            restarts[1:] |= inside[1:] <= inside[:-1]
    if mask is not None and mask.shape == fields["input_ids"].shape:
        segments = mask[kept]
        restarts[1:] |= segments[1:] != segments[:-1]
    cuts = [0, *np.flatnonzero(restarts).tolist(), len(ids)]
    for part, (start, end) in enumerate(pairwise(cuts)):
        yield ids[start:end], labels[start:end], on_padding and part == 0


def stand_still(positions: npt.NDArray[np.int64]) -> bool:
    """Whether positions do not count: one token's is mostly that of the token before it."""
    return len(positions) > 2 and float((np.diff(positions) == 0).mean()) > 0.5


def _without_pads(
    ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], pad_id: int | None
) -> npt.NDArray[np.int64]:
    """Positions without the pad tokens at either end that have no label.

    One is left at the end: where the pad token also ends answers, the first of them may be the
    real end, masked with the padding.
    """
    if pad_id is None:
        return np.arange(len(ids))
    solid = np.flatnonzero((ids != pad_id) | (labels != IGNORED))
    if not len(solid):
        return np.zeros(0, np.int64)
    first, last = int(solid[0]), int(solid[-1]) + 1
    ended = labels[last - 1] != IGNORED and ids[last - 1] == pad_id
    return np.arange(first, last if ended else min(last + 1, len(ids)))
