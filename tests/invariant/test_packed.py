"""Packed rows, trees and chunked losses are the padded reference path, family by family.

Tolerances, float32 on CPU: losses to 2e-6 of the loss, gradients to 4e-6 of the largest of the
model (sums in another order, over up to 120 tokens; no other cause is admitted).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_families import FAMILIES, MORE, SIX, family
from truetune import SFTExample
from truetune.compute import gathered, head
from truetune.compute.batch import Limits, PaddedBatcher, RowOrder
from truetune.compute.loss import loss_sum
from truetune.compute.packing import PackedBatcher
from truetune.compute.route import Route, find_route

LOSS, GRADIENT = 2e-6, 4e-6


def ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 250, (length,), generator=generator).tolist()


def rows() -> list[SFTExample]:
    """Eight rows of 2 to 30 tokens, longer than the windows; two have one length."""
    made = []
    for seed, length in enumerate((5, 30, 2, 17, 9, 23, 17, 12)):
        made.append(SFTExample(ids(length, seed), [int(t > length // 3) for t in range(length)]))
    return made


def branches() -> list[SFTExample]:
    """Rows that begin alike, two levels deep; the shared part is supervised in some of them; one
    row is a beginning of others; one is there twice; one shares nothing."""
    system, question = ids(20, 50), ids(18, 51)
    rows = [
        system + ids(9, 1),
        system + ids(4, 2),
        system + question + ids(7, 3),
        system + question + ids(3, 4),
        system + question + ids(3, 4),
        system + question,
        ids(11, 5),
        [*system[:17], *ids(5, 6)],
    ]
    masks = [[int(t > 6 + 5 * (r % 3)) for t in range(len(row))] for r, row in enumerate(rows)]
    return [SFTExample(row, mask) for row, mask in zip(rows, masks, strict=True)]


def padded(model: Any, examples: list[SFTExample]) -> tuple[float, dict[str, torch.Tensor]]:
    """The oracle: all logits of a padded batch."""
    order, limits = RowOrder(len(examples), len(examples), 0), Limits(len(examples))
    made = PaddedBatcher(examples, max_seq_len=64, pad_id=0, order=order, limits=limits)
    (batch,) = made.micro_batches(0)
    loss = loss_sum(model, batch)
    loss.backward()
    return loss.item(), take_gradients(model)


def packed(
    model: Any,
    route: Route,
    examples: list[SFTExample],
    limits: Limits | None = None,
    min_shared: int | None = 16,
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and tokens that went through the model."""
    order = RowOrder(len(examples), len(examples), 0)
    limits = limits or Limits(len(examples))
    made = PackedBatcher(
        examples, max_seq_len=64, order=order, limits=limits, min_shared=min_shared
    )
    total, tokens = 0.0, 0
    for batch in made.micro_batches(0):
        with route.scope(batch):
            loss = route.loss_sum(batch)
            loss.backward()
        total += loss.item()
        tokens += batch.num_computed
    return total, take_gradients(model), tokens


def take_gradients(model: Any) -> dict[str, torch.Tensor]:
    taken = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def require_equal(a: Any, b: Any) -> None:
    assert a[0] == pytest.approx(b[0], rel=LOSS)
    largest = max(float(g.abs().max()) for g in b[1].values())
    assert a[1].keys() == b[1].keys()
    assert largest > 0
    for name, gradient in b[1].items():
        assert float((a[1][name] - gradient).abs().max()) <= GRADIENT * largest, name


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", [*FAMILIES, *MORE])
def test_packed_rows_and_trees_are_padded_rows(
    kind: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over short nodes in one product, and by meetings as over long ones."""
    if not together:
        monkeypatch.setattr(gathered, "MOST_KEYS", 0)
    model = family(kind).eval()
    before = model.config._attn_implementation
    route = find_route(model, longest=64)
    assert (route.kind, route.reason) == ("packed", "")
    for examples, shared in ((rows(), None), (rows(), 16), (branches(), 16)):
        expected = padded(model, examples)
        got = packed(model, route, examples, min_shared=shared)
        require_equal(got, expected)
        whole = sum(len(example.ids) - 1 for example in examples)
        assert got[2] == whole if examples == rows() else got[2] < 0.6 * whole
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("limits", [Limits(1), Limits(3), Limits(8, 40), Limits(8, 1)])
def test_trees_cut_into_micro_batches_are_the_same(limits: Limits) -> None:
    model = family("llama")
    route = find_route(model, longest=64)
    require_equal(packed(model, route, branches(), limits), padded(model, branches()))


@pytest.mark.parametrize("kind", [*SIX, "gemma2", "granite"])
def test_chunked_losses_are_whole_losses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(kind)
    route = find_route(model, longest=64)
    assert route.head is not None
    assert route.head.tail is not None
    expected = padded(model, rows())
    for positions, block in ((1, 1), (7, 2), (1000, 3), (1000, 1000)):
        monkeypatch.setattr(head, "CHUNK_BYTES", 4 * model.config.vocab_size * positions)
        monkeypatch.setattr(head, "BLOCK_BYTES", 4 * model.config.vocab_size * block)
        require_equal(packed(model, route, rows()), expected)


def test_the_models_own_head_on_supervised_positions_is_the_same() -> None:
    """The way of models whose head or tail does not fit the fused one."""
    model = family("gemma2")
    route = find_route(model, longest=64)
    assert route.head is not None
    route.head.tail = None
    require_equal(packed(model, route, rows()), padded(model, rows()))


def test_packing_is_sharp() -> None:
    """Rows that see each other are a thousand tolerances away."""
    model = family("llama")
    route = find_route(model, longest=64)
    order, limits = RowOrder(8, 8, 0), Limits(8)
    (batch,) = PackedBatcher(rows(), max_seq_len=64, order=order, limits=limits).micro_batches(0)
    with torch.no_grad(), route.scope(batch):
        right = route.loss_sum(batch).item()
    with torch.no_grad():
        wrong = Route(model, "apart", head=route.head).loss_sum(batch).item()
    assert abs(wrong - right) > 1000 * LOSS * right
