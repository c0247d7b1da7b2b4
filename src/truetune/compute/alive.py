"""Measure how many bytes of tensors are alive during the forward and backward pass of a batch.

input   a route and a batch
does    looks at what each operation of torch returns, and is notified when a storage is freed
output  Trace: bytes after each operation, in order, and where the layers begin and end
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from truetune.compute.packing import PackedBatch
from truetune.compute.route import Route


class _Alive(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are alive, after each operation."""

    def __init__(self, own: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self.curve: list[int] = []
        # By the storage itself: tensors without numbers have no address.
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        self.curve.append(self.bytes)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, freed)
        self.bytes += size


@dataclass(frozen=True)
class Mark:
    """A moment of a pass: operations before it, and the bytes that are alive."""

    at: int
    bytes: int


@dataclass(frozen=True)
class Trace:
    """Bytes after each operation of a pass forward and back.

    Attributes:
        head, forward: where the output head and the forward pass begin and end.
        backward, end: where the backward pass begins and ends.
        into: where each layer begins, and where the last one ends.
        back: where the gradient of what went into each layer is there, and of what came out of the
            last one; None if there is none.
    """

    curve: list[int]
    head: Mark
    forward: Mark
    backward: Mark
    end: Mark
    into: tuple[Mark, ...]
    back: tuple[Mark | None, ...]

    def parts(self) -> tuple[list[int], list[int], list[int]]:
        """Before the head, from the head to the loss, backward."""
        head, forward = self.head.at, self.forward.at
        return self.curve[:head] or [0], self.curve[head:forward] or [0], self.curve[forward:]


def alive_bytes(
    route: Route, batch: PackedBatch, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[list[int], list[int], list[int]]:
    """Bytes after each operation: before the head, from the head to the loss, backward."""
    return traced(route, batch, autocast).parts()


def traced(
    route: Route,
    batch: PackedBatch,
    autocast: Callable[[], AbstractContextManager[Any]],
    layers: Iterable[torch.nn.Module] = (),
) -> Trace:
    """A pass forward and back.

    Args:
        layers: whose beginnings and ends are noted.
    """
    model = route.model
    batch = batch.to(next(model.parameters()).device)
    alive = _Alive([*model.parameters(), *model.buffers()])
    layers = list(layers)
    reached: list[Mark] = []
    into: list[Mark] = []
    back: dict[int, Mark] = {}
    handles = []

    def mark() -> Mark:
        return Mark(len(alive.curve), alive.bytes)

    def begins(module: Any, given: Any, named: Any) -> None:
        note(given[0] if given else named["hidden_states"])

    def ends(module: Any, given: Any, made: Any) -> None:
        note(made if isinstance(made, torch.Tensor) else made[0])

    def note(hidden: torch.Tensor) -> None:
        if len(into) > len(layers):
            return  # a layer that is computed again, backward
        place = len(into)
        into.append(mark())
        if hidden.requires_grad:
            hidden.register_hook(lambda _: back.setdefault(place, mark()) and None)

    if route.head is not None:
        before_head = route.head.module.register_forward_pre_hook
        handles.append(before_head(lambda *_: reached.append(mark())))
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(begins, with_kwargs=True))
    if layers:
        handles.append(layers[-1].register_forward_hook(ends))
    try:
        with torch.enable_grad(), route.scope(batch), alive:
            with autocast():
                loss = route.loss_sum(batch)
                forward = mark()
            backward = mark()
            loss.backward()
            end = mark()
    finally:
        for handle in handles:
            handle.remove()
    returned = tuple(back.get(place) for place in range(len(into)))
    head = reached[0] if reached else forward
    return Trace(alive.curve, head, forward, backward, end, tuple(into), returned)
