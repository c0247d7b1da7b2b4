"""The table of failures, each from a real run: cause, what the loss shows, what the probe shows,
the repair. `failures.yaml` has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from truetune.lab.words import words

_LOSS = "training loss"


def table(results: Sequence[Mapping[str, Any]], number: Any, shipped: bool) -> Iterator[str]:
    """Lines of Markdown; failures whose runs are not among the results are left out.

    Args:
        number: writes a value with its unit.
        shipped: these are the results of docs/lab.md, whose numbers are known.
    """
    known = {
        (result["name"], arm["name"], name): number(found["value"], found["unit"])
        for result in results
        for arm in result["arms"]
        for name, found in arm["measures"].items()
    }
    lines = [line for name, said in words("failures").items() if (line := _line(name, said, known))]
    if not lines:
        return
    yield "## What goes wrong, and what shows it"
    yield ""
    yield "Each line comes from the runs below; their arms are in italics."
    if shipped:
        yield "The training loss of these broken runs is about as high as that of the sound ones,"
        yield "or lower, so only another measure shows the failure. Other faults raise the loss:"
        yield "labels that are shifted twice, an end token after cut reasoning, and a forgotten"
        yield "output head (wrong-labels, cut-reasoning, new-tokens)."
    yield ""
    yield (
        "| failure | cause | training loss: sound, broken | other measure: sound, broken | repair |"
    )
    yield "|---|---|---|---|---|"
    yield from lines
    yield ""


def _line(
    name: str, said: Mapping[str, tuple[str]], known: Mapping[tuple[str, str, str], str]
) -> str | None:
    """A row of the table; None where a run of it is not among the results."""
    entry = {key: line for key, (line,) in said.items()}
    experiment, measure, broken = (entry[key] for key in ("experiment", "measure", "broken"))
    cells = [
        known.get((experiment, entry[arm], what))
        for arm, what in (
            ("sound", _LOSS),
            ("broken", _LOSS),
            ("before", measure),
            ("broken", measure),
            ("repaired", measure),
        )
    ]
    if None in cells:
        return None
    sound, loss, before, found, repaired = cells
    losses = (
        f"{loss} (the same run)"
        if entry["sound"] == broken
        else f"{sound} (*{entry['sound']}*), {loss}"
    )
    return (
        f"| {name} | {entry['cause']} ({experiment}: *{broken}*) | {losses} "
        f"| {measure}: {before} (*{entry['before']}*), {found} "
        f"| {entry['repair']}: {repaired} (*{entry['repaired']}*) |"
    )
