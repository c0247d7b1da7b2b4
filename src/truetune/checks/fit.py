"""Estimate whether the run fits into memory and how long it takes, with error bars.

input   config and plan; no weights
does    counts what is exact (weights, gradients, optimizer); runs the training loop's measurement
        of a micro-batch on tensors without data; times one layer of the model on the device
output  Fit: bytes by part, seconds, ways to make it smaller, the cheapest first
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from truetune.compute.memory import (
    Footprint,
    available_bytes,
    foreseen_footprint,
    resident_bytes,
)
from truetune.findings import Finding, gib
from truetune.model.architecture import causal_config, linear_layers, meta_model
from truetune.model.lora import enable_gradient_checkpointing
from truetune.model.mode import random_state_kept
from truetune.model.source import locate
from truetune.model.tokenizer import locate_base
from truetune.recipe.plan import Plan
from truetune.recipe.settings import Recipe
from truetune.system.lazy import torch

# Measured peaks against the sum (docs/log.md).
_MEMORY_ERROR = (0.85, 1.25)
# Speed of a whole run against that of one layer, and of one large product (docs/log.md).
_LAYER_SPEED, _PRODUCT_SPEED = 0.84, 0.47
# Tokens that the layer is timed on, and the largest one that is made for it.
_TIMED, _LARGEST_LAYER = 256, 60_000_000
# Most tokens of a forward pass if nobody says, as the loop takes them.
_CPU_TOKENS, _DEVICE_TOKENS = 1024, 16_384


@dataclass(frozen=True)
class RunShape:
    """The parts of a run that determine its memory and time.

    Attributes:
        parameters: of the model; `trainable` of them, or of the adapter, have gradients.
        weight_bytes: a frozen or trained weight takes.
        gradient_bytes: of a trained weight.
        footprint: of a micro-batch, as the loop measures it, gradients included.
        tokens: most tokens of a forward pass.
        optimizer_bytes: a trained weight takes beside its gradient.
    """

    parameters: int
    trainable: int
    weight_bytes: float
    gradient_bytes: int
    footprint: Footprint
    tokens: int
    optimizer_bytes: int
    checkpointing: bool
    lora: bool

    def parts(self) -> dict[str, int]:
        """Bytes by part; while gradients replace activations, only activations in excess of them
        count."""
        adapter = self.trainable * 4 if self.lora else 0
        gradients = self.trainable * self.gradient_bytes
        process = self.footprint.process
        apart = self.footprint.apart
        taken = self.footprint.of(self.tokens) - process - apart
        return {
            "weights": int(self.parameters * self.weight_bytes) + adapter,
            "gradients": gradients,
            "optimizer": self.trainable * self.optimizer_bytes,
            "activations and head": taken if apart else max(taken - gradients, 0),
            "process": process,
        }

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def operations(self, tokens: int) -> float:
        """Floating-point operations of training on a number of tokens: 2 per weight forward, 2 for
        the gradient of inputs, 2 for that of trained weights; a second forward pass if activations
        are recomputed (Kaplan et al. 2020, without attention)."""
        passes = 2 + 2 + (0 if self.lora else 2) + (2 if self.checkpointing else 0)
        return float(passes) * self.parameters * tokens


@dataclass(frozen=True)
class Fit:
    """The estimate.

    Attributes:
        device: where the run would be.
        available: bytes free there for the run; None if unknown.
        parts: bytes by part, the estimate itself; on a CPU all of the process, as the run will show
            it at its end.
        low, high: bytes, with the error bars.
        seconds: estimated time of the steps on an otherwise idle machine; None if it was not
            measured.
        ways: (option, bytes it would leave, what it costs), the cheapest first.
        trainable: weights that have gradients.
    """

    device: str
    available: int | None
    parts: dict[str, int]
    low: int
    high: int
    seconds: float | None
    ways: tuple[tuple[str, int, str], ...]
    trainable: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def timed(self, seconds_per_token: float, tokens: int) -> Fit:
        """The same estimate with the measured time of a real step."""
        return dataclasses.replace(self, seconds=seconds_per_token * tokens)

    def findings(self) -> Iterator[Finding]:
        """An error if the run certainly does not fit; a doubtful case appears only in the summary,
        because free memory varies."""
        if self.available is None or self.low <= self.available:
            return
        enough = next((w for w in self.ways if w[1] * _MEMORY_ERROR[1] <= self.available), None)
        ways = "; ".join(f"{w[0]} ({gib(w[1])}, {w[2]})" for w in self.ways[:4])
        yield Finding(
            "memory-short",
            "warning",
            f"the run needs {gib(self.low)} to {gib(self.high)} of memory, but only "
            f"{gib(self.available)} is free on {self.device}",
            why=", ".join(f"{name} {gib(n)}" for name, n in self.parts.items() if n),
            fix=(f"use {enough[0]}, the cheapest option that suffices; " if enough else "")
            + f"all options, cheapest first: {ways}",
        )


def duration(seconds: float) -> str:
    """Seconds in readable form."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(plan: Plan, *, tokens: int, longest: int, p99: int = 0) -> Fit:
    """Estimate a run.

    Args:
        plan: its recipe is complete.
        tokens: that are trained on, over all epochs.
        longest: tokens of the longest example that is trained on: a limit above it costs nothing.
        p99: the length that keeps 99 % of the rows.
    """
    device = plan.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Libraries and rows, which the run's process holds as this one does: they count with it, and
    # are free again when it begins. Asked before what only an estimate loads.
    held = resident_bytes() if device == "cpu" else 0
    free = available_bytes(torch.device(device))
    shape = run_shape(plan, device, longest)
    speed = layer_speed(plan, device) or product_speed(device)
    parts = shape.parts()
    return Fit(
        device=device,
        available=free + held if free else None,
        parts={**parts, "process": parts["process"] + held},
        low=held + int(shape.total * _MEMORY_ERROR[0]),
        high=held + int(shape.total * _MEMORY_ERROR[1]),
        seconds=shape.operations(tokens) / speed,
        ways=tuple(
            (way, held + left, cost) for way, left, cost in _ways(shape, plan, longest, p99)
        ),
        trainable=shape.trainable,
    )


