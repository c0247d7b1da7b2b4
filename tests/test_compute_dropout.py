"""What an adapter drops: a function of what was read, not of how a step is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from truetune import SFTExample
from truetune.compute.dropout import _by_element, _by_words, dropped, salt, token_keys
from truetune.compute.layout import Layout
from truetune.compute.packing import pack

SYSTEM = list(range(40, 70))
ROWS = [
    SFTExample(ids, [0] + [1] * (len(ids) - 1))
    for ids in (
        [*SYSTEM, 1, 2, 3, 4, 5],
        [*SYSTEM, 1, 7, 8],
        [*SYSTEM, 9, *range(100, 130), 3],
        [*SYSTEM, 9, *range(100, 130), 4, 5, 6],
        [3, 2, 1],
    )
]


def keys_by_row(examples: list[SFTExample], **how: Any) -> dict[tuple[int, ...], int]:
    """What was read -> key of the token that was read last."""
    batch = pack(examples, range(len(examples)), **how)
    layout, ids = batch.layout, batch.ids_T.tolist()
    found: dict[tuple[int, ...], int] = {}
    for node, (start, stop) in enumerate(pairwise(layout.starts)):
        line = [t for a in layout.ancestors(node) for t in ids[slice(*layout.starts[a : a + 2])]]
        for t in range(start, stop):
            read = (*line, *ids[start : t + 1])
            assert batch.keys_T is not None
            assert found.setdefault(read, int(batch.keys_T[t])) == int(batch.keys_T[t])
    return found


def test_a_tokens_key_is_what_was_read() -> None:
    """In a tree, apart, and in any order: the same; other ids or places: another."""
    tree, flat = keys_by_row(ROWS, min_shared=3), keys_by_row(ROWS, min_shared=None)
    assert tree == flat == keys_by_row(ROWS[::-1], min_shared=None)
    assert len(set(tree.values())) == len(tree)
    assert len(pack(ROWS, range(5), min_shared=3).ids_T) < 0.7 * sum(len(r.ids) for r in ROWS)


def test_keys_of_a_long_row_stay_apart() -> None:
    """Also where it repeats one id."""
    layout = Layout((20_000,), (-1,))
    assert len(token_keys([5] * 20_000, layout).unique()) == 20_000


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.001])
def test_each_element_is_dropped_with_its_probability(p: float) -> None:
    """Of 400,000, of neighbours in a token and across tokens: within five standard deviations."""
    keys = token_keys([7] * 2000, Layout((2000,), (-1,))) + salt(1, 2, 3)
    mask = dropped(keys, 200, p)
    count = mask.numel()
    limit = 5 * (count * p * (1 - p)) ** 0.5
    assert abs(int(mask.sum()) - count * p) < limit
    for one, other in (
        (mask[:, 1:], mask[:, :-1]), (mask[:, 8:], mask[:, :-8]), (mask[1:], mask[:-1]),
    ):  # fmt: skip
        # A token's chance is one of two 256ths: two of its elements share that.
        share = p * p + 1 / 256**2
        pairs = one.numel()
        assert abs(int((one & other).sum()) - pairs * p * p) < 5 * (pairs * share) ** 0.5 + 5
    for place in range(9):
        hits = int(mask[:, place].sum())
        assert abs(hits - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5 + 1


def test_layers_steps_and_seeds_drop_otherwise() -> None:
    keys = token_keys(list(range(200)), Layout((200,), (-1,)))
    masks = [
        dropped(keys + salt(*numbers), 64, 0.5)
        for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0))
    ]
    assert torch.equal(masks[0], dropped(keys + salt(0, 0, 0), 64, 0.5))
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert 0.45 < float((one == other).float().mean()) < 0.55


@pytest.mark.parametrize("width", [1, 8, 13, 64])
def test_by_element_is_by_words(width: int) -> None:
    """The form that is compiled for a GPU."""
    states = token_keys(list(range(50)), Layout((50,), (-1,)))
    limits = torch.arange(50, dtype=torch.int32) * 5
    assert torch.equal(_by_element(states, limits, width), _by_words(states, limits, width))
