"""What a micro-batch keeps in memory, measured on two small ones and scaled up."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_families import family
from truetune import SFTExample, SFTTrainer
from truetune.compute import memory
from truetune.compute.alive import alive_bytes
from truetune.compute.batch import Limits
from truetune.compute.memory import Footprint, available_bytes, footprint
from truetune.compute.packing import pack
from truetune.compute.route import find_route
from truetune.engine import trainer as loop
from truetune.model.lora import enable_gradient_checkpointing

pytestmark = pytest.mark.filterwarnings("error")


def rows(count: int, length: int) -> list[SFTExample]:
    half = length // 2
    return [SFTExample([r + 1] * length, [0] * half + [1] * half) for r in range(count)]


def alive(route: Any, made: Footprint, recomputed: bool = False) -> Footprint:
    """Without what is added for the process and its allocator."""
    held = memory._HEAP_RECOMPUTED if recomputed else memory._HEAP
    return Footprint(tuple((a / held, each / held) for a, each in made.moments), process=0)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("kind", "lora"), [("llama", False), ("llama", True), ("qwen3", False)])
@pytest.mark.parametrize("length", [16, 150])
def test_a_larger_batch_takes_what_two_small_ones_said(
    kind: str, lora: bool, length: int, recomputed: bool
) -> None:
    """No more than 3 % above what is alive at its fullest moment, but for the head's logits, which
    do not grow with it; and no more than 10 % below: rows of one length copy keys side by side."""
    model = family(kind)
    if lora:
        model.model.requires_grad_(False)
    if recomputed:
        enable_gradient_checkpointing(model)
    route = find_route(model, longest=length)
    assert route.head is not None
    made = alive(route, footprint(route, contextlib.nullcontext, longest=length), recomputed)
    buffer = route.head.buffer_bytes(contextlib.nullcontext)
    examples = [SFTExample([r + 1] * length, [0] * (length - 1) + [1]) for r in range(40)]
    batch = pack(examples, range(40), min_shared=None)
    model.train()
    fullest = max(max(part) for part in alive_bytes(route, batch, contextlib.nullcontext))
    tokens = batch.num_computed
    assert fullest > 1.5 * buffer
    assert made.of(tokens) - buffer <= 1.03 * fullest
    assert made.of(tokens) >= 0.9 * fullest


def test_gradients_decide_where_a_batch_is_small() -> None:
    model = family("llama")
    route = find_route(model, longest=64)
    made = alive(route, footprint(route, contextlib.nullcontext, longest=64))
    gradients = sum(4 * p.numel() for p in model.parameters())
    assert (
        gradients < made.of(0) < 1.7 * gradients + route.head.buffer_bytes(contextlib.nullcontext)
    )


def test_gradients_count_once_where_they_stand_apart() -> None:
    """All of them beside every moment; in none of the moments."""
    model = family("llama")
    gradients = sum(4 * p.numel() for p in model.parameters())
    enable_gradient_checkpointing(model)
    route = find_route(model, longest=64)
    made = footprint(route, contextlib.nullcontext, longest=64)
    assert made.apart == gradients
    bare = alive(route, made, recomputed=True)
    assert bare.of(0) < gradients + route.head.buffer_bytes(contextlib.nullcontext)
    assert made.of(10) - dataclasses.replace(made, apart=0).of(10) == gradients


def test_measuring_leaves_no_trace() -> None:
    model = family("llama").eval()
    weight = model.get_output_embeddings().weight
    weight.grad = torch.ones_like(weight)
    before = weight.grad
    route = find_route(model, longest=64)
    state = torch.get_rng_state()
    footprint(route, contextlib.nullcontext, longest=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert weight.grad is before
    assert torch.equal(before, torch.ones_like(weight))
    assert [p for p in model.parameters() if p.grad is not None] == [weight]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("length", [40, 120])
def test_tensors_without_numbers_take_what_others_take(kind: str, lora: bool, length: int) -> None:
    """All of it, dropout included, and the model is as before; and the bound that spares the
    measurement is more, whatever the batch."""
    model = family(kind)
    if lora:
        settings = LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers by a name that is old
            model = get_peft_model(model, settings)
    route = find_route(model, longest=length)
    before = {name: (id(value), value.clone()) for name, value in model.state_dict().items()}
    measured = memory.measured_footprint(route, contextlib.nullcontext, longest=length)
    with memory.without_numbers(model, "cpu"):
        made = memory.measured_footprint(route, contextlib.nullcontext, longest=length)
    for tokens in (10, 100, 1000, 8000):
        # Dropout drops as many as are expected, and others drop about as many.
        assert made.of(tokens) == pytest.approx(measured.of(tokens), rel=4e-3 if lora else 1e-12)
        assert memory.most_bytes(route, tokens, length) > 1.5 * measured.of(tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][1])
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_measured_where_memory_is_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(loop, "footprint", never)
    monkeypatch.setattr(loop, "available_bytes", lambda device: 10**12)
    assert trainer().limits == Limits(6, 1024, 8192)
    monkeypatch.setattr(loop, "available_bytes", lambda device: 10**9)
    with pytest.raises(AssertionError, match="measured"):
        trainer()


def test_tokens_that_fit() -> None:
    made = Footprint(((500, 0), (0, 10)), process=1000)
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
        assert not found or again.footprint.moments[-1][1] < made.footprint.moments[-1][1]
    assert codes == {0.99: ["activations-recomputed"], 1.01: []}


@pytest.mark.parametrize("known", [0, 10**12])
def test_memory_that_is_unknown_or_plenty(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "available_bytes", lambda device: known)
    assert trainer().limits.tokens == 1024
    assert trainer(packing=False).limits.tokens is None


def test_what_is_free_here() -> None:
    free = available_bytes(torch.device("cpu"))
    assert free == 0 or 2**20 < free < 2**50