def run_shape(plan: Plan, device: str, longest: int) -> RunShape:
    """The shape of a planned run, whose longest example has so many tokens."""
    config, adapted = _config(plan)
    lora = plan.lora or adapted
    split = plan.optim == "adamw_bf16"
    halved = split or plan.dtype == "bfloat16" or (plan.dtype == "auto" and device == "cuda")
    model = meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    model.to(torch.bfloat16 if split or (lora and halved) else torch.float32)
    if lora:
        model = _with_lora(model, plan)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if plan.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    made = _footprint(model, config, halved, longest, device)
    # Packed rows fill a pass to its limit; padded ones are as long as the longest.
    usual = _DEVICE_TOKENS if device == "cuda" else _CPU_TOKENS
    packed = max(plan.micro_batch_tokens or usual, longest)
    if plan.batch_size:
        packed = min(packed, plan.batch_size * longest)
    forward = packed if plan.packing else (plan.micro_batch_size or 1) * longest
    return RunShape(
        parameters=parameters,
        trainable=trainable,
        # Trained weights are float32, frozen ones of the type they compute in, or fewer bits.
        weight_bytes=_weight_bytes(plan, split or (lora and halved)),
        gradient_bytes=2 if split else 4,
        footprint=made,
        tokens=forward,
        optimizer_bytes=_OPTIMIZER.get(plan.optim, 2),
        checkpointing=plan.gradient_checkpointing,
        lora=lora,
    )


