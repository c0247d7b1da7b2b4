"""Sample a token from logits.

A logits processor that draws itself, with a random stream of its own per row, so that neither the
batch a row is in nor anybody else's random state matters, and no setting of the model's own
generation_config takes part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from truetune.errors import UsageError
from truetune.system.lazy import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: maximum number of new tokens, including the stop token.
        temperature: 0 takes the likeliest token (greedy).
        top_p: draw from the smallest set of tokens with this much probability; 1 for all.
        top_k: sample from this many likeliest tokens; 0 for all.
        repetition_penalty: divides the positive logits of tokens seen in prompt or reply, and
            multiplies negative ones (Keskar et al. 2019); 1 for none.
        seed: together with the conversation's index in the list, the seed of its random stream.

    Raises:
        UsageError: a number out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if self.temperature < 0:
            wrong.append(f"temperature is {self.temperature}, but must not be negative")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.top_k < 0:
            wrong.append(f"top_k is {self.top_k}, but must not be negative")
        if self.repetition_penalty <= 0:
            wrong.append(f"repetition_penalty is {self.repetition_penalty}, but must be above 0")
        if wrong:
            raise UsageError("invalid sampling settings: " + "; ".join(wrong), code="sampling")


class Draw:
    """Logits to a drawn token: everything else becomes impossible, so that argmax takes it.

    Args:
        sampling: how.
        rows: places of the batch's conversations in the list, which seed their streams.
        lengths: tokens of each prompt; what lies left of it is padding.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int], lengths: Sequence[int]) -> None:
        self.sampling, self.lengths = sampling, lengths
        self.streams = [random.Random(f"{sampling.seed}/{row}") for row in rows]
        self.width = max(lengths)

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        logits_BV = logits_BV.float()
        if self.sampling.repetition_penalty != 1:
            logits_BV = self._penalised(ids_BT, logits_BV)
        if self.sampling.temperature == 0:
            return logits_BV
        chosen_B1 = self._drawn(logits_BV)
        return torch.full_like(logits_BV, -torch.inf).scatter(1, chosen_B1, 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        self.lengths = [self.lengths[row] for row in rows]
        self.streams = [self.streams[row] for row in rows]

    def _penalised(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        penalty = self.sampling.repetition_penalty
        logits_BV = logits_BV.clone()
        for row, length in enumerate(self.lengths):
            seen = ids_BT[row, self.width - length :].unique()
            values = logits_BV[row, seen]
            logits_BV[row, seen] = values.where(values > 0, values * penalty**2) / penalty
        return logits_BV

    def _drawn(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """One uniform number per row, looked up in the cumulated probabilities, likeliest first."""
        sampling = self.sampling
        # Below the largest first: a tiny temperature then gives -inf, never inf.
        below_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
        ordered_BV, token_BV = below_BV.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            ordered_BV, token_BV = ordered_BV[:, : sampling.top_k], token_BV[:, : sampling.top_k]
        # MPS has no float64; elsewhere it keeps the tail of a large vocabulary exact.
        exact = torch.float32 if logits_BV.device.type == "mps" else torch.float64
        share_BV = ordered_BV.softmax(-1, dtype=exact)
        upto_BV = share_BV.cumsum(-1)
        # A token is in the nucleus while those before it have less than top_p.
        kept_BV = upto_BV - share_BV < sampling.top_p
        mass_B1 = (share_BV * kept_BV).sum(-1, keepdim=True)
        drawn_B1 = torch.tensor(
            [[stream.random()] for stream in self.streams], dtype=exact, device=mass_B1.device
        )
        place_B1 = torch.searchsorted(upto_BV, drawn_B1 * mass_B1, right=True)
        last_B1 = kept_BV.sum(-1, keepdim=True) - 1
        return token_BV.gather(1, place_B1.minimum(last_B1))
