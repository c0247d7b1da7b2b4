"""Examples to padded batches: the reference path; and which rows a step trains.

input   SFTExample(ids, mask), in any number and length
does    orders rows by (seed, epoch), cuts a step into micro-batches, shifts once, pads right
output  Batch: what one forward pass needs, and what the loop must count; `packing.py` makes the
        same of rows without padding, and the two are held equal by tests

A step's rows depend on its number alone, so a resumed run needs no state but the step.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from truetune.compute.cuda.copies import sent
from truetune.contract.example import SFTExample
from truetune.system.lazy import torch


def pad_and_collate(
    examples: Sequence[SFTExample], *, max_seq_len: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference collation: pad on the right to one width, and shift the labels once.

    Args:
        examples: rows of (ids, mask).
        max_seq_len: maximum length before the shift; longer rows lose their end, and a warning says
            how many there were.
        pad_id: id for padding; its positions have mask 0, whatever the id is.

    Returns:
        x, y, loss_mask, each (B, max_seq_len - 1), int64; y[b, t] is the token after x[b, t], and
        loss_mask[b, t] is 1 where y[b, t] is supervised.

    Raises:
        ValueError: no examples, max_seq_len below 2, or ids and mask of different lengths.
    """
    if not examples:
        raise ValueError("pad_and_collate needs at least one example")
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len must be at least 2, got {max_seq_len}")
    width = max_seq_len - 1
    x = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    y = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros((len(examples), width), dtype=torch.int64)
    num_cut = 0
    for row, (ids, mask) in enumerate(examples):
        if len(ids) != len(mask):
            raise ValueError(f"example {row}: {len(ids)} ids but {len(mask)} mask entries")
        num_cut += len(ids) > max_seq_len
        kept = torch.tensor(ids[:max_seq_len], dtype=torch.int64)
        supervised = torch.tensor(mask[:max_seq_len], dtype=torch.int64)
        # Padded first and shifted then: a row that is shorter than the width keeps its last token
        # among the inputs, where the target behind it is padding with mask 0.
        x[row, : len(kept)] = kept[:width]
        targets = max(len(kept) - 1, 0)
        y[row, :targets], loss_mask[row, :targets] = kept[1:], supervised[1:]
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(examples)} examples are longer than max_seq_len={max_seq_len} "
            "and lost their end",
            stacklevel=2,
        )
    return x, y, loss_mask


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass.

    Attributes:
        ids_BT: int64 input ids, padded right.
        targets_BT: int64, the token after each input token.
        supervised_BT: int64, 1 where the target counts.
        rows: index of the example of each row.
        num_tokens: unpadded tokens of the rows.
        num_supervised: targets that count.
    """

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    supervised_BT: torch.Tensor
    rows: tuple[int, ...]
    num_tokens: int
    num_supervised: int

    @property
    def num_computed(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.ids_BT.numel()

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            sent(self.ids_BT, device),
            sent(self.targets_BT, device),
            sent(self.supervised_BT, device),
            self.rows,
            self.num_tokens,
            self.num_supervised,
        )


# A tree may exceed the usual limit if splitting it would repeat an eighth of a forward pass.
_WORTH = 8


@dataclass
class Limits:
    """Limits of a forward pass, lowered if memory runs out. A single row is always allowed.

    Attributes:
        rows: maximum number of rows.
        tokens: maximum number of tokens; None if only the rows are limited.
        tree_tokens: maximum number of tokens of one tree of rows that share a prefix, if that is
            more and saves time: splitting a tree computes the prefix again.
    """

    rows: int
    tokens: int | None = None
    tree_tokens: int | None = None

    def take(self, tokens: int, rows: int, *, shared: int = 0) -> bool:
        """Whether this number of tokens and rows is within the limits.

        Args:
            shared: tokens that would be computed again if a tree were cut before its last row.
                Where they are few against a whole forward pass, as the system prompt of a template
                is, a larger tree takes memory and saves no time.
        """
        most = self.tokens
        if most is not None and _WORTH * shared >= most:
            most = max(most, self.tree_tokens or 0)
        return rows <= self.rows and (most is None or tokens <= most)

    def halve(self, batch: MicroBatch) -> bool:
        """Lower the limits below a batch that did not fit; False where it is a single row."""
        if len(batch.rows) == 1:
            return False
        self.rows = min(self.rows, -(-len(batch.rows) // 2))
        if self.tokens is not None:
            half = -(-batch.num_computed // 2)
            self.tokens = min(self.tokens, half)
            self.tree_tokens = min(self.tree_tokens or half, half)
        return True


class MicroBatch(Protocol):
    """What the training loop counts in one forward pass, padded or packed; see `Batch`."""

    @property
    def rows(self) -> tuple[int, ...]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_supervised(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    def to(self, device: torch.device | str) -> MicroBatch: ...


class Batcher(Protocol):
    """What the training loop needs from a source of batches."""

    def micro_batches(self, step: int) -> Sequence[MicroBatch]:
        """All batches of one optimizer step (0-based); the same list at each call."""
        ...

    def batches(self, examples: Sequence[SFTExample]) -> Iterator[MicroBatch]:
        """Batches over `examples` in order, for evaluation."""
        ...


def rows_of_epochs(num_rows: int, epochs: float) -> int:
    """Rows seen in so many epochs, a part of a row counting whole; at least one."""
    # Rounded first: 100 x 1.1 is 110.00000000000001 in binary.
    return max(math.ceil(round(num_rows * epochs, 6)), 1)


class RowStream:
    """The rows of a run in their order: epochs, each a permutation drawn from (seed, epoch).

    A step that reaches the end of an epoch continues in the next one, so every row is used equally
    often. With `epochs`, the stream ends there, and the last step may be smaller.
    """

    def __init__(self, num_rows: int, seed: int, epochs: float | None = None) -> None:
        self.num_rows, self.seed = num_rows, seed
        self.end = None if epochs is None else rows_of_epochs(num_rows, epochs)
        self._epoch, self._order = -1, list[int]()

    @property
    def num_steps(self) -> int | None:
        """Steps until the stream ends, None if it does not."""
        raise NotImplementedError

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of one step (0-based), in order; a function of its arguments."""
        raise NotImplementedError

    def _row(self, place: int) -> int:
        """Index of the row at a place of the stream."""
        epoch, offset = divmod(place, self.num_rows)
        if epoch != self._epoch:
            order = list(range(self.num_rows))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[offset]


