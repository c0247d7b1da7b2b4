"""Measure a few of a model's layers in place of all: layers of one kind need the same memory.

input   a model with a list of decoder layers
does    distinguishes kinds of layers by their modules, numbers and shapes; reduces the list to the
        first layer, the last one and two of each kind between them; computes the bytes of a pass
        through all layers from those of a pass through these
output  Cut: the layers that represent others; bytes after each operation, for the whole model
who     memory.py
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truetune.system.lazy import torch

if TYPE_CHECKING:
    from truetune.compute.alive import Trace

# A model with at most this number of layers is measured with all of them.
_FEW = 4


@dataclass(frozen=True)
class Cut:
    """A model's layers, and those that represent them.

    Attributes:
        owner, name: the module that has the list, and its name there.
        kept: indices of the layers that are computed.
        stands_for: for each layer of the model, the index in `kept` of the layer that represents
            it.
        gradients: bytes of each kept layer's gradients.
    """

    owner: torch.nn.Module
    name: str
    layers: torch.nn.ModuleList
    kept: tuple[int, ...]
    stands_for: tuple[int, ...]
    gradients: tuple[int, ...]


def find_cut(model: Any) -> Cut | None:
    """The layers that represent all; None if this would save nothing, or cannot be determined."""
    found = _layers(model)
    if found is None:
        return None
    owner, name, layers = found
    kinds = _kinds(model, list(layers))
    if kinds is None:
        return None
    last = len(layers) - 1
    # The first layer of a kind may create what the others reuse, so the second one represents it.
    kept, standing = [0], {}
    for place in range(1, last):
        kind = kinds[place]
        seen = sum(kinds[other] == kind for other in kept)
        if seen < 2:
            kept.append(place)
            standing[kind] = len(kept) - 1
    kept.append(last)
    if len(kept) > len(layers) - 2:
        return None
    places = {place: index for index, place in enumerate(kept)}
    stands_for = tuple(places.get(i, standing[kinds[i]]) for i in range(len(layers)))
    gradients = tuple(
        sum(p.numel() * p.element_size() for p in layers[i].parameters() if p.requires_grad)
        for i in kept
    )
    return Cut(owner, name, layers, tuple(kept), stands_for, gradients)


@contextlib.contextmanager
def shortened(model: Any, cut: Cut) -> Iterator[torch.nn.ModuleList]:
    """Inside, the model has the kept layers alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = vars(inner.config.get_text_config(decoder=True))
    types = config.get("layer_types")
    short = torch.nn.ModuleList(cut.layers[i] for i in cut.kept)
    cut.owner._modules[cut.name] = short
    if isinstance(types, list) and len(types) == len(cut.layers):
        config["layer_types"] = [types[i] for i in cut.kept]
    try:
        yield short
    finally:
        cut.owner._modules[cut.name] = cut.layers
        if types is not None:
            config["layer_types"] = types


def composed(trace: Trace, cut: Cut, *, gradients_kept: bool) -> Trace:
    """What a pass through all layers would leave, from one through those that are kept.

    Raises:
        ValueError: the pass did not go through the layers one after the other.
    """
    from truetune.compute.alive import Mark, Trace

    curve: list[int] = []
    level = 0

    def append(begin: Mark, end: Mark) -> None:
        nonlocal level
        curve.extend(value - begin.bytes + level for value in trace.curve[begin.at : end.at])
        level += end.bytes - begin.bytes

    start, finish = Mark(0, 0), trace.end
    forward, backward = trace.into, trace.back
    if len(forward) != len(cut.kept) + 1:
        raise ValueError("layers were not called one after the other")
    # Where no gradient reaches a layer, its part of the backward pass is empty.
    returned = [mark or finish for mark in backward]
    places = [start, *forward, trace.head, trace.forward, trace.backward]
    places += [*reversed(returned), finish]
    if any(a.at > b.at for a, b in itertools.pairwise(places)):
        raise ValueError("layers were not called one after the other")
    append(start, forward[0])
    for short in cut.stands_for:
        append(forward[short], forward[short + 1])
    append(forward[-1], trace.head)
    head = Mark(len(curve), level)
    append(trace.head, trace.forward)
    end_of_forward = Mark(len(curve), level)
    # What is freed between the passes (weights that autocast had cast) grows with the layers, too:
    # all that a layer takes is freed in the end, but for its gradients.
    level += trace.backward.bytes - trace.forward.bytes
    counts = [cut.stands_for.count(short) - 1 for short in range(len(cut.kept))]
    for short, more in enumerate(counts):
        taken = forward[short + 1].bytes - forward[short].bytes
        given = returned[short].bytes - returned[short + 1].bytes
        level += more * ((cut.gradients[short] if gradients_kept else 0) - taken - given)
    begin_of_backward = Mark(len(curve), level)
    append(trace.backward, returned[-1])
    for short in reversed(cut.stands_for):
        append(returned[short + 1], returned[short])
    append(returned[0], finish)
    end = Mark(len(curve), level)
    return Trace(curve, head, end_of_forward, begin_of_backward, end, (), ())


def _layers(model: Any) -> tuple[torch.nn.Module, str, torch.nn.ModuleList] | None:
    """The outermost list of modules that holds most of the weights."""
    found: list[tuple[int, torch.nn.Module, str, torch.nn.ModuleList]] = []

    def search(owner: torch.nn.Module) -> None:
        for name, child in owner.named_children():
            if isinstance(child, torch.nn.ModuleList):
                size = sum(p.numel() for p in child.parameters())
                found.append((size, owner, name, child))
            else:
                search(child)

    search(model)
    if not found:
        return None
    _, owner, name, layers = max(found, key=lambda each: each[0])
    shared = sum(1 for layer in layers for _ in layer.parameters())
    if len(layers) <= _FEW or shared != sum(1 for _ in layers.parameters()):
        return None
    return owner, name, layers


def _kinds(model: Any, layers: list[Any]) -> list[Any] | None:
    """What each layer consists of, and whether a gradient flows back through it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = inner.get_input_embeddings()
    reached = any(p.requires_grad for p in embedding.parameters())
    made = [_structure(layer) for layer in layers]
    # A number that counts the layers does not distinguish them.
    names = {name for name, _ in made[0][1]}
    counters = {
        name
        for name in names
        if all(dict(values).get(name) == place for place, (_, values) in enumerate(made))
    }
    kinds = []
    for layer, (parts, values) in zip(layers, made, strict=True):
        reached = reached or any(p.requires_grad for p in layer.parameters())
        plain = tuple(value for value in values if value[0] not in counters)
        kinds.append((parts, plain, reached))
    return kinds


def _structure(layer: torch.nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(modules and tensors, plain attributes) of a layer, by their names in it."""
    parts: list[Any] = []
    values: list[Any] = []
    for path, module in layer.named_modules():
        parts.append((path, type(module)))
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    facts = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                    parts.append((path, name, *facts))
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) or value is None:
                values.append((f"{path}.{name}", value))
    return tuple(parts), tuple(values)