def _config(plan: Plan) -> tuple[Any, bool]:
    """(config of the base, whether the model that was named is an adapter)."""
    assert plan.model
    files = locate(plan.model, plan.revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    return causal_config(base), files.is_adapter


def _recomputed(made: Footprint, config: Any) -> Footprint:
    """Estimate the memory with recomputed activations: 1.7 times that of one layer (measured on six
    layers of the 0.5B, including the allocator's holes), and the input of each layer."""
    text = config.get_text_config(decoder=True)
    layers, inputs = text.num_hidden_layers, text.num_hidden_layers * text.hidden_size * 4
    moments = ((a, min(each, 1.7 * each / layers + inputs)) for a, each in made.moments)
    return dataclasses.replace(made, moments=tuple(moments))


def _frozen(made: Footprint) -> Footprint:
    """Estimate the memory if no weight of the base is trained."""
    return dataclasses.replace(made, moments=(min(made.moments),))


def _footprint(model: Any, config: Any, halved: bool, longest: int, device: str) -> Footprint:
    """Of the loop, on a model without numbers; a usual count if the model cannot run so."""

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if halved else contextlib.nullcontext()

    try:
        return foreseen_footprint(model, autocast, longest=longest, device=device)
    except Exception:  # code of a model that asks its numbers while it computes
        text = config.get_text_config(decoder=True)
        wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        size = 2 if halved else 4
        kept = text.num_hidden_layers * size * (16 * text.hidden_size + 6 * wide)
        gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        return Footprint(((200 * 2**20, kept), (gradients, 0)))


# Bytes of a trained weight beside its gradient; the 8-bit ones take two.
_OPTIMIZER = {"adamw": 8, "adamw_bf16": 10, "sgd": 0}


def _weight_bytes(recipe: Recipe, halved: bool) -> float:
    """Of the model; 4 bits have their scales beside them (Dettmers et al. 2023)."""
    if recipe.qlora:
        return 0.55
    if recipe.load_in_8bit:
        return 1.05
    return 2 if halved else 4


def _targets(model: Any, names: list[str] | None) -> list[tuple[str, Any]]:
    """The linear layers that an adapter is put on."""
    layers = linear_layers(model)
    return [(p, m) for p, m in layers if names is None or p.rpartition(".")[2] in names]


def _with_lora(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    names = recipe.target_modules
    targets = sorted({path.rpartition(".")[2] for path, _ in _targets(model, names)})
    model.requires_grad_(False)
    if not targets:
        return model  # reported as lora-targets-unmatched
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = LoraConfig(
            r=recipe.lora_r, lora_dropout=recipe.lora_dropout, target_modules=targets
        )
        return get_peft_model(model, settings, low_cpu_mem_usage=True)


def _ways(shape: RunShape, plan: Plan, longest: int, p99: int) -> Iterator[tuple[str, int, str]]:
    """Return ways to reduce the memory, the cheapest first; each is estimated by itself."""
    half = max(shape.tokens // 2, longest)
    if half < shape.tokens:
        option = (
            f"--micro-batch-tokens {half}"
            if plan.packing
            else f"--micro-batch-size {max((plan.micro_batch_size or 1) // 2, 1)}"
        )
        yield (
            option,
            dataclasses.replace(shape, tokens=half).total,
            "the same result with more passes",
        )
    if not shape.checkpointing:
        made = _recomputed(shape.footprint, _config(plan)[0])
        smaller = dataclasses.replace(shape, checkpointing=True, footprint=made)
        yield "--gradient-checkpointing", smaller.total, "the same result, about a third slower"
    if p99 and p99 < longest:
        tokens = max(shape.tokens * p99 // longest, p99)
        smaller = dataclasses.replace(shape, tokens=tokens)
        yield f"--max-length {p99}", smaller.total, "drops the longest 1 % of the examples"
    if not shape.lora:
        trainable = shape.parameters // 100
        made = _frozen(shape.footprint)
        smaller = dataclasses.replace(shape, lora=True, trainable=trainable, footprint=made)
        yield "--lora", smaller.total, "an adapter instead of all weights"
    if not plan.qlora:
        trainable = shape.trainable if shape.lora else shape.parameters // 100
        made = shape.footprint if shape.lora else _frozen(shape.footprint)
        smaller = dataclasses.replace(
            shape, lora=True, trainable=trainable, weight_bytes=0.55, footprint=made
        )
        yield "--qlora", smaller.total, "the base in 4 bits, with rounding errors"


def layer_speed(plan: Plan, device: str) -> float | None:
    """Operations per second of a run, measured on one layer's forward and backward pass; None if
    the layer cannot be built or is too large."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(_config(plan)[0])
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    text.num_hidden_layers, text.vocab_size = 1, 256
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    where = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    try:
        size = sum(p.numel() for p in meta_model(config).parameters())
        if size > _LARGEST_LAYER * (1 if where == "cpu" else 8) or layers < 1:
            return None
        with random_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(where)
            # A GPU is at full speed with as many tokens as a forward pass brings it.
            tokens = _TIMED if where == "cpu" else _DEVICE_TOKENS // 4
            ids = torch.zeros(1, tokens, dtype=torch.long, device=where)
            best = float("inf")
            for _ in range(3):
                began = undisturbed(where)
                model(input_ids=ids, use_cache=False).logits.sum().backward()
                best = min(best, undisturbed(where) - began)
    except Exception:  # a layer that cannot stand alone
        return None
    return _LAYER_SPEED * 6.0 * size * tokens / best


def product_speed(device: str) -> float:
    """Operations per second of a run, measured on a matrix product of a step's size."""
    where = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    rows, width = (8192, 4096) if where == "cuda" else (512, 1024)
    a = torch.zeros(rows, width, dtype=dtype, device=where)
    b = torch.zeros(width, width, dtype=dtype, device=where)
    best = float("inf")
    for _ in range(4):
        began = undisturbed(where)
        a @ b
        best = min(best, undisturbed(where) - began)
    return _PRODUCT_SPEED * 2.0 * rows * width * width / best


def undisturbed(where: str) -> float:
    """Seconds on an otherwise idle machine: processor time if the work runs on the processor, so
    that other processes do not count."""
    if where == "cpu":
        return time.process_time() / torch.get_num_threads()
    if where == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
