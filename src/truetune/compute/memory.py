"""Estimate the memory that a forward and backward pass needs in addition to the weights.

input   a route, and the longest row that will come
does    runs two short batches forward and backward, and records after each operation how many bytes
        of tensors are alive. Each number has a constant part and a part proportional to the number
        of tokens, which the two batches separate. On a CPU, the tensors have shapes and dtypes but
        no values, and a few layers represent all layers of their kind (repeated.py), because
        computing everything would take longer than a first step
output  Footprint: bytes as a function of the number of tokens

Which operation needs the most memory depends on the size of the batch (with a large batch, one that
holds activations; with a small batch, one that holds all gradients), so every operation is kept
that needs the most for some size.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from truetune.compute.layout import MOST_KEYS
from truetune.compute.packing import PackedBatch, pack
from truetune.compute.repeated import Cut, composed, find_cut, shortened
from truetune.contract.example import SFTExample
from truetune.model.mode import mode_kept, random_state_kept
from truetune.system.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from truetune.compute.route import Route

# Tokens of the two batches.
_SMALL, _LARGE = MOST_KEYS + 1, MOST_KEYS + 17

# Code that a process loads and compiles on first use.
_PROCESS = 40 * 2**20
# Bytes that the C library holds for each byte that is alive: it cannot put an aligned block into a
# hole of exactly its size, so blocks that are freed and allocated again leave holes, and more of
# them if activations are recomputed (bench/memory.py and docs/log.md: if every block is mapped
# separately, the factor is 1.0). The factor of CUDA's caching allocator was not measured.
_HEAP, _HEAP_RECOMPUTED, _DEVICE = 1.45, 1.8, 1.1

# How many times all inputs and outputs of a model's weights, in float32, may be alive (tests check
# that every family needs less).
_MOST = 3
# Up to this number of weights, computing two short batches takes less time than creating tensors
# without values.
_SMALL_MODEL = 50_000_000

Moment = tuple[int, float]


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a micro-batch in bytes, gradients of trained weights included.

    Attributes:
        moments: (constant bytes, bytes per token) of each moment that is the peak for some size of
            the batch.
        process: bytes that the process needs in addition to all tensors.
        apart: bytes of gradients that are allocated separately and permanently; part of no moment.
    """

    moments: tuple[Moment, ...]
    process: int = _PROCESS
    apart: int = 0

    def of(self, tokens: int) -> int:
        fullest = max(fixed + each * tokens for fixed, each in self.moments)
        return self.process + self.apart + math.ceil(fullest)

    def fitting(self, room: int) -> int:
        """Return the number of tokens that need no more than `room` bytes; at least one."""
        room -= self.process + self.apart
        most = min((room - fixed) / each for fixed, each in self.moments if each > 0)
        return max(int(most), 1)


def footprint(
    route: Route, autocast: Callable[[], AbstractContextManager[Any]], *, longest: int
) -> Footprint:
    """Measure the model on two short batches; its gradients and the random state are as before.

    Args:
        autocast: the autocast context of the training loop.
        longest: number of tokens of the longest row; short rows use another attention path.
    """
    weights = sum(p.numel() for p in route.model.parameters())
    if next(route.model.parameters()).device.type == "cpu" and weights > _SMALL_MODEL:
        try:
            return footprint_without_numbers(route, autocast, longest=longest)
        except Exception:  # the model's code reads values while it computes
            pass
    return measured_footprint(route, autocast, longest=longest)


def footprint_without_numbers(
    route: Route,
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    longest: int,
    device: str = "cpu",
) -> Footprint:
    """`footprint` on tensors without values, and with few layers if they can represent all."""
    cut = find_cut(route.model)
    if cut is not None:
        apart = _apart(route.model, device)
        try:
            with shortened(route.model, cut) as layers, without_numbers(route.model, device):
                standing = (cut, layers)
                return measured_footprint(
                    route, autocast, longest=longest, apart=apart, standing=standing
                )
        except Exception:  # layers that refer to each other: all of them are measured
            pass
    with without_numbers(route.model, device):
        return measured_footprint(route, autocast, longest=longest)


