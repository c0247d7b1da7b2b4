"""Find why weights are not what they should be, from two sets of tensors with the same names.

input   expected tensors one after the other, the found ones by name, maybe the base's
does    compares each within what its type rounds by; of those that differ says what was done to
        them: never merged, merged twice, scaled, swapped, rows in another order, rounded
output  a sentence, "" where nothing differs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from truetune.findings import percent

if TYPE_CHECKING:
    import torch

Lookup = Callable[[str], "tuple[torch.Tensor, str] | None"]

# How far a tensor of a type is from the one it was rounded from, in units of its own norm.
ROUNDING = {
    "F32": 1e-5,
    "F16": 2e-3,
    "BF16": 8e-3,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    "Q5_K": 0.08,
    "Q5_0": 0.1,
    "Q5_1": 0.1,
    "Q4_K": 0.15,
    "Q4_0": 0.2,
    "Q4_1": 0.2,
}
# Of other types.
OTHER = 0.3


@dataclass
class Differing:
    """What was found of the tensors that differ.

    Attributes:
        names: of all.
        missing: expected and not there.
        shapes: (name, expected, found) with another shape.
        merged: how much of the adapter's update each holds: 0 none, 1 all, 2 twice.
        scaled: by how much, of those that are a multiple.
        words: other explanations.
    """

    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    merged: dict[str, float] = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    number: int = 0


def explain(
    expected: Iterable[tuple[str, torch.Tensor]],
    found: Lookup,
    base: Lookup | None = None,
    *,
    orders: Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]] | None = None,
    factor: float = 1.0,
) -> str:
    """Say what was done to the tensors.

    Args:
        expected: name and value each.
        found: value and type by name.
        base: the same before anything was trained.
        orders: other arrangements of a tensor, each with its name.
        factor: of `ROUNDING`, where the expected tensors were rounded themselves.
    """
    seen = Differing()
    differing: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    for name, wanted in expected:
        seen.number += 1
        there = found(name)
        if there is None:
            seen.missing.append(name)
            continue
        value, kind = there
        if value.shape != wanted.shape:
            seen.shapes.append((name, tuple(wanted.shape), tuple(value.shape)))
            continue
        if apart(value, wanted) <= factor * ROUNDING.get(kind, OTHER):
            continue
        seen.names.append(name)
        _look(seen, name, value, wanted, base, orders, factor * ROUNDING.get(kind, OTHER))
        if len(differing) < _MOST_KEPT:
            differing[name], kept[name] = value, wanted
    _swapped(seen, differing, kept)
    return _in_words(seen)


# Tensors of which pairs are looked for.
_MOST_KEPT = 64


def apart(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference in units of the expected one's."""
    norm = float(wanted.double().norm())
    found = float((value.double() - wanted.double()).norm()) / max(norm, 1e-30)
    return found if found == found else float("inf")


def _look(
    seen: Differing,
    name: str,
    value: torch.Tensor,
    wanted: torch.Tensor,
    base: Lookup | None,
    orders: Any,
    allowed: float,
) -> None:
    import torch

    if not torch.isfinite(value).all():
        seen.words.append(
            f"{name} contains numbers that are not finite: they exceed the range of its type"
        )
        return
    before = base(name) if base else None
    if before is not None and before[0].shape == wanted.shape:
        update = (wanted - before[0]).double()
        size = float(update.square().sum())
        if size:
            done = (value - before[0]).double()
            share = float((done * update).sum()) / size
            left = float((done - share * update).norm()) / size**0.5
            # Rounding of the whole may be as large as a small update.
            room = 0.2 + 2 * allowed * float(wanted.double().norm()) / size**0.5
            if left <= room:
                seen.merged[name] = share
                return
    for words, other in orders(name, wanted) if orders else ():
        if other.shape == value.shape and apart(value, other) <= allowed:
            seen.words.append(f"{name}: {words}")
            return
    norm = float(wanted.double().square().sum())
    if norm:
        scale = float((value.double() * wanted.double()).sum()) / norm
        if scale and apart(value / scale, wanted) <= 2 * allowed:
            seen.scaled[name] = scale


def _swapped(
    seen: Differing, differing: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]
) -> None:
    for name, value in differing.items():
        for other, wanted in kept.items():
            if name != other and value.shape == wanted.shape and apart(value, wanted) < 0.05:
                seen.words.append(f"{name} contains the values of {other}")
                break


def _in_words(seen: Differing) -> str:
    parts = []
    if seen.missing:
        parts.append(f"{len(seen.missing)} tensors are missing, first {seen.missing[0]}")
    if seen.shapes:
        name, wanted, got = seen.shapes[0]
        parts.append(f"{name} has the shape {list(got)} instead of {list(wanted)}")
    if seen.merged:
        shares = sorted(seen.merged.values())
        middle = shares[len(shares) // 2]
        if abs(middle) < 0.1:
            how = "does not contain the adapter's update: it was not merged"
        elif abs(middle - 1) < 0.05:
            how = "contains the adapter's update on other weights: it was merged into rounded ones"
        elif abs(middle - 2) < 0.2:
            how = "contains the adapter's update twice"
        else:
            how = f"contains {middle:.3g} times the adapter's update: alpha or rank was different"
        first = next(iter(seen.merged))
        parts.append(f"{first} ({len(seen.merged)} tensors) {how}")
    if seen.scaled:
        name, scale = next(iter(seen.scaled.items()))
        parts.append(f"{name} ({len(seen.scaled)} tensors) is {scale:.3g} times what it should be")
    parts += seen.words[:3]
    rest = len(seen.names) - len(seen.merged) - len(seen.scaled)
    if seen.names and rest == len(seen.names) and not seen.words:
        share = percent(len(seen.names) / max(seen.number, 1))
        parts.append(
            f"{len(seen.names)} of {seen.number} tensors ({share}) contain different numbers, "
            f"first {seen.names[0]}"
        )
    return "; ".join(parts)
