"""A checkup as one HTML file: no script, no link, nothing fetched; all text escaped.

input   what `--json` prints
does    findings as cards, the lengths as a picture, the numbers as tables
output  HTML
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from truetune.checks.fit import duration
from truetune.findings import escaped, gib
from truetune.reporting.html import document, facts_table, finding_cards, lengths_section


def page(facts: Mapping[str, Any]) -> str:
    """The HTML of a checkup.

    Args:
        facts: `Checkup.as_dict()`.
    """
    summary = facts["summary"]
    body = [
        *_head(facts, summary),
        *finding_cards(facts["findings"]),
        *_lengths(summary),
        *_topics(summary),
    ]
    return document("truetune check", body)


def _text(value: Any) -> str:
    return escaped(str(value))


def _head(facts: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    run = summary.get("run") or summary.get("model") or {}
    counts = summary["counts"]
    levels = ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts.items() if n)
    name, css = ("ok", "good") if facts["ok"] else ("not ok", "bad")
    yield f'<h1>truetune check: <span class="verdict {css}">{name}</span></h1>'
    looked = " \u00b7 ".join(_text(run[key]) for key in ("model", "data") if run.get(key))
    yield f'<p class="sub">{looked}<br>{levels or "nothing found"}</p>'


def _lengths(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary.get("lengths"):
        yield "<h2>Lengths in tokens</h2>"
        yield from lengths_section(summary["lengths"])


def _topics(summary: Mapping[str, Any]) -> Iterator[str]:
    titles = {
        "model": "Model",
        "verdict": "Base or instruct",
        "run": "Run",
        "contract": "Prompt and answer",
        "plan": "Memory and time",
        "rehearsal": "Smoke test",
    }
    for name, title in titles.items():
        values = summary.get(name)
        if not values:
            continue
        shown = _readable(values) if name == "plan" else values
        yield f"<h2>{title}</h2>"
        yield facts_table((key.replace("_", " "), value) for key, value in shown.items())


def _readable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes and seconds in units that people read."""
    shown: dict[str, Any] = {
        "device": plan["device"],
        "memory": f"{gib(plan['low'])} to {gib(plan['high'])}",
        "free": None if plan["available"] is None else gib(plan["available"]),
        "estimate by part": ", ".join(
            f"{name} {gib(size)}" for name, size in plan["parts"].items()
        ),
        "time": duration(plan["seconds"]) if plan["seconds"] else "",
    }
    for option, size, cost in plan["ways"]:
        shown[f"with {option}"] = f"{gib(size)} ({cost})"
    return shown