@contextlib.contextmanager
def without_numbers(model: Any, device: str) -> Iterator[None]:
    """Inside the context, the model's tensors have shapes, dtypes and a device but no values:
    operations need neither arithmetic nor memory. Afterwards, the model is unchanged."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    made: dict[int, Any] = {}  # tied weights stay one

    def bare(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            tensor = torch.empty(value.shape, dtype=value.dtype, device=device)
            is_parameter = isinstance(value, torch.nn.Parameter)
            made[id(value)] = (
                torch.nn.Parameter(tensor, value.requires_grad) if is_parameter else tensor
            )
        found: torch.Tensor = made[id(value)]
        return found

    # torch logs a traceback if a model cannot be computed in this way.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_silent, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module, parameters, buffers in before:
                for store, values in ((module._parameters, parameters), (module._buffers, buffers)):
                    store.update({n: bare(v) for n, v in values.items() if v is not None})
            yield
    finally:
        log.disabled = was_silent
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def measured_footprint(
    route: Route,
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    longest: int,
    apart: int | None = None,
    standing: tuple[Cut, Any] | None = None,
) -> Footprint:
    """`footprint` on the tensors that the model has.

    Args:
        apart: bytes of separately allocated gradients, if layers were removed from the model.
        standing: how the layers were reduced, and the layers that are left.
    """
    model = route.model
    before = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    if apart is None:
        apart = _apart(model, next(model.parameters()).device.type)
    handles = [p.register_post_accumulate_grad_hook(_drop) for p, _ in before] if apart else []
    try:
        with mode_kept(model), random_state_kept():
            model.train()
            curves = []
            measured, batches = _measuring(route, longest, standing, gradients_kept=not apart)
            for batch in batches:
                torch.manual_seed(0)
                model.zero_grad(set_to_none=True)
                curves.append((batch.num_computed, *measured(route, batch, autocast)))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in before:
            parameter.grad = gradient
    buffer = route.head.buffer_bytes(autocast) if route.head else 0
    held = _held(model)
    small, large = curves[-2:]
    moments = _fullest(_moments(small, large, buffer))
    scaled = tuple((int(fixed * held), each * held) for fixed, each in moments)
    return Footprint(scaled, apart=apart)


def recomputes(model: Any) -> bool:
    """Whether activations are recomputed, and gradients therefore allocated separately."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The second is the name in transformers 5.17; later versions warn if it is read.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next((name for name in names if hasattr(type(inner), name)), "")
    return bool(getattr(inner, name, False))


def _apart(model: Any, device: str) -> int:
    """Bytes of gradients that the loop allocates separately and keeps."""
    if device != "cpu" or not recomputes(model):
        return 0
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _held(model: Any) -> float:
    """Bytes that the allocator holds for each that is alive."""
    if next(model.parameters()).device.type != "cpu":
        return _DEVICE
    return _HEAP_RECOMPUTED if recomputes(model) else _HEAP


def _moments(small: Any, large: Any, buffer: int) -> Iterable[Moment]:
    (t0, before0, head0, after0), (t1, before1, head1, after1) = small, large
    for part, (one, other) in enumerate(((before0, before1), (head0, head1), (after0, after1))):
        if len(one) != len(other):
            # Another number of operations (experts that no token chose): the peak for the peak.
            one, other = [max(one)], [max(other)]
        for a, b in zip(one, other, strict=True):
            each = max((b - a) / (t1 - t0), 0)
            yield int(a - each * t0) + (buffer if part == 1 else 0), each


def _fullest(moments: Iterable[Moment]) -> list[Moment]:
    """Those that no other one exceeds in both."""
    found: list[Moment] = []
    for fixed, each in sorted(set(moments), reverse=True):
        if not found or each > found[-1][1]:
            found.append((fixed, each))
    return found


def most_bytes(route: Route, tokens: int, longest: int) -> int:
    """More than a micro-batch of so many tokens takes, by the shapes of the weights alone, so that
    nothing has to be measured where much more is free."""
    from truetune.compute.head import CHUNK_BYTES

    model: Any = route.model
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    vocabulary = len(inner.get_input_embeddings().weight)
    each, widest = 0, 0
    for parameter in model.parameters():
        # A table takes a row; everything else its inputs and outputs; of experts, all of them.
        sizes = [size for size in parameter.shape if size < vocabulary]
        each += sum(sizes[-2:]) * math.prod(sizes[:-2])
        widest = max(widest, *sizes[-2:], 0)
    config = inner.config.get_text_config(decoder=True)
    # Attention that is written out keeps the scores of every layer's heads.
    layers = getattr(config, "num_hidden_layers", None) or 100
    each += layers * longest * (getattr(config, "num_attention_heads", None) or widest)
    fixed = gradients + 3 * CHUNK_BYTES
    return int(_PROCESS + _HEAP_RECOMPUTED * fixed + _MOST * 4 * each * tokens)


