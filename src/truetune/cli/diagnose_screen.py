"""The screen of `truetune diagnose`: one line per stage, then the first that differs."""

from __future__ import annotations

from typing import Any

from truetune.cli.screen import Screen
from truetune.diagnosis.diagnose import Diagnosis
from truetune.diagnosis.folder import UNCOMPARED
from truetune.diagnosis.measured import Stage


def show_diagnosis(screen: Screen, found: Diagnosis) -> None:
    """Show the stages, the findings and the verdict."""
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
        for line in _compared(found):
            screen.line(line)
        return
    error = next(finding for finding in first.findings if finding.level == "error")
    screen.line(f"the first stage that differs: {first.name}", "red")
    if error.why:
        screen.line(f"  likely cause  {error.why.splitlines()[0]}")
    screen.line(f"  fix           {error.fix}")


def _compared(found: Diagnosis) -> list[str]:
    """Say what was compared if no stage differs, and what that does not prove."""
    alone = [stage.note for stage in found.stages if stage.note.startswith("alone")]
    if alone:
        return alone
    made = [s for s in found.stages if s.name in ("merged", "quantised", "gguf", "url")]
    if not made:
        own = [stage for stage in found.stages if stage.name != "base"]
        first = "the model matches the record of its run" if own else "only the base was examined"
        return [f"no stage differs: {first}; compare exports with --merged, --gguf or --url"]
    files = [stage.name for stage in made if stage.name != "url"]
    lines = []
    if files:
        last = "predictions" if any(s.note == UNCOMPARED for s in made) else "tensors"
        lines.append(
            f"no stage differs: prompts, token ids, stop tokens, settings and {last} of "
            f"{' and '.join(files)} are those of the trained model, within the rounding of their "
            "types"
        )
    if len(files) < len(made):
        differ = any(finding.code == "replies-differ" for finding in made[-1].findings)
        lines.append(
            (
                "the server's replies differ from the trained model's, but they end, and known "
                "answers are correct about as often (the 95 % intervals overlap)"
                if differ
                else "the server's replies do not differ from the trained model's"
            )
            + (f" ({made[-1].note})" if made[-1].note else "")
        )
    for stage in made:
        same = stage.numbers.get("same_replies")
        if same is not None and same < 1 and stage.name != "url":
            lines.append(
                f"rounding changes greedy replies: {stage.name} gives "
                f"{100 * same:.0f} % of them word for word"
            )
        if stage.name != "url" and stage.note:
            lines.append(f"{stage.name}: {stage.note}")
    return lines


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
