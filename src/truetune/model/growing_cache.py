"""A cache of keys and values that grows in place; transformers' own cache copies everything for
each token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class GrowingLayer(DynamicLayer):
    """A cache layer with room for more tokens behind those that it holds.

    Everything but `update` is the library's: what takes rows or tokens out of `keys` and `values`
    leaves tensors that are no longer the beginning of the room, and the next token makes new room.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: list[torch.Tensor | None] = [None, None]
        held = self.get_seq_length()
        self.keys = self._grown(0, self.keys, key_states, held)
        self.values = self._grown(1, self.values, value_states, held)
        return self.keys, self.values

    def _grown(
        self, which: int, held_BHTD: torch.Tensor, new_BHTD: torch.Tensor, held: int
    ) -> torch.Tensor:
        length = held + new_BHTD.shape[-2]
        room = self._rooms[which]
        begins = room is not None and (held == 0 or room.data_ptr() == held_BHTD.data_ptr())
        if room is None or not begins or len(room) != len(new_BHTD) or room.shape[-2] < length:
            shape = list(new_BHTD.shape)
            shape[-2] = length + max(length // 2, 32)
            room = new_BHTD.new_empty(shape)
            if held:
                room[..., :held, :] = held_BHTD
            self._rooms[which] = room
        room[..., held:length, :] = new_BHTD
        return room[..., :length, :]


def growing_cache(model: Any) -> Any:
    """A cache for `generate`, where the model's own would hold keys and values alone; None if it
    is of another kind."""
    takes_any = getattr(model, "_supports_default_dynamic_cache", None)
    if takes_any is None or not takes_any() or "mamba" in type(model).__name__.lower():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def can_shrink(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: it holds keys and values alone."""
    # Of exactly these classes: those made of them may hold states of other kinds as well.
    plain = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)
