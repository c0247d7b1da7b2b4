"""Drawing on the terminal: the command line's only way to print.

Everything from rows, models and files is untrusted: Rich markup is off and control characters are
shown, not sent.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from truetune.errors import BadRows, CheckFailed, TruetuneError
from truetune.findings import Finding, labelled, merged
from truetune.health import StepFacts
from truetune.listener import Listener
from truetune.plan import Plan

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# Findings shown before the rest is only counted: about a screen.
_MOST = 12


def visible(text: str, *, keep_newlines: bool = True) -> str:
    """Control, format and direction characters as escapes; line breaks and tabs stay on demand."""
    return "".join(
        char
        if (char in "\n\t" and keep_newlines)
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


class Screen(Listener):
    """A run, drawn: progress bars on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(
            markup=False, highlight=False, emoji=False, soft_wrap=True, quiet=quiet
        )
        self.errors = Console(
            stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True
        )
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._shown_findings = 0
        self._speed = 0.0
        self._last_line = 0

    def line(self, text: str = "", style: str = "") -> None:
        """A line, made harmless."""
        self.console.print(Text(visible(text), style=style))

    def pairs(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values in two columns."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            text = Text(f"  {visible(name):<{width}}  ", style="dim")
            text.append(visible(value), style="not dim")
            self.console.print(text)

    def close(self) -> None:
        """Take the progress bar away."""
        if self._progress:
            self._progress.stop()
        self._progress, self._task = None, None

    # what a run tells

    def stage(self, name: str) -> None:
        self.close()
        self._stage = name

    def progress(self, done: int, total: int | None) -> None:
        if not self.console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._stage, total=total)
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total)

    def finding(self, finding: Finding) -> None:
        self._shown_findings += 1
        if self._shown_findings == _MOST + 1:
            self.line("  more findings are in findings.jsonl of the run", "dim")
        if self._shown_findings > _MOST:
            return
        self.show(finding)

    def show(self, finding: Finding) -> None:
        """One finding, in full."""
        self._print_finding(self.console, finding)

    def planned(self, plan: Plan, facts: dict[str, Any]) -> None:
        self.close()
        recipe, data = plan.recipe, facts["data"]
        trained, held = data["train"], data["held_out"]
        share = 100 * facts["trainable_parameters"] / max(facts["parameters"], 1)
        length = "epochs" if plan.epochs else "max_steps"
        self.pairs(
            [
                ("model", f"{recipe.model} ({plan.start})"),
                (
                    "rows",
                    f"{trained['examples']:,} to train, {held['examples']:,} held out, "
                    f"{len(data['dropped']):,} dropped; schema {data['schema']}",
                ),
                (
                    "tokens",
                    f"{trained['tokens']:,}, of them {trained['supervised_tokens']:,} supervised; "
                    f"longest row {trained['longest']:,} of {plan.max_length:,}",
                ),
                *_lengths(data),
                (
                    "method",
                    f"{recipe.method}: "
                    f"{facts['trainable_parameters']:,} of {facts['parameters']:,} parameters "
                    f"({share:.2f} %)",
                ),
                ("batch", _batch(plan, facts["route"])),
                (
                    "steps",
                    f"{plan.max_steps:,}, {plan.warmup_steps} of them warm-up "
                    f"({recipe.origin(length)})",
                ),
                (
                    "learning rate",
                    f"{plan.learning_rate:g} ({recipe.origin('learning_rate')})",
                ),
                *((c["name"], f"{c['value']} ({c['reason']})") for c in facts["choices"]),
            ]
        )

    def step(self, facts: StepFacts, plan: Plan) -> None:
        seconds = max(facts.seconds, 1e-9)
        now = facts.num_supervised / seconds
        self._speed = now if not self._speed else 0.9 * self._speed + 0.1 * now
        text = f"loss {facts.loss:6.3f}  {self._speed:7,.0f} supervised tokens/s"
        if not self.console.is_terminal:
            self._plain_step(facts, plan, text)
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("step", markup=False),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                TextColumn("ETA", markup=False),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(text, total=plan.max_steps, completed=facts.step)
        assert self._task is not None
        self._progress.update(self._task, completed=facts.step, description=text)

    def _plain_step(self, facts: StepFacts, plan: Plan, text: str) -> None:
        """About twelve lines a run where nothing can be redrawn."""
        every = max(plan.max_steps // 12, 1)
        if facts.step == 1 or facts.step % every == 0 or facts.step == plan.max_steps:
            self.line(f"step {facts.step:>5}/{plan.max_steps}  {text}")

    def evaluated(self, step: int, loss: float) -> None:
        self.line(f"step {step:>5}  held-out loss {loss:.4f}")

    # errors and findings

    def _print_finding(self, console: Console, finding: Finding) -> None:
        head, *rest = finding.lines()
        console.print(Text(visible(head), style=_COLOURS[finding.level]))
        for line in rest:
            console.print(Text(visible(line)))

    def error(self, error: TruetuneError) -> None:
        """An error, with the findings behind it."""
        self.close()
        if isinstance(error, BadRows | CheckFailed):
            found = merged(error.findings)
            for finding in found[:_MOST]:
                self._print_finding(self.errors, finding)
            if len(found) > _MOST:
                self.errors.print(Text(f"and {len(found) - _MOST} more findings"))
        head = Text(visible(f"error[{error.code}]: {error.what}"), style=_COLOURS["error"])
        self.errors.print(head)
        for line in labelled(error.parts()):
            self.errors.print(Text(visible(line)))


def _lengths(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What a length limit would cost, where there is reasoning to lose."""
    from truetune.check.lengths import report_lines

    return report_lines(data["lengths"]) if "lengths" in data else []


def _batch(plan: Plan, route: dict[str, Any]) -> str:
    """How a step is cut."""
    size, at_once = plan.batch_size, plan.micro_batch_size
    step = f"{size} rows a step" if size else f"up to {plan.tokens_per_step:,} tokens a step"
    if route["kind"] == "apart":
        return f"{step}, one at a time"
    if route["kind"] == "packed":
        cut = f"{at_once} rows or " if at_once and at_once < (size or at_once + 1) else ""
        return f"{step}, packed to {cut}{route['micro_batch_tokens']:,} tokens a forward pass"
    if not size or not at_once:
        return f"{step}, {at_once} rows at a time"
    passes = -(-size // at_once)
    return f"{step}, {at_once} at a time ({passes} forward pass{'es' if passes > 1 else ''})"


def side_by_side(screen: Screen, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for column in columns:
        head = Text(visible(column, keep_newlines=False), style="bold")
        table.add_column(head, overflow="fold", ratio=1)
    for row in rows:
        table.add_row(*(Text(visible(cell, keep_newlines=False)) for cell in row))
    Console(
        file=sys.stdout,
        markup=False,
        highlight=False,
        emoji=False,
        quiet=screen.console.quiet,
        width=None if screen.console.is_terminal else 110,
    ).print(table)
