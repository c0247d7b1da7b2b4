"""Examples to packed batches: what stands where, how a step is cut, what is counted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune import SFTExample
from truetune.compute.batch import Limits, RowOrder, TokenOrder
from truetune.compute.packing import PackedBatcher, pack

pytestmark = pytest.mark.filterwarnings("error")


def batcher(
    rows: list[SFTExample],
    *,
    batch_size: int = 4,
    limits: Limits | None = None,
    max_seq_len: int = 50,
    min_shared: int | None = 3,
) -> PackedBatcher:
    order = RowOrder(len(rows), batch_size, 0)
    limits = limits or Limits(batch_size)
    return PackedBatcher(
        rows, max_seq_len=max_seq_len, order=order, limits=limits, min_shared=min_shared
    )


def row(*ids: int, first: int = 1) -> SFTExample:
    return SFTExample(list(ids), [int(t >= first) for t in range(len(ids))])


rows_of_few_ids = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=7
)


@given(rows_of_few_ids, st.sampled_from([None, 1, 2, 4]), st.integers(0, 5))
def test_a_batch_holds_what_its_rows_hold(
    ids: list[list[int]], min_shared: int | None, first: int
) -> None:
    """From the batch alone: each supervised token with the tokens that its predictor sees, as
    often as rows have it."""
    rows = [row(*line, first=first) for line in ids]
    batch = pack(rows, range(len(rows)), min_shared=min_shared)
    layout, flat = batch.layout, batch.ids_T.tolist()
    owners = [node for node, length in enumerate(layout.lengths) for _ in range(length)]
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for position, target, weight in zip(
        batch.positions_N.tolist(), batch.targets_N.tolist(), batch.weights_N.tolist(), strict=True
    ):
        line = [*layout.ancestors(owners[position]), owners[position]]
        seen = [t for n in line for t in range(layout.starts[n], layout.starts[n + 1])]
        found[tuple(flat[t] for t in seen if t <= position), target] += int(weight)
    expected = Counter(
        (tuple(line[:t]), line[t]) for line in ids for t in range(max(first, 1), len(line))
    )
    assert found == expected
    assert batch.num_supervised == expected.total() == batch.weights_N.sum()
    assert batch.num_tokens == sum(map(len, ids))
    assert Counter(batch.rows) == Counter(range(len(rows)))
    if min_shared is None:
        assert batch.num_computed == sum(max(len(line) - 1, 1) for line in ids)


def test_a_shared_beginning_stands_once() -> None:
    rows = [row(1, 2, 3, 4, 5), row(1, 2, 3, 9, 9, 9), row(7, 7), row(1, 2, 3, 4, 8)]
    batch = pack(rows, range(4), min_shared=3)
    # The two that go on with 4 share it as well: a level of its own costs more than one token.
    assert batch.ids_T.tolist() == [7, 1, 2, 3, 4, 4, 9, 9]
    assert batch.layout.lengths == (1, 3, 1, 1, 2)
    assert batch.layout.parents == (-1, -1, 1, 1, 1)
    assert pack(rows, range(4), min_shared=None).num_computed == 4 + 5 + 1 + 4


def test_equal_lengths_stand_side_by_side() -> None:
    rows = [row(*range(10 * n, 10 * n + n)) for n in (5, 3, 5, 4, 3)]
    assert pack(rows, range(5), min_shared=None).layout.lengths == (2, 2, 3, 4, 4)
    assert pack(rows[:4], range(4), min_shared=16).layout.lengths == (2, 3, 4, 4)


@pytest.mark.parametrize("limits", [Limits(4), Limits(2), Limits(9, 12), Limits(9, 20)])
def test_a_step_is_cut_within_the_limits(limits: Limits) -> None:
    lengths = (9, 3, 8, 5, 13, 2, 30, 6)
    rows = [row(*range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    made = batcher(rows, batch_size=6, limits=limits)
    for step in range(4):
        batches = made.micro_batches(step)
        assert sorted(r for b in batches for r in b.rows) == sorted(made.order.rows(step))
        for batch in batches:
            assert len(batch.rows) == 1 or limits.take(batch.num_computed, len(batch.rows))


def test_first_fit_decreasing() -> None:
    """Inputs of 8, 6, 4, 4, 2, 2 tokens in bins of 10: 8 + 2, 6 + 4, 4 + 2."""
    lengths = (5, 3, 9, 7, 3, 5)
    rows = [row(*range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    made = batcher(rows, batch_size=6, limits=Limits(6, 10))
    assert sorted(b.num_computed for b in made.micro_batches(0)) == [6, 10, 10]


def test_the_limit_counts_shared_tokens_once() -> None:
    rows = [row(*range(20), 50 + n, 60 + n) for n in range(4)]
    (batch,) = batcher(rows, limits=Limits(4, 24)).micro_batches(0)
    assert batch.num_computed == 24
    two = batcher(rows, limits=Limits(4, 23)).micro_batches(0)
    assert [b.num_computed for b in two] == [23, 21]


def test_a_tree_may_be_larger_than_rows_side_by_side() -> None:
    """Cutting it would compute the shared part again; rows that share nothing keep their limit."""
    rows = [row(*range(20), 50 + n, 60 + n) for n in range(4)] + [row(*range(70, 85))]
    made = batcher(rows, batch_size=5, limits=Limits(5, 15, 24))
    assert sorted(b.num_computed for b in made.micro_batches(0)) == [14, 24]
    made.limits.halve(max(made.micro_batches(0), key=lambda b: b.num_computed))
    assert made.limits == Limits(2, 12, 12)
    assert sorted(b.num_computed for b in made.micro_batches(0)) == [14, 21, 21, 21, 21]


def test_a_tree_that_saves_little_keeps_the_usual_limit() -> None:
    """Five rows of 21 input tokens, each joined to a system prompt of 9 or of 8 tokens."""

    def sizes(prompt: int) -> list[int]:
        own = [range(100 * n, 100 * n + 30 - prompt) for n in range(1, 6)]
        rows = [row(*range(prompt), *each) for each in own]
        made = batcher(rows, batch_size=5, limits=Limits(5, 72, 500))
        return sorted(b.num_computed for b in made.micro_batches(0))

    assert sizes(9) == [9 + 5 * 20]
    assert sizes(8) == [8 + 2 * 21, 8 + 3 * 21]


def test_the_same_step_is_the_same_batch_at_each_call() -> None:
    rows = [row(*range(n, 2 * n + 3)) for n in range(9)]
    made, other = batcher(rows), batcher(rows)
    other.micro_batches(5)
    for first, second in zip(made.micro_batches(2), other.micro_batches(2), strict=True):
        assert first.rows == second.rows
        assert first.ids_T.equal(second.ids_T)
        assert first.positions_N.equal(second.positions_N)


def test_batches_for_evaluation_are_in_order() -> None:
    rows = [row(*range(100 * n, 100 * n + length)) for n, length in enumerate((5, 9, 2, 4, 3))]
    made = batcher([row(1, 2)], limits=Limits(2))
    assert [sorted(b.rows) for b in made.batches(rows)] == [[0, 1], [2, 3], [4]]
    made = batcher([row(1, 2)], limits=Limits(9, 12))
    assert [sorted(b.rows) for b in made.batches(rows)] == [[0, 1], [2, 3, 4]]


def test_a_row_of_one_token_is_a_row_without_targets() -> None:
    (batch,) = batcher([row(5, first=0)], batch_size=1).micro_batches(0)
    assert (batch.ids_T.tolist(), batch.num_tokens, batch.num_supervised) == ([5], 1, 0)
    assert batch.targets_N.shape == (0,)


def test_overlong_rows_are_cut_with_a_warning_that_counts_them() -> None:
    rows = [row(*range(9)), row(1, 2, 3), row(*range(50, 60))]
    with pytest.warns(UserWarning, match=r"2 of 3 rows .* max_seq_len=4"):
        made = batcher(rows, batch_size=3, max_seq_len=4)
    (batch,) = made.micro_batches(0)
    assert (batch.num_tokens, batch.num_supervised) == (4 + 3 + 4, 3 + 2 + 3)


def test_a_batch_moves_whole() -> None:
    (batch,) = batcher([row(1, 2, 3), row(4, 5)]).micro_batches(0)
    moved = batch.to("meta")
    tensors = (moved.ids_T, moved.positions_N, moved.targets_N, moved.weights_N)
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.layout, moved.rows) == (batch.layout, batch.rows)


def test_halving_goes_down_to_a_row() -> None:
    rows = [row(*range(100 * n, 100 * n + 9)) for n in range(5)]
    made = batcher(rows, batch_size=5, limits=Limits(5, 100))
    seen = []
    while True:
        batch = max(made.micro_batches(0), key=lambda b: b.num_computed)
        seen.append((len(batch.rows), made.limits.rows, made.limits.tokens))
        if not made.limits.halve(batch):
            break
    assert seen == [(5, 5, 100), (2, 3, 20), (1, 1, 8)]


@given(
    st.lists(st.integers(2, 21), min_size=1, max_size=24), st.integers(20, 60), st.integers(0, 9)
)
def test_first_fit_decreasing_is_the_same_for_whoever_asks(
    lengths: list[int], tokens: int, step: int
) -> None:
    """A step's passes depend on the rows and the step's number alone, and no pass has room for the
    longest row of a later one."""
    rows = [row(*[100 * r + t for t in range(n)]) for r, n in enumerate(lengths)]

    def made() -> PackedBatcher:
        order = TokenOrder(lengths, 4 * tokens, 3)
        limits = Limits(10**6, tokens)
        return PackedBatcher(rows, max_seq_len=50, order=order, limits=limits, min_shared=None)

    first, again = made(), made()
    for earlier in range(step):
        first.micro_batches(earlier)
    cut = [batch.rows for batch in first.micro_batches(step)]
    assert cut == [batch.rows for batch in again.micro_batches(step)]
    assert sorted(r for rows in cut for r in rows) == sorted(again.order.rows(step))
    filled = [sum(lengths[r] - 1 for r in rows) for rows in cut]
    assert max(filled) <= tokens
    longest = [max(lengths[r] - 1 for r in rows) for rows in cut]
    for i, there in enumerate(filled):
        assert all(there + row > tokens for row in longest[i + 1 :])


@given(rows_of_few_ids, st.integers(1, 3), st.sampled_from([1, 7, 100]))
def test_processes_share_a_step_whatever_their_limits_are(
    ids: list[list[int]], size: int, tokens: int
) -> None:
    rows = [row(*line) for line in ids]
    taken = []
    for rank in range(size):
        order = RowOrder(len(rows), len(rows), 0)
        # The last process has run out of memory before.
        limits = Limits(1, 1) if rank == size - 1 else Limits(len(rows), tokens)
        made = PackedBatcher(rows, max_seq_len=50, order=order, limits=limits, share=(rank, size))
        taken.append([r for batch in made.micro_batches(0) for r in batch.rows])
    assert sorted(r for own in taken for r in own) == list(range(len(rows)))
    assert max(map(len, taken)) <= -(-len(rows) // size) + size or size == 1
