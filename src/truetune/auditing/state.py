"""Restore everything that reading changes: random states, and the state of objects that are read.

Reading a trainer's batches draws random numbers, moves samplers on and fills caches. `untouched`
puts all of that back, in place, so that a run with the audit gives the same losses bit for bit.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
    MutableSequence,
)
from contextlib import contextmanager
from typing import Any

# Containers with more items are restored as a whole, without looking at each of their items.
_FEW = 1_000
_DEPTH = 4


@contextmanager
def untouched(objects: Iterable[Any]) -> Iterator[Snapshot]:
    """Restore random states, and the attributes of `objects`, when the block is left."""
    snapshot = Snapshot()
    for item in objects:
        snapshot.add(item)
    states = _random_states()
    try:
        yield snapshot
    finally:
        snapshot.restore()
        for put_back in states:
            put_back()


class Snapshot:
    """Attributes of objects, and the plain containers and generators that they hold.

    Models, datasets' tables and tensors are not copied: reading does not write them.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []

    def add(self, item: Any, depth: int = _DEPTH) -> None:
        """Remember the state of an object: its attributes, and what its closure holds."""
        if item is None or id(item) in self._seen:
            return
        if isinstance(item, types.MethodType):
            self.add(item.__self__, depth)
            item = item.__func__
        if isinstance(item, types.FunctionType):
            self._seen[id(item)] = item
            for cell in item.__closure__ or ():
                try:
                    self._value(cell.cell_contents, depth - 1)
                except ValueError:  # a cell that is not filled yet
                    continue
            return
        if hasattr(item, "func") and hasattr(item, "keywords"):  # functools.partial
            self.add(item.func, depth)
            self._value(item.keywords, depth - 1)
        attributes = getattr(item, "__dict__", None)
        if isinstance(attributes, dict):
            self._seen[id(item)] = item
            self._value(attributes, depth)
        else:
            self._value(item, depth)

    def restore(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def _value(self, value: Any, depth: int) -> None:
        if depth < 0 or id(value) in self._seen:
            return
        undo = _undo(value)
        if undo is None:
            return
        self._seen[id(value)] = value
        self._undo.append(undo)
        if isinstance(value, MutableMapping | MutableSequence) and len(value) <= _FEW:
            for inner in list(value.values() if isinstance(value, MutableMapping) else value):
                self._value(inner, depth - 1)


def _undo(value: Any) -> Callable[[], None] | None:
    """Return how to restore a value in place; None if it must not be copied."""
    kind = type(value)
    if isinstance(value, dict) and hasattr(kind, "copy"):
        kept = dict(value)
        return lambda: _refill(value, kept)
    if kind is list or kind.__name__ == "deque":
        items = list(value)
        return lambda: _relist(value, items)
    if kind is set:
        members = set(value)
        return lambda: _reset(value, members)
    if isinstance(value, random.Random):
        state = value.getstate()
        return lambda: value.setstate(state)
    if hasattr(value, "get_state") and hasattr(value, "set_state"):  # torch.Generator, numpy's old
        seen = value.get_state()
        return lambda: value.set_state(seen)
    if hasattr(value, "bit_generator"):  # numpy.random.Generator
        inner = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", inner)
    return None


def _refill(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    same = len(value) == len(kept) and all(
        a is b and value[a] is kept[b] for a, b in zip(value, kept, strict=True)
    )
    if not same:
        value.clear()
        value.update(kept)


def _relist(value: Any, items: list[Any]) -> None:
    if len(value) != len(items) or any(a is not b for a, b in zip(value, items, strict=True)):
        value.clear()
        value.extend(items)


def _reset(value: set[Any], members: set[Any]) -> None:
    value.clear()
    value.update(members)


def _random_states() -> list[Callable[[], None]]:
    """Of Python, and of numpy and torch where they are in use, on all devices."""
    python = random.getstate()
    undo: list[Callable[[], None]] = [lambda: random.setstate(python)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        legacy = numpy.random.get_state()
        undo.append(lambda: numpy.random.set_state(legacy))
    torch = sys.modules.get("torch")
    if torch is not None:
        cpu = torch.get_rng_state()
        undo.append(lambda: torch.set_rng_state(cpu))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            devices = torch.cuda.get_rng_state_all()
            undo.append(lambda: torch.cuda.set_rng_state_all(devices))
        if torch.backends.mps.is_available():
            mps = torch.mps.get_rng_state()
            undo.append(lambda: torch.mps.set_rng_state(mps))
    return undo


@contextmanager
def tokenizer_untouched(tokenizer: Any) -> Iterator[None]:
    """Restore the padding and truncation that a call leaves in a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(
        tokenizer, "_tokenizer", None
    )
    truncation = getattr(backend, "truncation", None)
    padding = getattr(backend, "padding", None)
    try:
        yield
    finally:
        if backend is not None and hasattr(backend, "no_truncation"):
            if backend.truncation != truncation:
                if truncation is None:
                    backend.no_truncation()
                else:
                    backend.enable_truncation(**truncation)
            if backend.padding != padding:
                if padding is None:
                    backend.no_padding()
                else:
                    backend.enable_padding(**padding)
