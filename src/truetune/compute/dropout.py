"""Decide which inputs of an adapter are dropped, as a function of seed, step, layer and the tokens
read so far, so that the mask can be recomputed.

input   ids of a packed sequence and its layout; seed, step, number of a layer
does    a key for each token, of its ids from the row's first on; each element is dropped by a
        hash of its token's key, the layer and its place (SplitMix64: Steele et al. 2014)
output  a mask, the same on every device, in every cut into micro-batches, trees and processes

Rows that begin alike drop alike as far as they are alike: in a tree that is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from truetune.compute.layout import Layout

# Of SplitMix64, as signed numbers of 64 bits, which wrap around.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
# A shift of a signed number brings copies of its sign: in the last one they would leave every
# result with the same upper bit.
_LOWER = 2**33 - 1
# Odd: its powers tell places apart.
_BASE = 6364136223846793005
# Elements that one hash decides, a byte each.
_LANES = 8


def token_keys(ids: Sequence[int], layout: Layout) -> torch.Tensor:
    """(T,) int64: the sum of (id + 1) * base ** position over a token's row up to it."""
    import numpy as np
    import torch

    # By numpy, whose numbers have values also where torch's have only shapes.
    powers = np.full(layout.longest, _BASE, np.int64).cumprod()
    sums = ((np.array(ids, np.int64) + 1) * powers[layout.positions]).cumsum()
    # What a running sum has beyond the token's own row.
    ends = [0, *sums[np.array(layout.starts[1:]) - 1].tolist()]
    beyond: list[int] = []
    for node, parent in enumerate(layout.parents):
        own = 0 if parent < 0 else ends[parent + 1] - beyond[parent]
        beyond.append(_signed(ends[node] - own))
    return torch.from_numpy(sums - np.repeat(np.array(beyond, np.int64), layout.lengths))


def salt(seed: int, step: int, layer: int) -> int:
    """What sets a layer of a step apart from all others."""
    value = 0
    for number in (seed, step, layer):
        value = _mixed_int(value + (number + 1) * _STEP)
    return value


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mixed_int(value: int) -> int:
    value = _signed(value)
    value = _signed((value ^ (value >> 30)) * _FIRST)
    value = _signed((value ^ (value >> 27)) * _SECOND)
    return value ^ ((value >> 31) & _LOWER)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ ((z >> 31) & _LOWER)


def _mix_(z: torch.Tensor) -> torch.Tensor:
    z.bitwise_xor_(z >> 30).mul_(_FIRST)
    z.bitwise_xor_(z >> 27).mul_(_SECOND)
    return z.bitwise_xor_((z >> 31).bitwise_and_(_LOWER))


def dropped(states_T: torch.Tensor, width: int, p: float) -> torch.Tensor:
    """(T, width) bool: each element with probability p, tokens and places independent.

    Args:
        states_T: int64, token keys plus a salt.
    """
    states_T = _mixed(states_T)
    # A byte below the limit is dropped; the limit's fraction is a chance of each token.
    whole, rest = divmod(256 * p, 1)
    extra = ((states_T * _BASE) >> 40) & (2**24 - 1) < int(rest * 2**24)
    limits_T = (int(whole) + extra.int()).clamp(max=255)
    with_numbers = states_T.is_cuda and not hasattr(states_T, "fake_mode")
    if with_numbers and (by_element := _compiled()) is not None:
        made: torch.Tensor = by_element(states_T, limits_T, width)
        return made
    return _by_words(states_T, limits_T, width)


def _by_words(states_T: torch.Tensor, limits_T: torch.Tensor, width: int) -> torch.Tensor:
    import torch

    words = torch.arange(1, -(-width // _LANES) + 1, device=states_T.device) * _STEP
    bytes_TD = _mix_(states_T[:, None] + words).view(torch.uint8)[:, :width]
    return bytes_TD < limits_T.to(torch.uint8)[:, None]


def _by_element(states_T: torch.Tensor, limits_T: torch.Tensor, width: int) -> torch.Tensor:
    """The same, each element for itself: one kernel, where it is compiled."""
    import torch

    place = torch.arange(width, device=states_T.device)
    z = _mixed(states_T[:, None] + (place // _LANES + 1) * _STEP)
    return ((z >> (8 * (place % _LANES))) & 255) < limits_T[:, None]


@functools.cache
def _compiled() -> Any:
    """None if torch cannot compile for the device: eight times the kernels, the same mask."""
    import torch

    made = torch.compile(_by_element, dynamic=True)
    try:
        states = torch.arange(64, device="cuda")
        limits = torch.full((64,), 128, dtype=torch.int32, device="cuda")
        right = bool((made(states, limits, 96) == _by_words(states, limits, 96)).all())
    except Exception:  # whatever a compiler says that is not there
        return None
    return made if right else None
