"""Which rows a step trains, and how they are cut and padded."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune import SFTExample
from truetune.compute.batch import Limits, PaddedBatcher, RowOrder, TokenOrder

pytestmark = pytest.mark.filterwarnings("error")


def examples(*lengths: int) -> list[SFTExample]:
    """Row r holds the ids 100 r, 100 r + 1, ...; all but the first two are supervised."""
    return [
        SFTExample([100 * r + t for t in range(n)], [int(t > 1) for t in range(n)])
        for r, n in enumerate(lengths)
    ]


# ---------------------------------------------------------------- RowOrder


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5), st.integers(1, 4))
def test_every_row_is_seen_equally_often(
    num_rows: int, batch_size: int, seed: int, epochs: int
) -> None:
    order = RowOrder(num_rows, batch_size, seed, epochs)
    assert order.num_steps == math.ceil(num_rows * epochs / batch_size)
    steps = [order.rows(step) for step in range(order.num_steps)]
    assert {len(rows) for rows in steps[:-1]} <= {batch_size}
    assert 0 < len(steps[-1]) <= batch_size
    stream = [row for rows in steps for row in rows]
    assert Counter(stream) == dict.fromkeys(range(num_rows), epochs)
    # Each epoch on its own is a permutation, also where a step spans two of them.
    for start in range(0, len(stream), num_rows):
        assert sorted(stream[start : start + num_rows]) == list(range(num_rows))
    assert order.rows(order.num_steps) == []


@pytest.mark.parametrize(
    ("num_rows", "epochs", "seen"), [(10, 0.5, 5), (10, 1.25, 13), (3, 0.01, 1), (7, 2.5, 18)]
)
def test_a_fraction_of_an_epoch_ends_where_it_says(num_rows: int, epochs: float, seen: int) -> None:
    order = RowOrder(num_rows, 4, 0, epochs)
    assert order.num_steps is not None
    stream = [row for step in range(order.num_steps) for row in order.rows(step)]
    assert len(stream) == seen
    counts = Counter(dict.fromkeys(range(num_rows), 0))
    counts.update(stream)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_without_epochs_the_stream_repeats_for_ever() -> None:
    order = RowOrder(5, 2, 0)
    assert order.num_steps is None
    assert all(len(order.rows(step)) == 2 for step in (0, 7, 10_000))


def test_a_batch_larger_than_the_rows_takes_several_epochs_at_once() -> None:
    assert sorted(Counter(RowOrder(3, 7, 0).rows(0)).values()) == [2, 2, 3]
    assert sorted(RowOrder(3, 100, 0, 1).rows(0)) == [0, 1, 2]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20))
def test_the_rows_of_a_step_depend_on_its_number_alone(asked: list[int]) -> None:
    order = RowOrder(7, 3, seed=4)
    for step in asked:
        assert order.rows(step) == RowOrder(7, 3, seed=4).rows(step)


def test_epochs_and_seeds_are_shuffled_apart() -> None:
    first, second = RowOrder(50, 50, 0).rows(0), RowOrder(50, 50, 0).rows(1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first not in (list(range(50)), RowOrder(50, 50, 1).rows(0))


# ---------------------------------------------------------------- TokenOrder


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(1, 60),
    st.sampled_from([0.4, 1, 2.5]),
    st.randoms(use_true_random=False),
)
def test_steps_of_tokens_are_the_stream_cut_where_the_next_row_is_too_much(
    lengths: list[int], tokens: int, epochs: float, chosen: random.Random
) -> None:
    order = TokenOrder(lengths, tokens, 5, epochs)
    rows = RowOrder(len(lengths), 1, 5, epochs)
    assert rows.num_steps is not None
    assert order.num_steps is not None
    stream = [row for step in range(rows.num_steps) for row in rows.rows(step)]
    steps = [order.rows(step) for step in range(order.num_steps)]
    assert [row for taken in steps for row in taken] == stream
    for taken, after in zip(steps, [*steps[1:], []], strict=True):
        filled = sum(lengths[row] for row in taken)
        assert len(taken) == 1 or 0 < filled <= tokens
        assert not after or filled + lengths[after[0]] > tokens
    assert order.rows(order.num_steps) == []
    # A resumed run asks anew, from any step on.
    first = chosen.randrange(order.num_steps)
    again = TokenOrder(lengths, tokens, 5, epochs)
    assert [again.rows(step) for step in range(first, order.num_steps)] == steps[first:]
    assert again.rows(0) == steps[0]


def test_steps_of_tokens_without_epochs_go_on_for_ever() -> None:
    order = TokenOrder([3, 4, 5], 7, 0)
    assert order.num_steps is None
    seen = Counter(row for step in range(300) for row in order.rows(step))
    assert max(seen.values()) - min(seen.values()) <= 1


# ---------------------------------------------------------------- PaddedBatcher


def batcher(
    rows: list[SFTExample], *, max_seq_len: int = 20, batch_size: int = 4, micro: int | None = None
) -> PaddedBatcher:
    order = RowOrder(len(rows), batch_size, 0)
    limits = Limits(micro or batch_size)
    return PaddedBatcher(rows, max_seq_len=max_seq_len, pad_id=7, order=order, limits=limits)


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 9])
def test_a_step_is_cut_into_micro_batches_of_its_rows(micro: int) -> None:
    made = batcher(examples(3, 9, 5, 4, 8), micro=micro)
    for step in range(4):
        batches = made.micro_batches(step)
        rows = [row for batch in batches for row in batch.rows]
        assert sorted(rows) == sorted(made.order.rows(step))
        assert all(len(batch.rows) == micro for batch in batches[:-1])
        lengths = [len(made.examples[row].ids) for row in rows]
        assert lengths == sorted(lengths)


def test_rows_are_padded_to_the_longest_of_their_micro_batch() -> None:
    made = batcher(examples(3, 9, 5, 4), micro=2)
    small, large = made.micro_batches(0)
    assert (small.rows, large.rows) == ((0, 3), (2, 1))
    assert small.ids_BT.tolist() == [[0, 1, 2], [300, 301, 302]]
    assert small.targets_BT.tolist() == [[1, 2, 7], [301, 302, 303]]
    assert small.supervised_BT.tolist() == [[0, 1, 0], [0, 1, 1]]
    assert (small.num_tokens, small.num_supervised) == (7, 3)
    assert large.ids_BT.shape == (2, 8)
    assert (large.num_tokens, large.num_supervised) == (14, 10)


def test_the_same_step_is_the_same_batch_at_each_call() -> None:
    made = batcher(examples(3, 9, 5, 4, 6), micro=3)
    made.micro_batches(5)
    for first, second in zip(made.micro_batches(2), made.micro_batches(2), strict=True):
        assert first.rows == second.rows
        assert first.ids_BT.equal(second.ids_BT)


def test_batches_for_evaluation_are_in_order() -> None:
    made = batcher(examples(3, 4), micro=2)
    held_out = examples(5, 9, 2, 4, 3)
    assert [b.rows for b in made.batches(held_out)] == [(0, 1), (2, 3), (4,)]
    assert [b.ids_BT[0, 0].item() for b in made.batches(held_out)] == [0, 200, 400]


def test_a_row_of_one_token_is_a_row_without_targets() -> None:
    (batch,) = batcher([SFTExample([5], [1])], batch_size=1).micro_batches(0)
    assert batch.ids_BT.shape == (1, 1)
    assert (batch.num_tokens, batch.num_supervised) == (1, 0)


def test_overlong_rows_are_cut_with_a_warning_that_counts_them() -> None:
    made = batcher(examples(3, 9, 5, 4), max_seq_len=4)
    with pytest.warns(UserWarning, match=r"2 of 4 rows of a batch .* max_seq_len=4"):
        (batch,) = made.micro_batches(0)
    assert batch.ids_BT.shape == (4, 3)
    assert (batch.num_tokens, batch.num_supervised) == (3 + 4 + 4 + 4, 1 + 2 + 2 + 2)


def test_a_batch_moves_whole() -> None:
    (batch,) = batcher(examples(3, 4)).micro_batches(0)
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.ids_BT, moved.targets_BT, moved.supervised_BT)} == {
        "meta"
    }
    assert (moved.rows, moved.num_tokens, moved.num_supervised) == (
        batch.rows,
        batch.num_tokens,
        batch.num_supervised,
    )
