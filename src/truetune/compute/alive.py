"""How many bytes of tensors are alive while a batch goes through a model and back.

input   a route and a batch
does    looks at what each operation of torch returns, and is told when a storage is freed
output  bytes after each operation, in order
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
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


def alive_bytes(
    route: Route, batch: PackedBatch, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[list[int], list[int], list[int]]:
    """Bytes after each operation: before the head, from the head to the loss, backward."""
    model = route.model
    batch = batch.to(next(model.parameters()).device)
    alive = _Alive([*model.parameters(), *model.buffers()])
    reached: list[int] = []
    handle = None
    if route.head is not None:
        handle = route.head.module.register_forward_pre_hook(
            lambda *_: reached.append(len(alive.curve))
        )
    try:
        with torch.enable_grad(), route.scope(batch), alive:
            with autocast():
                loss = route.loss_sum(batch)
            forward = len(alive.curve)
            loss.backward()
    finally:
        if handle is not None:
            handle.remove()
    head = reached[0] if reached else forward
    curve = alive.curve
    return curve[:head] or [0], curve[head:forward] or [0], curve[forward:]
