"""Tell whether a tensor is what rounding to its type can make of another one.

input   the found and the expected values, the name of the found tensor's type
does    compares each number within the step of its type if the expected values are the source's
        own; else, and for quantised types, the error, scale and rows as a whole with those of a
        fresh rounding
output  yes or no
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from truetune.model.quantise import Blocks
from truetune.system.lazy import torch

# One unit in the last place, in units of the number. Merged sums in float32 differ in the order of
# their terms.
STEPS = {"F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-7}
# The smallest step of float16.
_LEAST = 2.0**-24
# What a merge on a GPU in TF32 costs an update, in units of the matrix.
_MERGED = 1e-3
# Numbers that are compared at once.
_CHUNK = 2**24


@dataclass(frozen=True)
class Sums:
    """One tensor against another.

    Attributes:
        error: norm of the difference in units of the expected norm.
        scale: what the found tensor is of the expected one, as a factor.
        rows: the same as `error` for each row; rows near zero count as a tenth of the usual one.
        finite: whether all found numbers are.
    """

    error: float
    scale: float
    rows: torch.Tensor
    finite: bool


def sums(value: torch.Tensor, wanted: torch.Tensor) -> Sums:
    """Compare two tensors of the same shape."""
    one, other = (t.reshape(-1, t.shape[-1] if t.ndim > 1 else t.numel()) for t in (value, wanted))
    step = max(1, _CHUNK // max(one.shape[-1], 1))
    parts = []
    for at in range(0, len(one), step):
        v, w = one[at : at + step].float(), other[at : at + step].float()
        products = ((v - w).square(), v * w, w.square())
        parts.append(torch.stack([p.sum(dim=1, dtype=torch.float64) for p in products]))
    apart_R, both_R, own_R = torch.cat(parts, dim=1)
    own = max(float(own_R.sum()), 1e-60)
    floor = max(0.01 * float(own_R.mean()), 1e-60)
    error = (float(apart_R.sum()) / own) ** 0.5
    return Sums(
        error,
        float(both_R.sum()) / own,
        (apart_R / own_R.clamp(min=floor)).sqrt(),
        bool(torch.isfinite(apart_R).all()),
    )


def is_rounded(
    value: torch.Tensor, wanted: torch.Tensor, kind: str, *, merged: bool, added: float = 0.0
) -> bool:
    """Whether a tensor of a plain type is the expected one, rounded to it or to a coarser one.

    Args:
        kind: of `STEPS`; the type that the numbers are stored in. They may have been rounded to a
            coarser one before.
        merged: an adapter was added to it, maybe by another tool and in its own type, which costs
            more than one rounding.
        added: what a converter added to each number after it was rounded.
    """
    if torch.equal(value, wanted):
        return True
    step = max(STEPS[kind], _held_by(value, added))
    if not merged:
        if not added and _held_by(wanted, 0.0) >= step:
            # Numbers that a type holds already are not rounded when they are stored in it.
            step = STEPS["F32"]
        v, w = (value - added, wanted - added) if added else (value, wanted)
        size = torch.maximum(v.abs(), w.abs())
        # What was added leaves its own rounding.
        room = step * size + _LEAST + 2.0**-22 * abs(added)
        room = room + STEPS["F32"] * float(size.square().mean().sqrt())
        return bool(((v - w).abs() <= room).all())
    found = sums(value, wanted)
    most = max(step, _MERGED)
    least = _LEAST / max(float(wanted.double().square().mean().sqrt()), 1e-30)
    return (
        found.finite
        and found.error <= most + least
        and abs(found.scale - 1) <= most / 2 + least
        and float(found.rows.max()) <= 8 * (most + least)
    )


def _held_by(value: torch.Tensor, added: float) -> float:
    """The step of the coarsest plain type that holds all numbers of a tensor."""
    plain = value - added if added else value
    # A number to which another was added has lost its last digits.
    lost = 2.0**-22 * abs(added)
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        if bool(((plain.to(dtype).float() - plain).abs() <= lost).all()):
            return STEPS[kind]
    return 0.0


def coarser_bits(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """About how many bits a matrix was rounded to before it was stored as it is now; 0 where it was
    not rounded: what further training or other weights do to a matrix looks different.

    Either few different values are left in a block, or all errors in a block are within half a step
    of a grid, or all are within a share of the number itself (a float of 8 bits).
    """

    if value.ndim < 2 or value.shape != wanted.shape:
        return 0.0
    found = sums(value, wanted)
    bits = 4 - math.log2(max(found.error, 1e-9) / _FOUR_BITS)
    if not found.finite or not _FEWEST_BITS <= bits <= _MOST_BITS:
        return 0.0
    if abs(found.scale - 1) > 0.02 + found.error**2:
        return 0.0
    width = min(32, value.shape[-1])
    cut = value.shape[-1] // width * width
    v, w = (
        t.reshape(-1, t.shape[-1])[:_ROWS, :cut].reshape(-1, width).float() for t in (value, wanted)
    )
    ordered = v.sort(dim=1).values
    different = 1 + (ordered.diff(dim=1) != 0).sum(dim=1)
    if width == 32 and float((different <= 17).float().mean()) > 0.99:
        return bits
    error = v - w
    near = error.abs() <= w.abs() / 8 + w.abs().max() * 2.0**-17
    if float(near.float().mean()) > 0.999:
        return bits
    square = error.square().mean(dim=1)
    known = square > 0
    if float(known.float().mean()) < 0.5:
        return 0.0  # a few rows are different
    # 1.8 where errors are spread evenly over a step, 1 where all are as large, 3 of a bell curve.
    peaked = (error.pow(4).mean(dim=1)[known] / square[known].square()).mean()
    return bits if 1.5 < float(peaked) < 2.3 else 0.0


# What four bits cost, in units of a matrix' norm; each bit less costs twice as much.
_FOUR_BITS = 0.1
_FEWEST_BITS, _MOST_BITS = 1.7, 9.5
# Rows of a matrix that are looked at.
_ROWS = 4096


# Half the widest gap between two levels, 0.152 (NF4), 0.167 (FP4) and 0.5/127 (8 bits), and 0.012
# for rounding to bfloat16 before, after and in the scales. docs/log.md has what healthy ones need.
FOUR_BIT_SHARE, EIGHT_BIT_SHARE = 0.18, 0.016
# Scales of nested blocks are rounded as well: half the widest gap of their levels, in units of the
# largest distance of a scale from the mean.
_SCALE_SHARE = 0.0075


def is_in_blocks(value: torch.Tensor, wanted: torch.Tensor, how: Blocks, share: float) -> bool:
    """Whether no number is further off than nearest rounding in such blocks can move it.

    Args:
        share: how far a number may move, in units of the largest in its block.
    """
    if how.turned:
        value, wanted = value.T, wanted.T
    width = how.width or wanted.shape[-1]
    largest_N, apart_N = (
        torch.cat([part.abs().amax(dim=1) for part in _in_blocks(numbers, width)])
        for numbers in (wanted, value - wanted)
    )
    room_N = share * largest_N + _LEAST
    if how.nested:
        off_N = (largest_N - largest_N.mean()).abs()
        off_G = torch.cat([part.amax(dim=1) for part in _in_blocks(off_N, how.nested)])
        room_N += _SCALE_SHARE * off_G.repeat_interleave(how.nested)[: len(off_N)]
    return bool((apart_N <= room_N).all())


def _in_blocks(value: torch.Tensor, width: int) -> list[torch.Tensor]:
    """(N, width) blocks of its numbers, and the rest (1, less)."""
    flat = value.flatten()
    cut = len(flat) // width * width
    return [part for part in (flat[:cut].view(-1, width), flat[cut:][None]) if part.numel()]


def is_quantised(
    value: torch.Tensor, wanted: torch.Tensor, remade: torch.Tensor, *, weighed: bool
) -> bool:
    """Whether a dequantised tensor is the expected one in so few bits.

    Args:
        remade: the expected one after the same rounding, by a quantiser that weighs all columns
            alike.
        weighed: the file says that its quantiser weighed columns by how much they matter
            (an importance matrix): unimportant ones are rounded worse, towards zero.
    """
    found, own = sums(value, wanted), sums(remade, wanted)
    # The source may have been rounded to bfloat16 before.
    once = STEPS["BF16"] / 2
    worse, less, more, rows = _WEIGHED if weighed else _ALIKE
    rows_R = rows * own.rows.clamp(min=own.error) + 8 * once
    shift = found.scale - own.scale
    return (
        found.finite
        and found.error <= worse * own.error + once
        and -once - less * own.error <= shift <= once + more * own.error
        and bool((found.rows <= rows_R).all())
    )


# How many times the error of a quantiser that weighs all columns alike the whole may have; by what
# share of that error the scale may be smaller and larger; how many times the error a row may have.
# A quantiser may weigh columns without saying so, hence more than nothing. docs/log.md has the
# measurements.
_ALIKE, _WEIGHED = (1.6, 0.4, 0.05, 4.0), (4.0, 1.5, 0.3, 20.0)
