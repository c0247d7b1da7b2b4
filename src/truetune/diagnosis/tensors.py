"""Compare two sets of tensors with the same names, and find why they differ.

input   expected tensors one after the other, the found ones by name, maybe the base's
does    compares each with what rounding to its type makes of the expected one; of those that
        differ says what was done to them: never merged, merged twice, scaled, swapped, rows in
        another order, rounded
output  a sentence, "" if nothing differs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from truetune.diagnosis.rounding import coarser_bits, sums
from truetune.findings import percent
from truetune.system.lazy import torch

Lookup = Callable[[str], "tuple[torch.Tensor, str] | None"]
# Whether the found tensor (name, value, type) is the expected one.
Same = Callable[[str, "torch.Tensor", str, "torch.Tensor"], bool]

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
    """The tensors that differ, and explanations.

    Attributes:
        names: of all.
        missing: expected and not there.
        shapes: (name, expected, found) with another shape.
        merged: how much of the adapter's update each holds: 0 none, 1 all, 2 twice.
        scaled: by how much, of those that are a multiple.
        words: other explanations.
        explained: tensors of those.
        untouched: tensors that the adapter does not change.
        rounded: to about how many bits, of those that were rounded and stored again.
        kind: the type in which these are stored.
    """

    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    merged: dict[str, float] = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)
    untouched: list[str] = field(default_factory=list)
    rounded: dict[str, float] = field(default_factory=dict)
    kind: str = ""
    number: int = 0


def explain(
    expected: Iterable[tuple[str, torch.Tensor]],
    found: Lookup,
    base: Lookup | None = None,
    *,
    orders: Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]] | None = None,
    other: float = OTHER,
    same: Same | None = None,
    rows: int = 0,
) -> str:
    """Say what was done to the tensors; "" if they are the expected ones.

    Args:
        expected: name and value each.
        found: value and type by name.
        base: the same before anything was trained.
        orders: other arrangements of a tensor, each with its name.
        other: of `ROUNDING`, for types that it does not have.
        same: decides which tensors are the expected ones; None: those within `ROUNDING`.
        rows: tokens of the vocabulary. A table with a row for each may be longer or shorter than
            the expected one by rows that no token has.
    """
    seen = Differing()
    pairs: set[tuple[int, int]] = set()
    differing: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    for name, wanted in expected:
        seen.number += 1
        there = found(name)
        if there is None:
            seen.missing.append(name)
            continue
        value, kind = there
        pair = (wanted.data_ptr(), value.data_ptr())
        if pair in pairs:
            # A head that is the embedding.
            seen.number -= 1
            continue
        pairs.add(pair)
        if value.shape != wanted.shape:
            shared = _shared_rows(value, wanted, rows)
            if not shared:
                seen.shapes.append((name, tuple(wanted.shape), tuple(value.shape)))
                continue
            value, wanted = value[:shared], wanted[:shared]
        allowed = ROUNDING.get(kind, other)
        if same is not None:
            if same(name, value, kind, wanted):
                continue
        elif apart(value, wanted) <= allowed:
            continue
        seen.names.append(name)
        _look(seen, name, value, wanted, base, orders, allowed)
        if name not in (*seen.merged, *seen.scaled, *seen.explained) and (
            bits := coarser_bits(value, wanted)
        ):
            seen.rounded[name], seen.kind = bits, kind
        if len(differing) < _MOST_KEPT:
            differing[name], kept[name] = value, wanted
    _swapped(seen, differing, kept)
    return _in_words(seen)


def _shared_rows(value: torch.Tensor, wanted: torch.Tensor, rows: int) -> int:
    """Rows that two tables share if only unused ones are missing in one; else 0."""
    shared = min(len(value), len(wanted))
    alike = value.ndim == wanted.ndim == 2 and value.shape[1] == wanted.shape[1]
    return shared if alike and 0 < rows <= shared else 0


# The largest number of float16.
_LARGEST_HALF = 65504.0
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
    finite = torch.isfinite(value)
    if not finite.all():
        number = int((~finite).sum())
        most = float(wanted.abs().max())
        beyond = bool(torch.isinf(value).any()) and most > _LARGEST_HALF
        seen.words.append(
            f"{name} contains numbers that are not finite ({number:,})"
            + (": they exceed the range of its type" if beyond else "")
        )
        seen.explained.add(name)
        return
    norm = float(wanted.double().square().sum())
    scale = float((value.double() * wanted.double()).sum()) / norm if norm else 0.0
    scaled = apart(value / scale, wanted) if scale else float("inf")
    is_scaled = abs(scale - 1) > allowed and scaled <= 2 * allowed
    before = base(name) if base else None
    if before is not None and before[0].shape == wanted.shape:
        update = (wanted - before[0]).double()
        size = float(update.square().sum())
        if size:
            done = (value - before[0]).double()
            share = float((done * update).sum()) / size
            left = float((done - share * update).norm()) / size**0.5
            # Rounding of the whole may be as large as a small update.
            room = max(0.2, 0.5 * allowed * float(wanted.double().norm()) / size**0.5)
            nearer = not is_scaled or left * size**0.5 <= scaled * norm**0.5 * 1.01 + 1e-9
            if left <= room and nearer:
                seen.merged[name] = share
                return
        else:
            seen.untouched.append(name)
    if is_scaled:
        seen.scaled[name] = scale
        return
    for words, other in orders(name, wanted) if orders else ():
        if other.shape == value.shape and apart(value, other) <= allowed:
            seen.words.append(f"{name}: {words}")
            seen.explained.add(name)
            return
    if words := _rows(name, value, wanted, allowed):
        seen.words.append(words)
        seen.explained.add(name)


# A row that is further off than this, in units of its norm, was not merely rounded; so is one with
# twice the error that its type allows a whole matrix.
_ROW_APART = 0.5
# Rows that differ where others do not: at most this share.
_SOME_ROWS = 0.5


def _rows(name: str, value: torch.Tensor, wanted: torch.Tensor, allowed: float) -> str:
    """What was done to some rows of a matrix; "" where all or none differ."""
    if value.ndim != 2:
        return ""
    most = min(_ROW_APART, 2 * allowed)
    wrong = (sums(value, wanted).rows > most).nonzero().flatten().tolist()
    if not 0 < len(wrong) <= _SOME_ROWS * len(value):
        return ""
    what = "are zero" if not value[wrong].any() else "contain different numbers"
    return f"{len(wrong)} of {len(value)} rows of {name} {what}, first row {wrong[0]}"


def _swapped(
    seen: Differing, differing: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]
) -> None:
    for name, value in differing.items():
        own = apart(value, kept[name])
        for other, wanted in kept.items():
            if name == other or value.shape != wanted.shape:
                continue
            # Two norms may be nearly equal.
            if apart(value, wanted) < min(0.05, own / 4):
                seen.words.append(f"{name} contains the values of {other}")
                seen.explained.add(name)
                break


def _first(found: dict[str, float]) -> str:
    first = next(iter(found))
    return first if len(found) == 1 else f"{first} ({len(found)} tensors)"


def _rounded(seen: Differing, names: list[str]) -> str:
    bits = sorted(seen.rounded[name] for name in names)[len(names) // 2]
    stored = f" and stored again as {seen.kind}" if seen.kind else ""
    return (
        f"{len(names)} of {seen.number} tensors are the model's, rounded to about {bits:.0f} bits"
        f"{stored}, first {names[0]}: the weights were quantised before they were saved"
    )


# So many tensors, or this share of all, differ without a known reason only in another model.
_FEW, _MOST_OF = 4, 0.7


# The least share of all tensors that are rounded where the weights are: some are norms.
_ROUNDED = 0.5


def _in_words(seen: Differing) -> str:
    parts = []
    known = {*seen.merged, *seen.scaled, *seen.explained}
    # An adapter leaves norms and embeddings as they are, and a conversion leaves most tensors.
    apart_alone = [name for name in seen.untouched if name not in known]
    unknown = [name for name in seen.names if name not in known]
    differing = len(seen.names) + len(seen.missing) + len(seen.shapes)
    # Whoever rounds weights rounds most of them, and nothing else is found: norms, and what else is
    # no matrix, are equal. A table that lost the row of a new token may look rounded too.
    others = seen.merged or seen.scaled or seen.words
    most = len(unknown) >= _ROUNDED * seen.number
    if unknown and most and not others and all(name in seen.rounded for name in unknown):
        parts.append(_rounded(seen, unknown))
        apart_alone, unknown = [], []
    if seen.number >= _FEW and (
        len(apart_alone) >= _FEW
        or len(unknown) + len(seen.missing) + len(seen.shapes) > _MOST_OF * seen.number
    ):
        first = (unknown + seen.missing + [name for name, *_ in seen.shapes])[0]
        return (
            f"it is another model, or was trained differently: {differing} of {seen.number} "
            "tensors "
            f"are different, first {first}"
        )
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
        parts.append(f"{_first(seen.merged)} {how}")
    parts += _scales(seen.scaled)
    parts += seen.words[:3]
    if len(seen.words) > 3:
        parts.append(f"and {len(seen.words) - 3} more tensors")
    if unknown:
        share = percent(len(unknown) / max(seen.number, 1))
        parts.append(
            f"{len(unknown)} of {seen.number} tensors ({share}) contain different numbers, "
            f"first {unknown[0]}"
        )
    return "; ".join(parts)


def _scales(scaled: dict[str, float]) -> list[str]:
    """One line for each factor, of three at most: tensors may be damaged in different ways."""
    alike: list[dict[str, float]] = []
    for name, scale in scaled.items():
        for group in alike:
            if abs(scale / next(iter(group.values())) - 1) < 0.01:
                group[name] = scale
                break
        else:
            alike.append({name: scale})
    found = [
        f"{_first(group)} is {next(iter(group.values())):.3g} times what it should be"
        for group in alike[:3]
    ]
    rest = sum(map(len, alike[3:]))
    more = f"{rest} more tensors are multiples of what they should be"
    return [*found, more] if rest else found
