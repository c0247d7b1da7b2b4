"""Examples to packed batches: no token is padding, and none is computed twice in a batch.

input   SFTExample(ids, mask), in any number and length
does    cuts a step's rows into micro-batches by first-fit decreasing (Johnson 1973); within one,
        rows with a common prefix become a tree, which contains the prefix once
output  PackedBatch: ids, the layout of which tokens attend to which, and the supervised positions
        with their targets; labels are shifted here, and in `batch.py` for the padded path

A step's batches depend on its number alone, so a resumed run needs no state but the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from truetune.compute.batch import Limits, RowStream
from truetune.compute.cuda.copies import sent
from truetune.compute.dropout import token_keys
from truetune.compute.layout import MOST_KEYS, Layout
from truetune.contract.example import SFTExample
from truetune.contract.tokens import common_prefix
from truetune.system.lazy import torch

# The shortest prefix that is shared: merging attention results for a shorter one costs as much as
# it saves. Short rows go through attention together, and nothing is merged.
MIN_SHARED, MIN_SHARED_SHORT = 16, 3


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One forward pass over rows, or trees of rows, side by side.

    Attributes:
        ids_T: int64 input ids, each node's tokens in a run.
        layout: the nodes, and which tokens attend to which.
        positions_N: int64, index in the sequence from which each target is predicted. In a tree
            a position may predict several targets.
        targets_N: int64.
        weights_N: float32, the number of rows that contain the target; 1 if rows share nothing.
        rows: index of the example of each row.
        num_tokens: unpadded tokens of the rows; shared tokens count once for each row.
        num_supervised: targets of the rows: the sum of the weights.
        keys_T: int64, the keys that determine adapter dropout, see `token_keys`.
    """

    ids_T: torch.Tensor
    layout: Layout
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    rows: tuple[int, ...]
    num_tokens: int
    num_supervised: int
    keys_T: torch.Tensor | None = None

    @property
    def num_computed(self) -> int:
        """Tokens that go through the model: a shared prefix counts once."""
        return self.layout.num_tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(
            self,
            ids_T=sent(self.ids_T, device),
            positions_N=sent(self.positions_N, device),
            targets_N=sent(self.targets_N, device),
            weights_N=sent(self.weights_N, device),
            keys_T=None if self.keys_T is None else sent(self.keys_T, device),
        )


def pack(
    examples: Sequence[SFTExample], rows: Sequence[int], *, min_shared: int | None = MIN_SHARED
) -> PackedBatch:
    """Put rows into one sequence.

    Args:
        examples: where the rows are found.
        rows: indices of examples; one may come twice.
        min_shared: tokens from which a common beginning is shared; None shares nothing.
    """
    forest = _Forest(examples, min_shared)
    ordered = sorted(rows, key=lambda row: examples[row].ids)
    forest.grow(ordered, 0, -1)
    targets = forest.targets
    layout = Layout(tuple(forest.lengths), tuple(forest.parents))
    return PackedBatch(
        ids_T=torch.tensor(forest.ids, dtype=torch.int64),
        layout=layout,
        positions_N=torch.tensor([p for p, _ in targets], dtype=torch.int64),
        targets_N=torch.tensor([t for _, t in targets], dtype=torch.int64),
        weights_N=torch.tensor(list(targets.values()), dtype=torch.float32),
        rows=tuple(ordered),
        num_tokens=sum(len(examples[row].ids) for row in ordered),
        num_supervised=sum(examples[row].num_supervised for row in ordered),
        keys_T=token_keys(forest.ids, layout),
    )


def _inputs(example: SFTExample) -> int:
    """Number of tokens that go into the model: all but the last, which predicts nothing, and at
    least one."""
    return max(len(example.ids) - 1, 1)


class _Forest:
    """The nodes of a packed sequence while they are added, depth first."""

    def __init__(self, examples: Sequence[SFTExample], min_shared: int | None) -> None:
        self.examples, self.min_shared = examples, min_shared
        self.ids: list[int] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        # (position in the sequence, target) -> rows in which it is supervised
        self.targets: dict[tuple[int, int], int] = {}

    def grow(self, rows: Sequence[int], depth: int, parent: int, line: Sequence[int] = ()) -> None:
        """Add rows that are sorted by their ids and share their first `depth` tokens.

        Args:
            parent: the node that contains the last shared token; -1 if depth is 0.
            line: index in the sequence of each shared token.
        """
        # Nodes of equal length side by side go through attention together.
        for alike, shared in sorted(self._families(rows, depth), key=lambda family: family[1]):
            node, here = parent, list(line)
            if shared > depth:
                node = len(self.lengths)
                here += range(len(self.ids), len(self.ids) + shared - depth)
                self.ids += self.examples[alike[0]].ids[depth:shared]
                self.lengths.append(shared - depth)
                self.parents.append(parent)
            ended = [row for row in alike if _inputs(self.examples[row]) == shared]
            for row in ended:
                self._supervise(row, here)
            if len(ended) < len(alike):
                self.grow([row for row in alike if row not in ended], shared, node, here)

    def _families(self, rows: Sequence[int], depth: int) -> Iterator[tuple[list[int], int]]:
        """Runs of rows that share enough beyond `depth`, each with its common length."""
        first = 0
        while first < len(rows):
            shared = _inputs(self.examples[rows[first]])
            last = first + 1
            while last < len(rows) and self.min_shared is not None:
                common = common_inputs(self.examples[rows[last - 1]], self.examples[rows[last]])
                if common < depth + self.min_shared:
                    break
                shared = min(shared, common)
                last += 1
            yield list(rows[first:last]), shared
            first = last

    def _supervise(self, row: int, line: Sequence[int]) -> None:
        ids, mask = self.examples[row]
        for t in range(len(ids) - 1):
            if mask[t + 1]:
                pair = (line[t], ids[t + 1])
                self.targets[pair] = self.targets.get(pair, 0) + 1


