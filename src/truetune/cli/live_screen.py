"""The live display of a run: stages with their durations and a progress bar of the steps; plain
lines in a pipe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from truetune.behaviour.steps import StepFacts
from truetune.findings import gib, visible
from truetune.reporting.facts import asked

# A stage that took less leaves no line on a terminal; a pipe gets a line of steps as often.
_WORTH_A_LINE, _EVERY = 2.0, 5.0
# The loss so far, in so many bars.
_SPARKS, _BARS = 20, "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
# Weight of the newest step in the shown speed.
_NEWEST = 0.1


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Elapsed(ProgressColumn):
    """The time of the stage, or of the steps."""

    def render(self, task: Task) -> Text:
        return Text(clock(task.elapsed or 0))


class Stages:
    """The current stage: an animated line on a terminal, one line per stage in a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()
        self._name, self._since = "", self._began
        self._drawn: Progress | None = None
        self._task = TaskID(0)
        self._has_bar = False

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._since = name, time.monotonic()
        if self.console.is_terminal:
            self._draw(TextColumn("{task.description}", markup=False), _Elapsed())
        else:
            self.console.print(Text(f"{clock(self._since - self._began):>7}  {name}"))

    def progress(self, done: int, total: int | None) -> None:
        if not self.console.is_terminal or not self._name:
            return
        if not self._has_bar and total:
            self._draw(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _Elapsed(),
            )
            self._has_bar = True
        if self._drawn:
            self._drawn.update(self._task, completed=done, total=total)

    def end(self) -> None:
        """Remove the line; the duration of a long stage stays on the screen."""
        if self._drawn:
            self._drawn.stop()
            took = time.monotonic() - self._since
            if took >= _WORTH_A_LINE:
                self.console.print(Text(f"  {self._name}: {clock(took)}", style="dim"))
        self._drawn, self._name, self._has_bar = None, "", False

    def _draw(self, *columns: ProgressColumn) -> None:
        if self._drawn:
            self._drawn.stop()
        drawn = Progress(SpinnerColumn(), *columns, console=self.console, transient=True)
        self._task = drawn.add_task(self._name, total=None)
        # The time of the stage, also where a bar comes later.
        drawn.tasks[0].start_time = drawn.get_time() - (time.monotonic() - self._since)
        drawn.start()
        self._drawn = drawn


class _Bar(Progress):
    """A bar over lines of text."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.below)


class Steps:
    """The optimizer steps: a bar on a terminal, a table in a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._tokens = self._supervised = 0.0
        self._held_out: float | None = None
        self._losses: list[float] = []
        self._reply = ""
        self._first: tuple[int, float, float] | None = None
        self._last = 0
        self._shown = -_EVERY

    def step(self, facts: StepFacts, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = facts.step, now, now - facts.seconds
            if not self.console.is_terminal:
                self.console.print(Text(_heads(total)))
        elif facts.step <= self._last:
            # The run went back: what was trained before says nothing of the time that is left.
            self._first = facts.step, now, self._first[2]
            self._losses.clear()
        self._last = facts.step
        self._measure(facts)
        self._losses.append(facts.loss)
        if self.console.is_terminal:
            self._draw(facts, total, now)
        elif facts.step in (1, total) or now - self._shown >= _EVERY:
            self._shown = now
            self.console.print(Text(self._row(facts, total, now)))

    def evaluated(self, step: int, loss: float) -> None:
        self._held_out = loss
        self.console.print(Text(f"step {step:>5}  held-out loss {loss:.4f}"))

    def sampled(self, sample: Mapping[str, Any]) -> None:
        """Keep the last reply to a held-out prompt, on one line."""
        parts = [" ".join(str(t or "").split()) for t in (asked(sample), sample.get("answer"))]
        question, answer = (visible(text[:400], keep_newlines=False) for text in parts)
        ended = "" if sample.get("stopped") else " (not ended)"
        self._reply = f"{_cut(question, self.console.width // 3)} \u2192 "
        room = self.console.width - len(self._reply) - len(ended) - 1
        self._reply += _cut(answer, room) + ended

    def end(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = None

    def _measure(self, facts: StepFacts) -> None:
        seconds = max(facts.seconds, 1e-9)
        for name, count in (("_tokens", facts.num_tokens), ("_supervised", facts.num_supervised)):
            before = getattr(self, name)
            speed = count / seconds
            setattr(self, name, (1 - _NEWEST) * before + _NEWEST * speed if before else speed)

    def left(self, facts: StepFacts, total: int, now: float) -> float:
        """Seconds to the last step: by the time between the steps so far, in which evaluations
        and checkpoints have their share; of the first step by its own time."""
        assert self._first
        step, at, _ = self._first
        each = (now - at) / (facts.step - step) if facts.step > step else facts.seconds
        return each * (total - facts.step)

    def _times(self, facts: StepFacts, total: int, now: float) -> tuple[str, str]:
        assert self._first
        return clock(now - self._first[2]), clock(self.left(facts, total, now) + 0.5)

    def _row(self, facts: StepFacts, total: int, now: float) -> str:
        elapsed, left = self._times(facts, total, now)
        return (
            f"{f'{facts.step}/{total}':>{_width(total)}} {100 * facts.step // total:>3}% "
            f"{facts.loss:>7.3f} {facts.learning_rate:>8.2e} {self._tokens:>8,.0f} "
            f"{self._supervised:>10,.0f} {_memory():>8} {elapsed:>7} {left:>7}"
        )

    def _draw(self, facts: StepFacts, total: int, now: float) -> None:
        if self._bar is None:
            self._bar = _Bar(
                TextColumn("step", markup=False),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %", markup=False),
                _Elapsed(),
                TextColumn("{task.description}", markup=False),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total)
            assert self._first
            self._bar.tasks[0].start_time = self._bar.get_time() - (now - self._first[2])
            self._bar.start()
        held = "" if self._held_out is None else f"   held-out {self._held_out:.3f}"
        drawn = sparkline(self._losses, _SPARKS) if "utf" in self.console.encoding else ""
        self._bar.below = (
            f"loss {facts.loss:.3f} {drawn}{held}   learning rate {facts.learning_rate:.2e}\n"
            f"{self._tokens:,.0f} tokens/s, {self._supervised:,.0f} of them supervised   "
            f"memory {_memory()} at most" + (f"\n{self._reply}" if self._reply else "")
        )
        left = f"{self._times(facts, total, now)[1]} left"
        self._bar.update(self._task, completed=facts.step, description=left)


def sparkline(values: Sequence[float], most: int) -> str:
    """Values as bars of eight heights, each the mean of a stretch; none where all are equal."""
    finite = [value for value in values if math.isfinite(value)]
    size = -(-len(finite) // most) or 1
    means = [sum(part := finite[at : at + size]) / len(part) for at in range(0, len(finite), size)]
    low, high = min(means, default=0), max(means, default=0)
    if low == high:
        return ""
    return "".join(_BARS[round(7 * (mean - low) / (high - low))] for mean in means)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(most - 1, 0)].rstrip() + "\u2026"


def _heads(total: int) -> str:
    """Of the columns of a row."""
    return (
        f"{'step':>{_width(total)}}    % {'loss':>7} {'rate':>8} {'tokens/s':>8} "
        f"{'supervised':>10} {'memory':>8} {'time':>7} {'left':>7}"
    )


def _width(total: int) -> int:
    return max(2 * len(str(total)) + 1, 9)


def _memory() -> str:
    from truetune.engine.memory import peak_bytes  # which an error that comes first does not need

    return gib(peak_bytes())
