"""What a micro-batch keeps in memory, measured on two small ones and scaled up."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from tiny_families import FAMILIES, MORE, family
from tiny_models import tiny_model
from truetune import SFTExample, SFTTrainer
from truetune.compute import memory, repeated
from truetune.compute.alive import alive_bytes
from truetune.compute.batch import Limits
from truetune.compute.memory import (
    Footprint,
    available_bytes,
    footprint,
    foreseen_footprint,
    recomputes,
)
from truetune.compute.packing import pack
from truetune.compute.route import find_route
from truetune.engine import trainer as loop
from truetune.model.architecture import meta_model
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


def deep(kind: str, layers: int, lora: bool, recomputed: bool) -> Any:
    settings = {k: v for k, v in {**FAMILIES, **MORE}[kind].items() if k != "n_layer"}
    count = {"num_hidden_layers": layers}
    halves = {"max_window_layers": layers // 2} if kind == "qwen2" else {}
    model = tiny_model(kind, **(settings | count | halves))
    if lora:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear")
            model = get_peft_model(model, made)
    if recomputed:
        enable_gradient_checkpointing(model)
    return model


def in_bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# Of eight layers: the first, the last, and the second of each kind, or the only one.
KEPT = {"qwen2": (0, 1, 4, 5, 7), "gemma3_text": (0, 1, 5, 7)}
# One kind of layer, windows in half of the layers or in a pattern, tied tables.
REPEATED = [
    ("llama", False, False, in_bfloat16, 40),
    ("gemma", True, True, contextlib.nullcontext, 120),
    ("gemma3_text", False, False, contextlib.nullcontext, 120),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("llama", False, False, contextlib.nullcontext, 120),
            ("llama", True, True, in_bfloat16, 120),
            ("gemma", False, True, contextlib.nullcontext, 40),
            ("gemma3_text", True, True, contextlib.nullcontext, 40),
            ("qwen2", True, False, in_bfloat16, 40),
            ("qwen2", False, True, in_bfloat16, 120),
            ("gpt2", False, False, contextlib.nullcontext, 120),
        )
    ),
]


@pytest.mark.parametrize(("kind", "lora", "recomputed", "autocast", "length"), REPEATED)
def test_a_few_layers_stand_for_all(
    kind: str, lora: bool, recomputed: bool, autocast: Any, length: int
) -> None:
    """What they come to is what all layers take, and the model has all of them afterwards."""
    model = deep(kind, 8, lora, recomputed)
    route = find_route(model, longest=length)
    cut = repeated.find_cut(model)
    assert cut is not None
    assert cut.kept == KEPT.get(kind, (0, 1, 7))
    with memory.without_numbers(model, "cpu"):
        whole = memory.measured_footprint(route, autocast, longest=length)
    layers = [id(module) for module in model.modules()]
    made = memory.footprint_without_numbers(route, autocast, longest=length)
    assert [id(module) for module in model.modules()] == layers
    assert made.apart == whole.apart
    for tokens in (10, 100, 1000, 8000):
        parts = made.of(tokens) - made.process, whole.of(tokens) - whole.process
        assert parts[0] == pytest.approx(parts[1], rel=1e-3)


def test_frozen_layers_below_adapters_are_a_kind_of_their_own() -> None:
    """No gradient comes to them, while frozen layers above an adapter pass one on."""
    model = deep("llama", 9, False, False)
    settings = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, settings)
    route = find_route(model, longest=120)
    with memory.without_numbers(model, "cpu"):
        whole = memory.measured_footprint(route, contextlib.nullcontext, longest=120)
    cut = repeated.find_cut(model)
    assert cut is not None
    assert cut.kept == (0, 1, 4, 5, 6, 8)
    made = memory.footprint_without_numbers(route, contextlib.nullcontext, longest=120)
    assert made.of(1000) == pytest.approx(whole.of(1000), rel=1e-3)


def test_layers_that_share_weights_are_all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("llama", 6, False, False)
    assert repeated.find_cut(model) is not None
    model.model.layers[4].mlp = model.model.layers[2].mlp
    assert repeated.find_cut(model) is None
    assert repeated.find_cut(family("llama")) is None


def test_where_the_cut_fails_all_layers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("llama", 6, False, False)
    route = find_route(model, longest=40)
    usual = memory.footprint_without_numbers(route, contextlib.nullcontext, longest=40)

    def fails(*_: object, **__: object) -> None:
        raise ValueError("layers were not called one after the other")

    monkeypatch.setattr(memory, "composed", fails)
    again = memory.footprint_without_numbers(route, contextlib.nullcontext, longest=40)
    assert again.of(1000) == usual.of(1000)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_a_few_of_24_layers_stand_for_all(lora: bool, recomputed: bool) -> None:
    """The shape of a 0.5B model, without its numbers."""
    model = meta_model(
        AutoConfig.for_model(
            "qwen2",
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    if lora:
        model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear")
            model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    if recomputed:
        enable_gradient_checkpointing(model)
    found = []
    for cut in (repeated.find_cut, lambda _: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "find_cut", cut)
            began = time.process_time()
            made = foreseen_footprint(model, in_bfloat16, longest=512)
            found.append((made, time.process_time() - began))
    (made, short), (whole, long) = found
    assert short < long / 3
    for tokens in (64, 1024, 8192):
        assert made.of(tokens) == pytest.approx(whole.of(tokens), rel=1e-3)


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
        assert recomputes(again.model) == bool(found)
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
