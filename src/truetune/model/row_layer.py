"""peft's layer of trainable tokens, computed by rows. Imported only where peft is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn import functional


class RowLayer(TrainableTokensLayer):
    """An embedding or head whose output for a few ids comes from rows of its own.

    Parameters, names and saved format are peft's; only the forward pass differs: no copy of the
    table, and gradients of the size of the rows.
    """

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """ids (B, T) -> (B, T, D) for an embedding, hidden (..., D) -> (..., V) for a head."""
        base = self.base_layer
        by_rows = isinstance(base, torch.nn.Embedding | torch.nn.Linear)
        if self.disable_adapters or not active_adapters or self.merged or not by_rows:
            result: torch.Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return result
        self._check_overlapping_tokens(list(active_adapters))
        out: torch.Tensor = base(x, *args, **kwargs)
        for name in active_adapters:
            ids = self._ids(name, x.device)
            rows = self.trainable_tokens_delta[name]
            out = (
                self._over_embedding(x, out, ids, rows)
                if isinstance(base, torch.nn.Embedding)
                else _over_logits(x, out, ids, rows)
            )
        return out

    def _ids(self, adapter: str, device: torch.device) -> torch.Tensor:
        """Made once for a device: a copy to it would wait for all that it has to do."""
        known: dict[Any, torch.Tensor] = self.__dict__.setdefault("_ids_made", {})
        key = tuple(self.token_indices[adapter]), device
        if key not in known:
            ids = torch.tensor(key[0], device=device)
            if hasattr(ids, "fake_mode"):  # made inside a mode in which nothing has numbers
                return ids
            known[key] = ids
        return known[key]

    def replaced_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(ids, rows) that stand in place of the table's own; None if they do not, or where
        several adapters have some."""
        names = list(self.active_adapters)
        plain = type(self.base_layer) in (torch.nn.Embedding, torch.nn.Linear)
        if self.disable_adapters or self.merged or len(names) != 1 or not plain:
            return None
        rows = self.trainable_tokens_delta[names[0]]
        return self._ids(names[0], rows.device), rows

    def _over_embedding(
        self, ids_BT: torch.Tensor, out_BTD: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        sorted_ids, order = ids.sort()
        slot_BT = torch.searchsorted(sorted_ids, ids_BT).clamp(max=len(ids) - 1)
        hit_BT1 = (sorted_ids[slot_BT] == ids_BT)[..., None]
        # Rounded to the table's type first, as the merged table will be.
        new_BTD = functional.embedding(order[slot_BT], rows.to(self.base_layer.weight.dtype))
        scale = self._get_embed_scale()
        if scale is not None:
            new_BTD = new_BTD * scale.to(new_BTD.dtype)
        return torch.where(hit_BT1, new_BTD.to(out_BTD.dtype), out_BTD)


def _over_logits(
    hidden: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    new = functional.linear(hidden, rows.to(hidden.dtype))
    return logits.index_copy(-1, ids, new.to(logits.dtype))
