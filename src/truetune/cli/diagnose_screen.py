"""The screen of `truetune diagnose`: one line per stage, then the first that differs."""

from __future__ import annotations

from typing import Any

from truetune.cli.screen import Screen
from truetune.diagnosis.diagnose import Diagnosis
from truetune.diagnosis.measured import Stage


def show_diagnosis(screen: Screen, found: Diagnosis) -> None:
    """Draw the stages, findings and the verdict."""
    head = ("stage", "predictions", "replies", "stops", "match", "")
    rows = [head, *(_row(stage) for stage in found.stages)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    for row, stage in zip(rows, (None, *found.stages), strict=True):
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        style = "dim" if stage is None else "red" if stage.parts else ""
        screen.line(text.rstrip(), style)
    for stage in found.stages:
        for finding in stage.findings:
            screen.finding(finding)
    first = found.first
    if first is None:
        alone = [stage.note for stage in found.stages if stage.note.startswith("alone")]
        screen.line(alone[0] if alone else "no stage differs: what was trained is what is served")
        return
    error = next(finding for finding in first.findings if finding.level == "error")
    screen.line(f"the first stage that differs: {first.name}", "red")
    if error.why:
        screen.line(f"  likely cause  {error.why.splitlines()[0]}")
    screen.line(f"  fix           {error.fix}")


def _row(stage: Stage) -> tuple[str, ...]:
    numbers = stage.numbers
    apart = stage.apart
    predictions = f"{apart.mean:.2g} nats, {100 * apart.greedy:.0f} % equal" if apart else "-"
    same = numbers.get("same_replies")
    return (
        stage.name,
        predictions,
        f"{100 * same:.0f} % equal" if same is not None else "-",
        _share(numbers.get("stopped")),
        _share(numbers.get("match")),
        "differs" if stage.parts else "",
    )


def _share(value: Any) -> str:
    if not isinstance(value, dict):
        return "-"
    return f"{100 * value['share']:.0f} % ({100 * value['low']:.0f} to {100 * value['high']:.0f})"
