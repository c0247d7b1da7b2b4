"""The length policy: what fits, what is dropped or cut, and what that costs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune import Encoded, SFTExample
from truetune.compute.length import fit_length, is_text, length_table, longest

pytestmark = pytest.mark.filterwarnings("error")


def chat(prompt: int, answer: int, row: str = "") -> Encoded:
    ids = list(range(prompt + answer))
    example = SFTExample(ids, [0] * prompt + [1] * answer)
    return Encoded((example,), (None,), (0,), ((1,),), row)


def text(length: int, row: str = "t") -> Encoded:
    example = SFTExample(list(range(length)), [1] * length)
    return Encoded((example,), (None,), (0,), ((),), row)


def tree(row: str) -> Encoded:
    """Two branches of 6 and 12 tokens."""
    examples = (*chat(4, 2), *chat(8, 4))
    return Encoded(examples, (None, 0), (0, 3), ((1,), (3,)), row)


def test_drop_counts_rows_lengths_and_supervised_tokens() -> None:
    encoded = [chat(5, 3, "a:1"), chat(6, 5, "a:2"), tree("a:3"), chat(4, 6, "a:4")]
    fitted = fit_length(encoded, max_length=10, overlong="drop")
    assert [len(e.ids) for e in fitted.examples] == [8, 6, 10]
    assert fitted.rows == ["a:1", "a:3", "a:4"]
    assert fitted.dropped == [("a:2", 11), ("a:3", 12)]
    assert fitted.num_supervised == 3 + 5 + 2 + 4 + 6
    assert fitted.num_dropped_supervised == 5 + 4
    assert fitted.dropped_share == pytest.approx(9 / 20)
    assert (fitted.num_truncated, fitted.num_split) == (0, 0)
    # An exact fit stays.
    assert fit_length(encoded, max_length=12, overlong="drop").dropped == []


@pytest.mark.parametrize("policy", ["error", "split-text"])
def test_other_policies_drop_overlong_chats_as_well(policy: str) -> None:
    fitted = fit_length([chat(5, 3)], max_length=7, overlong=policy)  # type: ignore[arg-type]
    assert (fitted.examples, len(fitted.dropped)) == ([], 1)


def test_truncate_prompt_keeps_the_end_and_every_supervised_token() -> None:
    fitted = fit_length([chat(8, 4, "r")], max_length=6, overlong="truncate-prompt")
    assert fitted.examples == [SFTExample([6, 7, 8, 9, 10, 11], [0, 0, 1, 1, 1, 1])]
    assert (fitted.num_truncated, fitted.dropped, fitted.rows) == (1, [], ["r"])


def test_truncate_prompt_leaves_one_token_before_the_first_target() -> None:
    just = fit_length([chat(8, 4)], max_length=5, overlong="truncate-prompt")
    assert just.examples == [SFTExample([7, 8, 9, 10, 11], [0, 1, 1, 1, 1])]
    beyond = fit_length([chat(8, 4, "r")], max_length=4, overlong="truncate-prompt")
    assert (beyond.examples, beyond.dropped) == ([], [("r", 12)])
    assert (beyond.num_truncated, beyond.num_dropped_supervised) == (0, 4)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(2, 30))
def test_truncate_prompt_keeps_all_targets_or_drops_the_row(mask: list[int], size: int) -> None:
    example = SFTExample(list(range(len(mask))), [0, *mask[1:]])
    encoded = Encoded((example,), (None,), (0,), ((1,),))
    fitted = fit_length([encoded], max_length=size, overlong="truncate-prompt")
    if not fitted.examples:
        assert len(mask) > size
        assert fitted.num_dropped_supervised == example.num_supervised
        return
    (kept,) = fitted.examples
    assert len(kept.ids) == len(kept.mask) == min(len(mask), size)
    assert kept.num_supervised == example.num_supervised
    assert kept == SFTExample(example.ids[-len(kept.ids) :], example.mask[-len(kept.ids) :])


@given(st.integers(0, 60), st.integers(2, 70))
def test_blocks_of_a_text_have_every_token_as_target_once(length: int, size: int) -> None:
    fitted = fit_length([text(length)], max_length=size, overlong="drop")
    assert fitted.dropped == []
    assert all(len(block.ids) <= size for block in fitted.examples)
    targets = [
        block.ids[t] for block in fitted.examples for t in range(1, len(block.ids)) if block.mask[t]
    ]
    assert Counter(targets) == Counter(range(1, length))
    assert sum(b.num_supervised for b in fitted.examples) == fitted.num_supervised
    assert fitted.num_split == int(length > size)
    assert set(fitted.rows) <= {"t"}
    assert len(fitted.rows) == len(fitted.examples)


@pytest.mark.parametrize("policy", ["drop", "error", "truncate-prompt", "split-text"])
def test_text_is_split_under_every_policy(policy: str) -> None:
    fitted = fit_length([text(7)], max_length=4, overlong=policy)  # type: ignore[arg-type]
    assert [block.ids for block in fitted.examples] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert [block.mask for block in fitted.examples] == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_longest_is_of_chats() -> None:
    assert longest([text(99), chat(3, 2), tree("")]) == 12
    assert longest([text(99)]) == longest([]) == 0
    assert (is_text(text(1)), is_text(chat(1, 1)), is_text(tree(""))) == (True, False, False)


def test_length_table() -> None:
    encoded = [chat(200, 56), chat(200, 57), chat(900, 124), text(5000), chat(1000, 25)]
    supervised = 56 + 57 + 124 + 25
    assert length_table(encoded) == [
        (256, 1, 56 / supervised),
        (512, 2, (56 + 57) / supervised),
        (1024, 3, (56 + 57 + 124) / supervised),
        (2048, 4, 1.0),
    ]
    assert length_table([chat(3, 2)]) == [(256, 1, 1.0)]
    assert length_table([chat(200_000, 5)])[-1] == (131072, 0, 0.0)
