"""Drawing on the terminal: the command line's only way to print.

Everything from rows, models and files is untrusted: Rich markup is off and control characters are
shown, not sent.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from truetune.cli.live_screen import Stages, Steps
from truetune.data.split import HELD_OUT_FROM
from truetune.errors import BadRows, CheckFailed, TruetuneError
from truetune.findings import Finding, counted, labelled, merged, visible
from truetune.listener import Listener

if TYPE_CHECKING:  # an error that comes first needs neither
    from truetune.behaviour.steps import StepFacts
    from truetune.recipe.plan import Plan

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# Findings shown before the rest is only counted: about a screen.
_MOST = 12


class Screen(Listener):
    """The screen of a run: a live display on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(
            markup=False, highlight=False, emoji=False, soft_wrap=True, quiet=quiet
        )
        self.errors = Console(
            stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True
        )
        self.stages, self.steps = Stages(self.console), Steps(self.console)
        self._shown_findings = 0
        # How findings are worded: the functions of Python name arguments in place of options.
        self.spell: Callable[[str], str] = str

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line, with control characters escaped."""
        self.console.print(Text(visible(text), style=style))

    def pairs(self, rows: Sequence[tuple[str, str]], *, folded: bool = False) -> None:
        """Names and values in two columns.

        Args:
            folded: long values are folded in their column; lines to be copied are not.
        """
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            head, indent = f"  {visible(name):<{width}}  ", " " * (width + 4)
            first, *rest = _folded(self.console, head + visible(value), indent if folded else "")
            text = Text(head, style="dim")
            text.append(first[len(head) :], style="not dim")
            self.console.print(text)
            for line in rest:
                self.console.print(Text(line))

    def close(self) -> None:
        """End the live display."""
        self.stages.end()
        self.steps.end()

    # what a run tells

    def stage(self, name: str) -> None:
        self.steps.end()
        self.stages.begin(name)

    def progress(self, done: int, total: int | None) -> None:
        self.stages.progress(done, total)

    def finding(self, finding: Finding) -> None:
        self._shown_findings += 1
        if self._shown_findings == _MOST + 1:
            self.line("  more findings are in the run's findings.jsonl", "dim")
        if self._shown_findings > _MOST:
            return
        self.show(finding)

    def show(self, finding: Finding) -> None:
        """Show a finding with all its parts."""
        self._print_finding(self.console, finding)

    def planned(self, plan: Plan, facts: dict[str, Any]) -> None:
        self.stages.end()
        data = facts["data"]
        trained, held = data["train"], data["held_out"]
        share = 100 * facts["trainable_parameters"] / max(facts["parameters"], 1)
        length = "epochs" if plan.epochs else "max_steps"
        self.pairs(
            [
                ("model", f"{plan.model} ({plan.start})"),
                (
                    "rows",
                    f"{trained['examples']:,} for training, {held_out(trained, held)}, "
                    f"{len(data['dropped']):,} dropped; schema {data['schema']}",
                ),
                (
                    "tokens",
                    f"{trained['tokens']:,}, {trained['supervised_tokens']:,} of them supervised; "
                    f"longest example {trained['longest']:,} (limit {plan.max_length:,})",
                ),
                *_lengths(data),
                (
                    "method",
                    f"{plan.method}: "
                    f"{facts['trainable_parameters']:,} of {facts['parameters']:,} parameters "
                    f"({share:.2f} %)",
                ),
                ("batch", _batch(plan, facts["route"])),
                (
                    "steps",
                    f"{plan.max_steps:,}, {plan.warmup_steps} of them for warm-up "
                    f"({plan.origin(length)})",
                ),
                (
                    "learning rate",
                    f"{plan.learning_rate:g} ({plan.origin('learning_rate')})",
                ),
                *((c["name"], f"{c['value']} ({c['reason']})") for c in facts["choices"]),
            ],
            folded=True,
        )

    def step(self, facts: StepFacts, plan: Plan) -> None:
        self.stages.end()
        self.steps.step(facts, plan.max_steps)

    def evaluated(self, step: int, loss: float) -> None:
        self.steps.evaluated(step, loss)

    def sample(self, sample: dict[str, Any]) -> None:
        self.steps.sampled(sample)

    # errors and findings

    def _print_finding(self, console: Console, finding: Finding) -> None:
        head, *rest = map(self.spell, finding.lines())
        for line in _folded(console, visible(head), " " * 9):
            console.print(Text(line, style=_COLOURS[finding.level]))
        for line in rest:
            # What is to be typed stays in one piece.
            indent = "" if line.startswith("  fix") else " " * 9
            for part in _folded(console, visible(line), indent):
                console.print(Text(part))

    def error(self, error: TruetuneError) -> None:
        """Show an error, with the findings that caused it."""
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


def _folded(console: Console, text: str, indent: str) -> list[str]:
    """Lines that fit a terminal, folded between words; a pipe, and no indent, take them whole."""
    if not console.is_terminal or not indent:
        return [text]
    return [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(
            part,
            console.width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
        or [""]
    ]


def held_out(trained: dict[str, Any], held: dict[str, Any]) -> str:
    """How many rows are held out; of few rows why none are."""
    few = not held["examples"] and trained["examples"] < HELD_OUT_FROM
    return f"{held['examples']:,} held out" + (
        f" (fewer than {HELD_OUT_FROM} rows; pass your own with --eval-data)" if few else ""
    )


def _lengths(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What a length limit would cost, if there is reasoning to lose: neither the closing marker
    nor the answer is left."""
    from truetune.checks.lengths import report_lines

    report = data.get("lengths")
    return report_lines(report) if report and report["limit"]["with_thoughts"] else []


def _batch(plan: Plan, route: dict[str, Any]) -> str:
    """Describe how a step is divided into forward passes."""
    size, at_once = plan.batch_size, plan.micro_batch_size
    number = counted(size, "example") if size else f"up to {plan.tokens_per_step:,} tokens"
    step = f"{number} per step"
    if route["kind"] == "apart":
        return f"{step}, one at a time"
    if route["kind"] == "packed":
        cut = (
            f"{counted(at_once, 'example')} or "
            if at_once and at_once < (size or at_once + 1)
            else ""
        )
        return f"{step}, packed to {cut}{route['micro_batch_tokens']:,} tokens per forward pass"
    if not size or not at_once:
        return f"{step}, {at_once} at a time"
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
