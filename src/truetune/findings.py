"""The one shape of a diagnosis: what was found, where, how often, why, and what to do.

Everything that judges (data, contract, check, health) returns `Finding`s; only the command line
prints them. Codes are stable: scripts may rely on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosis.

    Attributes:
        code: stable, kebab-case.
        level: an error stops a run before the compute is spent; a warning and a note do not.
        what: one sentence.
        where: the first place it was seen (`file:line`, an option, a turn); "" if it has none.
        count: how many places.
        why: the likely cause.
        fix: the next command or edit.
    """

    code: str
    level: Level
    what: str
    where: str = ""
    count: int = 1
    why: str = ""
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The finding as plain text; the caller escapes it for its terminal or page."""
        head = f"{self.level}[{self.code}]: {self.what}"
        more = self.count - 1
        others = f" (and {more:,} other{'s' if more > 1 else ''})" if more else ""
        rows = [("where", self.where + others if self.where else ""), ("why", self.why)]
        rows.append(("fix", self.fix))
        return [head, *(f"  {name:<5}  {text}" for name, text in rows if text)]


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding per (code, level, what): the first place is kept, the counts are added."""
    groups: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.code, finding.level, finding.what)
        first = groups.get(key)
        groups[key] = (
            finding
            if first is None
            else dataclasses.replace(first, count=first.count + finding.count)
        )
    return sorted(groups.values(), key=lambda f: LEVELS.index(f.level))


def worst(findings: Iterable[Finding]) -> Level | None:
    """The most severe level present, None if there are none."""
    levels = {finding.level for finding in findings}
    return next((level for level in LEVELS if level in levels), None)