class RowOrder(RowStream):
    """Steps of equally many rows."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, epochs: float | None = None):
        super().__init__(num_rows, seed, epochs)
        self.batch_size = batch_size

    @property
    def num_steps(self) -> int | None:
        return None if self.end is None else -(-self.end // self.batch_size)

    def rows(self, step: int) -> list[int]:
        start = step * self.batch_size
        stop = start + self.batch_size
        if self.end is not None:
            stop = min(stop, self.end)
        return [self._row(place) for place in range(start, stop)]


class TokenOrder(RowStream):
    """Steps of at most so many tokens: a step takes the next rows of the stream while they fit,
    and at least one.

    Args:
        lengths: tokens of each row.
        tokens: of a step.
    """

    def __init__(
        self, lengths: Sequence[int], tokens: int, seed: int, epochs: float | None = None
    ) -> None:
        super().__init__(len(lengths), seed, epochs)
        self.lengths, self.tokens = lengths, tokens
        # Places of the stream where the steps begin, as far as they are known.
        self._begins = [0]

    @property
    def num_steps(self) -> int | None:
        if self.end is None:
            return None
        while self._begins[-1] < self.end:
            self._cut()
        return len(self._begins) - 1

    def rows(self, step: int) -> list[int]:
        while len(self._begins) < step + 2 and self._begins[-1] != self.end:
            self._cut()
        begins = self._begins[step : step + 2]
        return [self._row(place) for place in range(*begins)] if len(begins) == 2 else []

    def _cut(self) -> None:
        """Find where the next step ends."""
        begin = place = self._begins[-1]
        filled = 0
        while self.end is None or place < self.end:
            filled += self.lengths[self._row(place)]
            if filled > self.tokens and place > begin:
                break
            place += 1
        self._begins.append(place)


class PaddedBatcher:
    """The reference batcher: rows padded right to the longest of their micro-batch.

    Args:
        examples: what is trained.
        max_seq_len: longest row; longer ones lose their end, with a warning.
        pad_id: fills the rest.
        order: which rows a step trains.
        limits: of a forward pass (its rows: padded tokens are not limited).
        share: of a step's rows, (this process, processes).
    """

    def __init__(
        self,
        examples: Sequence[SFTExample],
        *,
        max_seq_len: int,
        pad_id: int,
        order: RowStream,
        limits: Limits,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.examples, self.max_seq_len, self.pad_id = examples, max_seq_len, pad_id
        self.order, self.limits, self.share = order, limits, share

    def micro_batches(self, step: int) -> list[Batch]:
        # The gradient of a step is a sum over its rows: sorting them by length changes nothing
        # but the padding.
        rows = sorted(self.order.rows(step), key=lambda row: len(self.examples[row].ids))
        rank, size = self.share
        return list(self._cut(self.examples, rows[rank::size]))

    def batches(self, examples: Sequence[SFTExample]) -> Iterator[Batch]:
        return self._cut(examples, range(len(examples)))

    def _cut(self, examples: Sequence[SFTExample], rows: Sequence[int]) -> Iterator[Batch]:
        size = self.limits.rows
        for start in range(0, len(rows), size):
            yield self._collate(examples, tuple(rows[start : start + size]))

    def _collate(self, examples: Sequence[SFTExample], rows: tuple[int, ...]) -> Batch:
        chosen = [examples[row] for row in rows]
        longest = max(len(example.ids) for example in chosen)
        if longest > self.max_seq_len:
            num_cut = sum(len(example.ids) > self.max_seq_len for example in chosen)
            warnings.warn(
                f"{num_cut} of {len(chosen)} rows of a batch are longer than "
                f"max_seq_len={self.max_seq_len} and lost their end",
                stacklevel=4,
            )
            chosen = [
                SFTExample(e.ids[: self.max_seq_len], e.mask[: self.max_seq_len]) for e in chosen
            ]
            longest = self.max_seq_len
        x, y, supervised = pad_and_collate(chosen, max_seq_len=max(longest, 2), pad_id=self.pad_id)
        num_tokens = sum(len(example.ids) for example in chosen)
        return Batch(x, y, supervised, rows, num_tokens, int(supervised.sum()))
