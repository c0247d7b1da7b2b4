"""What moves while a run works: on a terminal of 80 columns, and in a pipe."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from tiny_runs import command
from truetune.behaviour.steps import StepFacts
from truetune.cli import live_screen
from truetune.cli.live_screen import Stages, Steps, clock, sparkline


class Clock:
    """A time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(live_screen, "time", made)
    return made


def console(terminal: bool, **other: Any) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=80, **other), out


def facts(step: int, seconds: float = 2.0) -> StepFacts:
    return StepFacts(step, 1.25, 9.8e-5, 0.5, 4000, 1000, seconds, (0,))


def bare(text: str) -> str:
    """Without the codes that move the cursor or colour."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_clock() -> None:
    assert [clock(s) for s in (0, 67.9, 3723)] == ["0:00", "1:07", "1:02:03"]


def test_a_pipe_gets_a_line_a_stage_with_the_time_since_the_start(time: Clock) -> None:
    shown, out = console(False)
    stages = Stages(shown)
    stages.begin("reading the rows")
    stages.progress(5, 10)
    time.now = 75
    stages.begin("loading the weights")
    stages.end()
    assert out.getvalue() == "   0:00  reading the rows\n   1:15  loading the weights\n"


def test_a_terminal_shows_the_stage_and_keeps_the_time_of_a_long_one() -> None:
    shown, out = console(True)
    stages = Stages(shown)
    stages.begin("loading the weights")
    stages.progress(512, 1024)
    stages._since -= 61
    stages.end()
    assert re.search(r"loading the weights: 1:\d\d", bare(out.getvalue()))


def test_a_pipe_gets_a_row_of_steps_each_few_seconds(time: Clock) -> None:
    shown, out = console(False)
    steps = Steps(shown)
    for step in range(1, 101):
        time.now = 2.0 * step
        steps.step(facts(step), 100)
        if step == 50:
            steps.evaluated(50, 1.5)
    head, *rows = out.getvalue().splitlines()
    assert head.split() == [
        *("step", "%", "loss", "rate", "tokens/s", "supervised", "memory", "time", "left")
    ]
    assert max(map(len, [head, *rows])) <= 80
    assert "step    50  held-out loss 1.5000" in rows
    told = [row.split() for row in rows if "held-out" not in row]
    assert [row[0] for row in told][:3] == ["1/100", "4/100", "7/100"]
    assert told[-1][0] == "100/100"
    assert all(len(head.split()) <= len(row) for row in told)
    # All tokens, and the supervised ones; two seconds a step; what is left is what will be.
    half = next(row for row in told if row[0] == "49/100")
    assert half[1:6] == ["49%", "1.250", "9.80e-05", "2,000", "500"]
    assert half[-2:] == ["1:38", "1:42"]


def test_what_is_left_after_a_run_went_back_is_reckoned_anew(time: Clock) -> None:
    shown, out = console(False)
    steps = Steps(shown)
    for step in (1, 2, 3, 4, 1, 2, 3):
        time.now += 10
        steps.step(facts(step, seconds=10.0), 5)
    rows = out.getvalue().splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1/5", "2/5", "3/5", "4/5", "1/5", "2/5", "3/5"]
    left = ["0:40", "0:30", "0:20", "0:10", "0:40", "0:30", "0:20"]
    assert [row.split()[-1] for row in rows] == left
    # The time since the start goes on.
    assert [row.split()[-2] for row in rows][-1] == "1:10"


def test_many_steps_fit_too(time: Clock) -> None:
    shown, out = console(False)
    steps = Steps(shown)
    steps.step(facts(9999), 10_000)
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_terminal_of_80_columns_holds_all_of_it() -> None:
    shown, out = console(True)
    steps = Steps(shown)
    for step in range(1, 4):
        steps.step(facts(step), 3)
        steps.evaluated(step, 1.5)
    steps.end()
    text = bare(out.getvalue())
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80
    last = text[text.rindex("step") :]
    for part in ("3/3", "100 %", "0:00 left", "loss 1.250", "held-out 1.500", "9.80e-05"):
        assert part in text, part
    assert "2,000 tokens/s, 500 of them supervised" in text
    assert "memory" in last


def test_the_loss_as_bars() -> None:
    assert sparkline([4.0, 3.0, 2.0, 1.0], 20) == "\u2588\u2586\u2583\u2581"
    assert len(sparkline([float(i) for i in range(1000)], 20)) == 20
    assert sparkline([1.0, float("nan"), 2.0], 20) == "\u2581\u2588"
    assert sparkline([1.0, 1.0], 20) == ""
    assert sparkline([], 20) == ""


def test_a_terminal_shows_the_last_reply_on_one_harmless_line() -> None:
    shown, out = console(True)
    steps = Steps(shown)
    evil = "\x1b[31mred\nand " + "on and " * 200
    for step in range(1, 5):
        steps.sampled(
            {
                "messages": [{"role": "user", "content": "2+2? " * 40}],
                "answer": evil,
                "stopped": False,
            }
        )
        steps.step(StepFacts(step, 5.0 - step, 1e-4, 0.5, 4000, 1000, 2.0, (0,)), 4)
    steps.end()
    text = bare(out.getvalue())
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80
    assert "2+2? 2+2?" in text
    assert "\u2192 \\x1b[31mred and on" in text
    assert "\u2026 (not ended)" in text
    assert "loss 1.000 \u2588" in text
    steps.sampled({"messages": [], "answer": "4", "stopped": True})
    assert steps._reply == " \u2192 4"


def test_a_terminal_without_such_letters_gets_none_of_them() -> None:
    shown = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace"),
        force_terminal=True,
        width=80,
    )
    steps = Steps(shown)
    for step in range(1, 4):
        steps.step(StepFacts(step, 5.0 - step, 1e-4, 0.5, 4000, 1000, 2.0, (0,)), 4)
    assert steps._bar is not None
    assert "\u2588" not in steps._bar.below
    steps.end()


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown, out = console(True)
    steps = Steps(shown)
    steps.step(facts(1), 2)
    steps.end()
    assert not re.search(r"\x1b\[(\d+;)*(3[0-7]|9[0-7]|38;)", out.getvalue())


# Help and completion.


def test_help_begins_with_what_most_runs_set() -> None:
    shown = command("train", "--help").out
    most = shown.partition("Most used:")[2].partition("Input:")[0]
    named = re.findall(r"^  (?:-o, )?--([a-z-]+)", most, re.MULTILINE)
    assert named == [
        *("output", "lora", "qlora", "learning-rate", "epochs", "batch-size", "max-length"),
        *("eval-data", "bad-rows", "overwrite"),
    ]
    # Each once.
    assert shown.count("--learning-rate ") == 2  # the option, and the example


def test_a_switch_that_is_on_says_yes() -> None:
    shown = " ".join(command("train", "--help").out.split())
    assert "--no-packing pads. (default: yes)" in shown


def test_a_shell_completes_verbs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "truetune"],
        env={
            "_TRUETUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": "truetune qu",
            "COMP_CWORD": "1",
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["quickstart"], done.stderr