def common_inputs(one: SFTExample, other: SFTExample) -> int:
    """Number of input tokens in the common prefix of two examples."""
    return min(_inputs(one), _inputs(other), common_prefix(one.ids, other.ids))


class PackedBatcher:
    """Rows packed without padding.

    Args:
        examples: the training examples.
        max_seq_len: maximum length of a row; longer rows lose their end, with a warning.
        order: the rows of each step.
        limits: the limits of a micro-batch, which may be lowered during the run.
        min_shared: see `pack`; "auto" shares prefixes where that saves time.
        share: this process's share of a step's rows, as (index of the process, number of them).
    """

    def __init__(
        self,
        examples: Sequence[SFTExample],
        *,
        max_seq_len: int,
        order: RowStream,
        limits: Limits,
        min_shared: int | Literal["auto"] | None = "auto",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.max_seq_len, self.order, self.limits = max_seq_len, order, limits
        self.min_shared, self.share = min_shared, share
        self.examples = self._fitting(examples)

    def micro_batches(self, step: int) -> list[PackedBatch]:
        bins: list[tuple[int, list[int]]] = []  # (tokens, rows)
        step_rows = self.order.rows(step)
        # Computed for the whole step, so that all processes share the same prefixes.
        least = self._least(self.examples, step_rows)
        for size, rows in self._trees(self._dealt(step_rows, least), self.limits, least):
            for index, (filled, there) in enumerate(bins):
                if self.limits.take(filled + size, len(there) + len(rows)):
                    bins[index] = (filled + size, there + rows)
                    break
            else:
                bins.append((size, rows))
        return [pack(self.examples, rows, min_shared=least) for _, rows in bins]

    def _least(self, examples: Sequence[SFTExample], rows: Sequence[int]) -> int | None:
        """The length in tokens from which a prefix is shared."""
        if self.min_shared != "auto":
            return self.min_shared
        longest = max((_inputs(examples[row]) for row in rows), default=0)
        return MIN_SHARED_SHORT if longest <= MOST_KEYS else MIN_SHARED

    def _dealt(self, rows: Sequence[int], least: int | None) -> Sequence[int]:
        """This process's rows of a step. Rows that share a prefix stay together, and the next
        largest tree goes to the process with the fewest tokens. This depends only on the rows, not
        on limits that one of the processes has lowered."""
        rank, size = self.share
        if size == 1:
            return rows
        piles: list[tuple[int, list[int]]] = [(0, []) for _ in range(size)]
        for tokens, tree in self._trees(rows, Limits(rows=-(-len(rows) // size)), least):
            least = min(range(size), key=lambda pile: piles[pile][0])
            filled, there = piles[least]
            piles[least] = (filled + tokens, there + tree)
        return piles[rank][1]

    def _trees(
        self, rows: Sequence[int], limits: Limits, least: int | None
    ) -> list[tuple[int, list[int]]]:
        """(tokens, rows) of groups of rows that share a prefix, each within the limits, the largest
        first."""
        return sorted(self._runs(rows, limits, least), key=lambda tree: -tree[0])

    def _runs(
        self, rows: Sequence[int], limits: Limits, least: int | None
    ) -> Iterator[tuple[int, list[int]]]:
        size, tree = 0, list[int]()
        ordered = sorted(rows, key=lambda row: self.examples[row].ids)
        for row in ordered:
            length = _inputs(self.examples[row])
            shared = 0
            if tree and least is not None:
                shared = common_inputs(self.examples[tree[-1]], self.examples[row])
            grown = size + length - shared
            joins = least is not None and shared >= least
            if joins and limits.take(grown, len(tree) + 1, shared=shared):
                size = grown
                tree.append(row)
                continue
            if tree:
                yield size, tree
            size, tree = length, [row]
        if tree:
            yield size, tree

    def batches(self, examples: Sequence[SFTExample]) -> Iterator[PackedBatch]:
        """In order; a batch ends where a limit is reached."""
        examples = self._fitting(examples)
        filled, rows = 0, list[int]()
        for row, example in enumerate(examples):
            size = _inputs(example)
            if rows and not self.limits.take(filled + size, len(rows) + 1):
                yield pack(examples, rows, min_shared=self._least(examples, rows))
                filled, rows = 0, []
            filled += size
            rows.append(row)
        if rows:
            yield pack(examples, rows, min_shared=self._least(examples, rows))

    def _fitting(self, examples: Sequence[SFTExample]) -> Sequence[SFTExample]:
        overlong = sum(len(example.ids) > self.max_seq_len for example in examples)
        if not overlong:
            return examples
        warnings.warn(
            f"{overlong} of {len(examples)} rows are longer than "
            f"max_seq_len={self.max_seq_len} and lose their end",
            stacklevel=3,
        )
        limit = self.max_seq_len
        return [SFTExample(e.ids[:limit], e.mask[:limit]) for e in examples]
