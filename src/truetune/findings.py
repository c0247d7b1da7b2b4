"""The one form of every diagnosis: what was found, where, how often, why, and what to do.

Everything that judges (data, contract, check, health) returns `Finding`s; only the command line
prints them. Codes are stable: scripts may rely on them.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
# Places that a finding lists; its count has them all.
MOST_ROWS = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosis.

    Attributes:
        code: stable, kebab-case.
        level: an error stops a run before the compute is spent; a warning and a note do not.
        what: one sentence.
        where: the first place (`file:line`, an option, a turn); "" if there is none.
        count: the number of places.
        why: the likely cause.
        fix: the next command or edit.
        rows: the first places, at most 100, if there is more than one; `where` is the first.
    """

    code: str
    level: Level
    what: str
    where: str = ""
    count: int = 1
    why: str = ""
    fix: str = ""
    rows: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values, as `--json` prints them."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the finding as lines of plain text; the caller escapes them for its terminal or
        page."""
        head = f"{self.level}[{self.code}]: {self.what}"
        more = self.count - 1
        others = f" (and {more:,} other{'s' if more > 1 else ''})" if more else ""
        rows = [("where", self.where + others if self.where else ""), ("why", self.why)]
        rows.append(("fix", self.fix))
        return [head, *labelled(rows)]


def labelled(parts: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines below the first one of an error or a finding, without empty parts."""
    indent = "\n" + " " * 9
    return [f"  {name:<5}  {text}".replace("\n", indent) for name, text in parts if text]


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Merge findings with the same code, level and text: keep the first place, add up the counts
    and list the rows."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.level, finding.what), []).append(finding)
    return sorted(map(_joined, groups.values()), key=lambda f: LEVELS.index(f.level))


# Findings that differ in names and numbers alone, from which on they are shown as one.
_ALIKE = 4
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


def folded(findings: Iterable[Finding]) -> list[Finding]:
    """Merge findings, and show many that differ only in a quoted name or a number as one: for
    example, a template that writes no calls drops each function's name."""
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in merged(findings):
        key = (finding.code, finding.level, _NAMES.sub("", finding.what), finding.fix)
        groups.setdefault(key, []).append(finding)
    found = []
    for group in groups.values():
        if len(group) < _ALIKE:
            found += group
            continue
        one = _joined(group)
        what = f"{one.what}; {len(group) - 1:,} more differ only in the name or the number"
        found.append(dataclasses.replace(one, what=what))
    return found


def _joined(group: list[Finding]) -> Finding:
    first = group[0]
    if len(group) == 1:
        return first
    places = [place for f in group for place in (f.rows or ((f.where,) if f.where else ()))]
    rows = tuple(dict.fromkeys(places))[:MOST_ROWS]
    return dataclasses.replace(first, count=sum(f.count for f in group), rows=rows)


def worst(findings: Iterable[Finding]) -> Level | None:
    """Return the most severe level, or None if there are no findings."""
    levels = {finding.level for finding in findings}
    return next((level for level in LEVELS if level in levels), None)


# ------------------------------------------------------------------ findings on rows, and words


def rows_finding(
    names: Sequence[str],
    rows: Iterable[int],
    *,
    code: str,
    level: Level,
    what: str,
    why: str = "",
    fix: str = "",
) -> Finding:
    """Create a finding about some of the rows, in their order.

    Args:
        names: of all rows.
    """
    indices = sorted({int(row) for row in rows})
    places = tuple(dict.fromkeys(names[i] for i in indices[: 4 * MOST_ROWS]))[:MOST_ROWS]
    where = places[0] if places else ""
    return Finding(code, level, what, where, max(len(indices), 1), why, fix, places)


def near(word: str, there: Iterable[str], most: int = 1) -> list[str]:
    """Return the names that somebody who wrote `word` may have meant, the likeliest first: one
    begins with the other, or at most a third of the shorter one's letters are wrong, missing,
    added or exchanged."""
    own = _letters(word)
    found = []
    for place, name in enumerate(itertools.islice(there, _MOST_NAMES)):
        other = _letters(name)
        allowed = max(min(len(own), len(other)) // 3, 1)
        if min(len(own), len(other)) >= 3 and (own.startswith(other) or other.startswith(own)):
            found.append((abs(len(own) - len(other)), place, name))
        elif (apart := _apart(own, other, allowed)) <= allowed and apart < len(own):
            found.append((apart, place, name))
    return [name for *_, name in sorted(found)[:most]]


# Looked at for a near one: a folder may hold any number of files.
_MOST_NAMES = 5000


def _letters(name: str) -> str:
    """Drop what says little: case, dashes, and the extension that many names share."""
    stem, dot, extension = name.casefold().rpartition(".")
    known = bool(stem) and extension in ("jsonl", "json", "csv", "parquet", "txt", "yaml", "yml")
    return (stem if dot and known else name.casefold()).lstrip("-").replace("-", "_")


def _apart(one: str, other: str, allowed: int) -> int:
    """Return the edit distance, counting exchanged neighbours as one; above `allowed`, any
    number."""
    if abs(len(one) - len(other)) > allowed:
        return allowed + 1
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        earlier, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                least = min(least, earlier[j - 2] + 1)
            row.append(least)
        if min(row) > allowed:
            return allowed + 1
    return row[-1]


def phrase(names: Iterable[str], most: int, between: str = ", ") -> str:
    """Return the first few names as a phrase, with a count of the rest."""
    every = list(names)
    more = f"{between.strip(', ')} and {len(every) - most:,} more" if len(every) > most else ""
    return between.join(every[:most]) + more


def share(count: int, total: int) -> str:
    """`12 of 40 rows (30 %)`."""
    part = 100 * count / max(total, 1)
    # One digit below ten; 9.9 rounds to ten, and the rest of many zeros is no number to read.
    shown = f"{part:.0f}" if part >= 9.5 or part == 0 else f"{part:.1g}"
    if 0 < part < 0.001:
        shown = "under 0.001"
    return f"{count:,} of {total:,} rows ({shown} %)"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 row" or "2 rows"; `plural` is needed where it is not noun + "s"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(part: float) -> str:
    """`78.8 %`; a nonzero share is never shown as 0."""
    value = round(100 * part, 1)
    if part > 0 and not value:
        return "under 0.1 %"
    return f"{value:g} %"


def gib(count: float) -> str:
    """Return a number of bytes in readable form."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def visible(text: str, *, keep_newlines: bool = True) -> str:
    """Make foreign text safe for a terminal or a page: control, format and direction characters,
    and Unicode's line and paragraph separators, become escapes; line breaks and tabs stay if
    requested."""
    return "".join(
        char
        if (char in "\n\t" and keep_newlines)
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


def escaped(text: str) -> str:
    """Make foreign text safe for a page: `visible`, with markup escaped."""
    return html.escape(visible(text))