def foreseen_footprint(
    model: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    longest: int,
    device: str = "cpu",
) -> Footprint:
    """`footprint` of a model whose weights are not loaded: the loop's own computation on tensors
    that have shapes and dtypes but no values, or, for a small model, on zeros, which is faster.

    Args:
        model: the model on the meta device, with its adapter if it has one; a small model is moved
            to the CPU.
        device: the device whose allocator will hold the tensors. Operations are those of a CPU.
    """
    from truetune.compute.adapter import plain_adapters
    from truetune.compute.head import SupervisedHead, Tail
    from truetune.compute.route import Route

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    small = sum(p.numel() for p in model.parameters()) <= _SMALL_MODEL
    if small:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
    inner.tie_weights()
    head = SupervisedHead(inner.get_output_embeddings(), Tail())
    # Whether rows may be packed depends on values, so it is tested at the start of the run.
    route = Route(model, "packed", head=head, adapters=plain_adapters(model))
    compute = measured_footprint if small else footprint_without_numbers
    made = compute(route, autocast, longest=longest)
    if device == "cpu":
        return made
    share = _DEVICE / (_HEAP_RECOMPUTED if recomputes(model) else _HEAP)
    moments = tuple((int(fixed * share), each * share) for fixed, each in made.moments)
    return replace(made, moments=moments)


def _measuring(
    route: Route, longest: int, standing: tuple[Cut, Any] | None, *, gradients_kept: bool
) -> tuple[Any, list[PackedBatch]]:
    """Return the function that measures the bytes of a pass, and the batches to measure; the last
    two are used."""
    from truetune.compute.alive import alive_bytes, traced

    if standing is not None:
        cut, layers = standing

        def whole(route: Route, batch: PackedBatch, autocast: Any) -> Any:
            trace = traced(route, batch, autocast, layers)
            return composed(trace, cut, gradients_kept=gradients_kept).parts()

        return whole, _batches(route, longest)
    first = next(route.model.parameters())
    # A tensor without values has a device, but takes no memory there.
    if first.device.type != "cuda" or hasattr(first, "fake_mode"):
        return alive_bytes, _batches(route, longest)
    from truetune.compute.cuda import footprint as cuda

    if route.kind == "apart":
        batches = _batches(route, longest)
        return cuda.peak_bytes, [batches[0], *batches]
    return cuda.peak_bytes, cuda.batches(longest)


def _batches(route: Route, longest: int) -> list[PackedBatch]:
    """Two, of which the second is a little larger; one target each, so that the head's logits take
    next to nothing."""

    def row(length: int) -> SFTExample:
        return SFTExample([t % 7 for t in range(length + 1)], [0] * length + [1])

    inputs = max(longest - 1, 1)
    if route.kind == "apart" or inputs > MOST_KEYS:
        return [pack([row(length)], [0], min_shared=None) for length in (_SMALL, _LARGE)]
    count = max(_SMALL // inputs, 2)
    return [pack([row(inputs)], [0] * n, min_shared=None) for n in (count, count + 1)]


def available_bytes(device: torch.device) -> int:
    """Memory that is free to take now: of the GPU, or of the machine and its control group.

    0 if it cannot be known.
    """

    if device.type == "cuda":
        from truetune.compute.cuda.footprint import free_bytes

        return free_bytes(device)
    limits = [_meminfo_available(), *_control_group()]
    return min((limit for limit in limits if limit), default=0)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if it is unknown."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _meminfo_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return 0
    return int(found[0]) * 1024 if found else 0


def _control_group() -> list[int]:
    """What a container may still take; nothing if it has no limit."""
    values = []
    for name in ("max", "current"):
        try:
            with open(f"/sys/fs/cgroup/memory.{name}", encoding="ascii") as file:
                values.append(int(file.read()))
        except (OSError, ValueError):
            return []
    return [max(values[0] - values[1], 1)]
