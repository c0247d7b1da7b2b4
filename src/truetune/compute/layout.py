"""Which tokens of a packed sequence attend to which: separate rows, or trees of shared prefixes.

input   the lengths of the pieces and where each one branches from
does    determines for every attention layer which ranges of queries attend to which ranges of keys
output  Layout, which is passed as a keyword of the model's call; Meeting, what one kernel call
        computes

A sequence is divided into nodes, each a contiguous run of tokens. A token attends to itself, to the
tokens before it in its own node and to all tokens of the node's ancestors. Nodes are in depth-first
order, so that all descendants of a node follow it without a gap and attend to its keys in one call.
Packed rows are trees of one node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from truetune.system.lazy import torch

# Up to this number of keys per query, nodes may go through attention in one padded product. With
# more, the attention weights that it keeps take more memory than the rest of a layer.
MOST_KEYS = 64


@dataclass(frozen=True)
class Meeting:
    """Queries [q0, q1) of the sequence attend to one or more ranges of keys.

    Attributes:
        keys: (begin, end) of each range of keys; several only if the kind is "full".
        kind: "causal": queries and keys are the same tokens of one node, and each attends to those
            up to itself; "full": every query attends to every key; "window": every query attends
            to the keys within the window, by their positions.
        count: number of consecutive ranges of equal length that are computed in the same way
            (causal only); q1 and the end of the keys are those of the first.
    """

    q0: int
    q1: int
    keys: tuple[tuple[int, int], ...]
    kind: str
    count: int = 1

    @property
    def queries(self) -> slice:
        """The queries, as a slice of the sequence."""
        return slice(self.q0, self.q0 + self.num_queries)

    @property
    def spans(self) -> list[slice]:
        """The ranges of keys, as slices of the sequence."""
        return [slice(k0, k0 + self.count * (k1 - k0)) for k0, k1 in self.keys]

    @property
    def num_queries(self) -> int:
        return self.count * (self.q1 - self.q0)


@dataclass(frozen=True, eq=False)
class Layout:
    """The nodes of a packed sequence, depth first.

    Attributes:
        lengths: number of tokens of each node, at least 1.
        parents: index of the node that each one continues, -1 for a root.
        made: what kernels derived from the layout, by kernel and by what it depends on.

    Raises:
        ValueError: an empty node, or nodes that are not depth first.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)
    _meetings: dict[int | None, list[Meeting]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or len(self.lengths) != len(self.parents):
            raise ValueError("a layout needs nodes of at least one token, each with a parent")
        line: list[int] = []
        for node, parent in enumerate(self.parents):
            while line and line[-1] != parent:
                line.pop()
            if parent >= 0 and not line:
                raise ValueError(f"node {node} does not follow its parent {parent} depth first")
            line.append(node)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index in the sequence of each node's first token, and the sequence's end."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Tokens of each node's ancestors: the position of its first token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + self.lengths[parent])
        return tuple(depths)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Index in the sequence after the last descendant of each node."""
        ends = list(self.starts[1:])
        for node in reversed(range(len(ends))):
            parent = self.parents[node]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[node])
        return tuple(ends)

    @property
    def is_flat(self) -> bool:
        """Whether no node has a parent: rows side by side."""
        return max(self.parents) < 0

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(d + n for d, n in zip(self.depths, self.lengths, strict=True))

    @cached_property
    def positions(self) -> list[int]:
        """Position of every token in its row: what rotary embeddings turn by."""
        return [
            depth + offset
            for depth, length in zip(self.depths, self.lengths, strict=True)
            for offset in range(length)
        ]

    def ancestors(self, node: int) -> list[int]:
        """From the root down, without the node itself."""
        line = []
        while (node := self.parents[node]) >= 0:
            line.append(node)
        return line[::-1]

    def meetings(self, window: int | None = None) -> list[Meeting]:
        """All meetings, for layers in which a token attends to the last `window` positions, itself
        included (all positions if None). In each of its meetings, every query attends to at least
        one key."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self._meetings:
            found = self._windowed(window) if window else self._unlimited()
            self._meetings[window] = found
        return self._meetings[window]

    def _unlimited(self) -> list[Meeting]:
        found: list[Meeting] = []
        by_node = self._is_deep()
        for node, start in enumerate(self.starts[:-1]):
            stop, end = self.starts[node + 1], self.ends[node]
            line = self.ancestors(node)
            if by_node and line:
                spans = tuple((self.starts[a], self.starts[a + 1]) for a in line)
                found.append(Meeting(start, stop, spans, "full"))
            last = found[-1] if found else None
            if last and last.kind == "causal" and _continues(last, start, stop):
                found[-1] = replace(last, count=last.count + 1)
            else:
                found.append(Meeting(start, stop, ((start, stop),), "causal"))
            if not by_node and end > stop:
                found.append(Meeting(stop, end, ((start, stop),), "full"))
        return found

    def _is_deep(self) -> bool:
        """Whether it is faster if each node attends to all its ancestors in one call than if all
        descendants of a node attend to it in one call: fewer outputs to merge, but more keys to
        gather."""
        below = sum(end - stop for end, stop in zip(self.ends, self.starts[1:], strict=True))
        own = sum(n for n, parent in zip(self.lengths, self.parents, strict=True) if parent >= 0)
        gathered = sum(d for node, d in enumerate(self.depths) if len(self.ancestors(node)) > 1)
        return own + gathered / 4 < below

    def _windowed(self, window: int) -> list[Meeting]:
        found: list[Meeting] = []
        for node, start in enumerate(self.starts[:-1]):
            stop, depth = self.starts[node + 1], self.depths[node]
            for ancestor in self.ancestors(node):
                # Keys that the node's first token attends to; queries that attend to the ancestor's
                # last key.
                first, after = self.depths[ancestor], self.depths[ancestor] + self.lengths[ancestor]
                hidden = max(depth - window + 1 - first, 0)
                reach = min(after - 1 + window - depth, stop - start)
                if hidden < self.lengths[ancestor] and reach > 0:
                    k0, k1 = self.starts[ancestor] + hidden, self.starts[ancestor + 1]
                    inside = depth + reach - 1 - (first + hidden) < window
                    kind = "full" if inside else "window"
                    found.append(Meeting(start, start + reach, ((k0, k1),), kind))
            if stop - start <= window:
                found.append(Meeting(start, stop, ((start, stop),), "causal"))
                continue
            # In blocks of the window's length, so that no mask grows with the square of the row.
            for q0 in range(start, stop, window):
                q1, k0 = min(q0 + window, stop), max(q0 - window + 1, start)
                found.append(Meeting(q0, q1, ((k0, q1),), "window"))
        return found


def _continues(last: Meeting, start: int, stop: int) -> bool:
    """Whether a causal stretch follows another one of its length."""
    return stop - start == last.q1 - last.q0 and start == last.q0 + last.num_queries


def visible(
    layout: Layout,
    queries: tuple[int, int],
    keys: tuple[int, int],
    window: int | None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Which keys of a stretch each query of a stretch sees, by their positions: (Q, K), bool.

    Only for queries whose node is the keys' node or one of its descendants.
    """
    positions = layout.positions
    q = torch.tensor(positions[slice(*queries)], device=device)[:, None]
    k = torch.tensor(positions[slice(*keys)], device=device)[None, :]
    seen = k <= q
    return seen if window is None else seen & (q - k < window)
