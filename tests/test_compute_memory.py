"""What a micro-batch keeps in memory, measured on two small ones and scaled up."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tiny_families import family
from truetune import SFTExample, SFTTrainer
from truetune.compute import Footprint, Limits, available_bytes, find_route, footprint
from truetune.compute.memory import _kept
from truetune.compute.packing import pack
from truetune.engine import trainer as loop

pytestmark = pytest.mark.filterwarnings("error")


def rows(count: int, length: int) -> list[SFTExample]:
    half = length // 2
    return [SFTExample([r + 1] * length, [0] * half + [1] * half) for r in range(count)]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_activations_grow_with_the_tokens(kind: str) -> None:
    """A larger batch keeps what the two small ones said, to 3 %; the windowed and soft-capped
    layers of Gemma 2 also keep scores, which grow with the length of the rows: to 30 %."""
    model = family(kind)
    route = find_route(model, longest=64)
    made = footprint(route, contextlib.nullcontext)
    examples = rows(20, 16)
    batch = pack(examples, range(20), min_shared=None)
    model.train()
    pieces = _kept(route, batch, contextlib.nullcontext)
    small = pack(examples[:4], range(4), min_shared=None)
    grown = sum(pieces) - sum(_kept(route, small, contextlib.nullcontext))
    per_token = grown / (batch.num_computed - small.num_computed)
    transient = made.per_token - per_token
    assert 0 < transient < 0.6 * made.per_token
    # Short rows keep the weights of their attention: heads times the 15 tokens that go in.
    weights = 15 * model.config.num_attention_heads
    widest = 10 * 4 * max(model.config.intermediate_size, model.config.hidden_size, weights)
    assert transient == pytest.approx(widest, rel=0.03 if kind != "gemma2" else 0.3, abs=30)


def test_measuring_leaves_no_trace() -> None:
    model = family("llama").eval()
    route = find_route(model, longest=64)
    state = torch.get_rng_state()
    footprint(route, contextlib.nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_tokens_that_fit() -> None:
    made = Footprint(fixed=1000, per_token=10, gradients=500)
    assert [made.of(tokens) for tokens in (1, 50, 100)] == [1500, 1500, 2000]
    assert [made.fitting(room) for room in (2000, 1999, 0)] == [100, 99, 1]


def trainer(**changes: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "examples": rows(6, 20), "max_seq_len": 20, "pad_id": 0, "batch_size": 6, "max_steps": 1,
        "max_lr": 1e-3,
    }  # fmt: skip
    return SFTTrainer(family("llama"), **(settings | changes))


def test_the_micro_batch_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer().limits == Limits(6, 1024, 8192)
    usual = trainer().train_step()["loss"]
    made = trainer()
    moments = 2 * sum(4 * p.numel() for p in made.model.parameters())
    room = int((made.footprint.of(50) + moments) / loop._ROOM) + 1
    monkeypatch.setattr(loop, "available_bytes", lambda device: room)
    small = trainer()
    assert small.limits == Limits(6, 50, 50)
    assert [b.num_computed for b in small.batcher.micro_batches(0)] == [38, 38, 38]
    assert small.train_step()["loss"] == pytest.approx(usual, rel=2e-6)
    assert trainer(micro_batch_tokens=77).limits == Limits(6, 77)


def test_activations_are_computed_twice_where_the_longest_row_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step is the same; where the row fits, nothing is switched."""
    long: dict[str, Any] = {"examples": rows(3, 250), "max_seq_len": 250, "batch_size": 3}
    made = trainer(**long)
    usual, moments = made.train_step(), 2 * sum(4 * p.numel() for p in made.model.parameters())
    codes = {}
    for factor in (0.99, 1.01):
        needed = factor * (made.footprint.of(250) + moments) / loop._ROOM
        monkeypatch.setattr(loop, "available_bytes", lambda device, needed=needed: int(needed))
        found: list[Any] = []
        again = trainer(**long, on_finding=found.append)
        codes[factor] = [finding.code for finding in found]
        assert again.model.is_activation_checkpointing == bool(found)
        assert again.train_step()["loss"] == pytest.approx(usual["loss"], rel=2e-6)
        assert not found or again.footprint.per_token < made.footprint.per_token
    assert codes == {0.99: ["activations-recomputed"], 1.01: []}


@pytest.mark.parametrize("known", [0, 10**12])
def test_memory_that_is_unknown_or_plenty(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "available_bytes", lambda device: known)
    assert trainer().limits.tokens == 1024
    assert trainer(packing=False).limits.tokens is None


def test_what_is_free_here() -> None:
    free = available_bytes(torch.device("cpu"))
    assert free == 0 or 2**20 < free < 2**50
