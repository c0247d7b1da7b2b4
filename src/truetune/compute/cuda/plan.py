"""Choose the calls of a variable-length attention kernel that compute a packed layout.

Such a kernel takes several sequences in one call; the number of queries and of keys may differ in a
sequence. Rows need one call. A tree needs a causal call in which each node sees only itself, and a
full call for each depth (or one for all, if the keys of a node's ancestors are gathered). Their
results are merged by log-sum-exp. A tree with a window needs one causal call, in which each node
has the keys that its window reaches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from truetune.compute.layout import Layout, Meeting

Stretch = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One call of the kernel: ranges of queries, each with the ranges of keys that it attends to.

    Attributes:
        queries: for each sequence, (begin, end) of its queries in the packed sequence; a token
            occurs only once.
        keys: for each sequence, the (begin, end) ranges from which its keys are gathered.
        causal: if True, the last query sees every key, and each query before it one key fewer;
            if False, all queries see all keys.
        window: largest number of keys that a query sees, including its own.
    """

    queries: tuple[Stretch, ...]
    keys: tuple[tuple[Stretch, ...], ...]
    causal: bool
    window: int | None = None

    @cached_property
    def cum_q(self) -> list[int]:
        """Return the offset of each sequence's queries in the call, and the end of the last."""
        return [0, *accumulate(b - a for a, b in self.queries)]

    @cached_property
    def cum_k(self) -> list[int]:
        """Return the same offsets for the keys."""
        return [0, *accumulate(sum(b - a for a, b in spans) for spans in self.keys)]

    @property
    def max_q(self) -> int:
        return max(b - a for a, b in self.queries)

    @property
    def max_k(self) -> int:
        return max(sum(b - a for a, b in spans) for spans in self.keys)

    def query_indices(self) -> list[int]:
        """Return the index of each query in the packed sequence."""
        return _indices(self.queries)

    def key_indices(self) -> list[int]:
        """Return the index of each key in the packed sequence; a token may occur several times."""
        return _indices(span for spans in self.keys for span in spans)


def _indices(spans: Iterable[Stretch]) -> list[int]:
    return [t for a, b in spans for t in range(a, b)]


def plan(layout: Layout, window: int | None) -> tuple[Call, ...]:
    """Return the calls whose merged results are the attention of every token.

    The first call has a result for each token.
    """
    if window is not None and window >= layout.longest:
        window = None
    nodes = tuple(zip(layout.starts, layout.starts[1:], strict=False))
    alone = tuple((span,) for span in nodes)
    if layout.is_flat:
        return (Call(nodes, alone, causal=True, window=window),)
    if window is not None:
        keys = tuple(_reached(layout, node, window) for node in range(len(nodes)))
        return (Call(nodes, keys, causal=True, window=window),)
    full = [m for m in layout.meetings(None) if m.kind == "full"]
    return (Call(nodes, alone, causal=True), *(_call(group) for group in _disjoint(full)))


def _call(meetings: list[Meeting]) -> Call:
    return Call(tuple((m.q0, m.q1) for m in meetings), tuple(m.keys for m in meetings), False)


def _disjoint(meetings: list[Meeting]) -> list[list[Meeting]]:
    """Divide meetings into as few groups as possible, so that no group has a query twice."""
    groups: list[list[Meeting]] = []
    ends: list[int] = []
    for meeting in sorted(meetings, key=lambda m: (m.q0, -m.q1)):
        for group, end in enumerate(ends):
            if end <= meeting.q0:
                groups[group].append(meeting)
                ends[group] = meeting.q1
                break
        else:
            groups.append([meeting])
            ends.append(meeting.q1)
    return groups


def _reached(layout: Layout, node: int, window: int) -> tuple[Stretch, ...]:
    """Return the ranges of the node's tokens, and of its ancestors' tokens that its first token
    sees."""
    spans = [(layout.starts[node], layout.starts[node + 1])]
    left = window - 1
    for ancestor in reversed(layout.ancestors(node)):
        if left <= 0:
            break
        a, b = layout.starts[ancestor], layout.starts[ancestor + 1]
        spans.append((max(a, b - left), b))
        left -= b - a
    return tuple(reversed(spans))
