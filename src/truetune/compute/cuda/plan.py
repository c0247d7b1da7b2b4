"""The calls of a variable-length attention kernel that compute a packed layout.

Such a kernel takes sequences side by side: queries and keys of each, as many of one as of the
other or not. Rows are one call. A tree is a causal call for every node by itself, and a full one
for each depth (or one for all, where nodes bring their ancestors' keys together), merged by
log-sum-exp. A window in a tree is one causal call, each node with the keys that its window reaches.
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
    """Sequences side by side: stretches of queries, each with the stretches of keys that it meets.

    Attributes:
        queries: (begin, end) in the packed sequence of each sequence's queries; no token twice.
        keys: of each sequence, (begin, end) of what its keys are brought together from.
        causal: the last query sees every key, each one before it one key fewer; False: all see all.
        window: keys that a query sees at most, the last one that it sees included.
    """

    queries: tuple[Stretch, ...]
    keys: tuple[tuple[Stretch, ...], ...]
    causal: bool
    window: int | None = None

    @cached_property
    def cum_q(self) -> list[int]:
        """Where each sequence's queries begin among all of the call, and where the last ends."""
        return [0, *accumulate(b - a for a, b in self.queries)]

    @cached_property
    def cum_k(self) -> list[int]:
        """The same of the keys."""
        return [0, *accumulate(sum(b - a for a, b in spans) for spans in self.keys)]

    @property
    def max_q(self) -> int:
        return max(b - a for a, b in self.queries)

    @property
    def max_k(self) -> int:
        return max(sum(b - a for a, b in spans) for spans in self.keys)

    def query_indices(self) -> list[int]:
        """Of each query in the packed sequence."""
        return _indices(self.queries)

    def key_indices(self) -> list[int]:
        """Of each key in the packed sequence; a token may come several times."""
        return _indices(span for spans in self.keys for span in spans)


def _indices(spans: Iterable[Stretch]) -> list[int]:
    return [t for a, b in spans for t in range(a, b)]


def plan(layout: Layout, window: int | None) -> tuple[Call, ...]:
    """Calls whose results, merged, are the attention of every token; the first one has a result
    for each."""
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
    """As few groups as there are meetings of one query, none with a query twice."""
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
    """The node's tokens, and those of its ancestors that its first token sees."""
    spans = [(layout.starts[node], layout.starts[node + 1])]
    left = window - 1
    for ancestor in reversed(layout.ancestors(node)):
        if left <= 0:
            break
        a, b = layout.starts[ancestor], layout.starts[ancestor + 1]
        spans.append((max(a, b - left), b))
        left -= b - a
    return tuple(reversed(spans))
