"""Register checks: a check is a function with `@check` in a module of a room.

input   a room: a package of which each module is a family of checks
does    imports its modules, and asks each check whose conditions hold
output  what the checks found, in the order of the modules and of their lines
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from truetune.findings import Finding

Judge = Callable[[Any], Iterable[Finding]]
Condition = Callable[[Any], bool]


@dataclass(frozen=True)
class Check:
    """A function that takes facts and yields findings, with the conditions under which it runs."""

    judge: Judge
    conditions: tuple[Condition, ...]

    def __call__(self, facts: Any) -> Iterator[Finding]:
        if all(condition(facts) for condition in self.conditions):
            yield from self.judge(facts)


_ALL: dict[str, list[Check]] = {}


def check(*conditions: Condition) -> Callable[[Judge], Judge]:
    """Make a function a check of the room that its module lies in.

    Args:
        conditions: on the facts; the check runs only if all of them hold.
    """

    def registered(judge: Judge) -> Judge:
        _ALL.setdefault(judge.__module__, []).append(Check(judge, conditions))
        return judge

    return registered


def checks_of(room: ModuleType) -> tuple[Check, ...]:
    """All checks of a room, or of one family: by module name, then by line."""
    inside = pkgutil.iter_modules(getattr(room, "__path__", ()))
    names = [room.__name__, *sorted(f"{room.__name__}.{module.name}" for module in inside)]
    for name in names:
        importlib.import_module(name)
    return tuple(one for name in names for one in _ALL.get(name, ()))


def ask(room: ModuleType, facts: Any) -> Iterator[Finding]:
    """Run the checks of a room."""
    for one in checks_of(room):
        yield from one(facts)
