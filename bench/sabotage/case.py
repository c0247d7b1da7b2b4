"""A breakage, its healthy twin, and what a detector must say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.sabotage.house import House

Make = Callable[[House, bool], Any]


@dataclass(frozen=True)
class Case:
    """One breakage.

    Attributes:
        id: stable.
        title: what is broken, as a line of the table.
        make: (house, broken) to what is audited; not broken is the twin, which is the broken
            script with the fix of the finding applied and nothing else changed.
        codes: finding codes that name the cause.
        says: words of the finding, without regard to case, that show it names the cause.
        fix: words of its `fix` that are what the twin did.
        rows: the broken rows, by number; "all"; None where the fault lies in no row.
        real_only: needs a published template.
    """

    id: str
    title: str
    make: Make
    codes: tuple[str, ...]
    says: str
    fix: str
    rows: tuple[int, ...] | str | None = "all"
    real_only: bool = False
    needs_trl: bool = True


@dataclass(frozen=True)
class Negative:
    """Something that looks broken and is not: no detector may raise its voice."""

    id: str
    title: str
    make: Callable[[House], Any]
    real_only: bool = False
    needs_trl: bool = True
