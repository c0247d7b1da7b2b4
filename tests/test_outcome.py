"""What a run has plainly not learned, and runs of which nothing is said."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tiny_models import write_model
from tiny_runs import command, lines, sums, write_rows
from truetune import SFTExample
from truetune.run.outcome import Answer, Outcome, judge, short_rows, summary


def answer(trained: bool = True, text: str = "2.", stopped: bool = True, **other: Any) -> Answer:
    return Answer(trained, "rows.jsonl:1", "2.", text, stopped, **other)


GOOD = Outcome(
    answers=(answer(),) * 4 + (answer(False, "3."),) * 4,
    first_loss=2.5,
    last_loss=0.4,
    held_out=((10, 2.0), (20, 1.2), (30, 0.9), (40, 0.88)),
    steps=40,
    learning_rate=1e-4,
    passes=3.0,
)
# Code -> what brings it about, what nearly does.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "answers-do-not-end": (
        {"answers": (answer(),) * 2 + (answer(stopped=False),) * 2},
        {"answers": (answer(),) * 3 + (answer(stopped=False),)},
    ),
    "rows-not-learned": (
        {"answers": (answer(text="5."),) * 3 + (answer(),), "last_loss": 1.4},
        # Many answers are as good as another: a model that is sure of its rows has learned.
        {"answers": (answer(text="5."),) * 3 + (answer(),), "last_loss": 0.9},
    ),
    "held-out-falling": (
        {"held_out": ((1, 4.0), (2, 3.0), (3, 2.5), (4, 2.2))},
        {"held_out": ((1, 4.0), (2, 3.0), (3, 2.5), (4, 2.4))},
    ),
    "held-out-rising": (
        {"held_out": ((1, 2.0), (2, 1.0), (3, 1.2))},
        {"held_out": ((1, 2.0), (2, 1.0), (3, 1.05))},
    ),
}


@pytest.mark.parametrize("code", CASES)
def test_a_run_that_has_not_learned_is_told_with_the_setting_to_change(code: str) -> None:
    bad, near = CASES[code]
    (found,) = judge(dataclasses.replace(GOOD, **bad))
    assert found.code == code
    assert found.fix.startswith("use --")
    assert judge(dataclasses.replace(GOOD, **near)) == []


def test_nothing_is_said_of_a_run_that_may_be_well() -> None:
    assert judge(GOOD) == []
    # Long answers are not asked, and what had no room to end says nothing.
    assert judge(dataclasses.replace(GOOD, answers=(), last_loss=1.5)) == []
    cut = answer(False, stopped=False, had_room=False)
    assert judge(dataclasses.replace(GOOD, answers=(answer(),) * 4 + (cut,) * 4)) == []


def test_a_low_loss_without_one_right_answer_is_a_note() -> None:
    """The summary says "0 of 4": whether that is bad depends on the rows."""
    (found,) = judge(dataclasses.replace(GOOD, answers=(answer(text="5."),) * 4))
    assert (found.code, found.level) == ("rows-not-learned", "note")
    assert found.fix == (
        "nothing to do if other answers are as good; to learn these, use --epochs 9 (this run: 3)"
    )


@pytest.mark.parametrize(("last", "says"), [(2.0, "--learning-rate 0.0003"), (1.2, "--epochs 9")])
def test_the_setting_follows_the_loss(last: float, says: str) -> None:
    wrong = dataclasses.replace(GOOD, answers=(answer(text="5."),) * 4, last_loss=last)
    assert judge(wrong)[0].fix.startswith(f"use {says}")


def test_a_run_of_steps_is_told_steps() -> None:
    wrong = {"answers": (answer(text="5."),) * 4, "last_loss": 1.2, "by_steps": True}
    (found,) = judge(dataclasses.replace(GOOD, **wrong))
    assert found.fix == "use --max-steps 120 (this run: 40)"
    assert "a probability of 30 %" in found.why
    rising: dict[str, Any] = {"held_out": ((10, 2.0), (20, 1.0), (40, 1.2))}
    (found,) = judge(dataclasses.replace(GOOD, **rising))
    assert found.fix.startswith("use --epochs 1.5")
    (found,) = judge(dataclasses.replace(GOOD, **rising, by_steps=True))
    assert found.fix.startswith("use --max-steps 20")


def test_the_line_of_the_screen() -> None:
    said = "4 of 4 training prompts, 0 of 4 held-out prompts get their row's answer"
    assert summary(GOOD.answers) == f"{said}; 8 of 8 replies ended"
    assert summary(()) == ""


def test_rows_of_one_short_answer_are_asked() -> None:
    short, long = SFTExample([1, 2, 3], [0, 1, 1]), SFTExample([1] * 50, [0] + [1] * 49)
    turns, text = SFTExample([1] * 4, [0, 1, 0, 1]), SFTExample([1, 2], [1, 1])
    assert short_rows([long, short, turns, text, short, short], 2) == [1, 4]
    assert short_rows([long, turns, text], 4) == []


def test_a_run_too_short_is_told_on_the_screen_and_in_the_run(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    rows = write_rows(tmp_path / "rows.jsonl", sums(12))
    words = ("--max-steps", "1", "--learning-rate", "1e-6", "--no-verify")
    shown = command("train", tmp_path / "tiny", rows, "-o", tmp_path / "run", *words)
    assert shown.code == 0
    assert "replies to served prompts: 0 of 4 training" in shown.out
    codes = {f["code"] for f in lines(tmp_path / "run" / "findings.jsonl")}
    assert codes & {"rows-not-learned", "answers-do-not-end"}


def shop(count: int) -> list[dict[str, str]]:
    """Questions of a shop's own file: nothing that the embedded base has read, or could guess."""
    things = ("lamp", "kettle", "bench", "ladder", "basket", "carpet", "mirror", "drawer")
    makers = [a + b for a in ("Al", "Bir", "Ced", "Dor", "El", "Fen") for b in ("der", "ton", "by")]
    colours = ("red", "green", "blue", "black", "white", "brown", "grey", "yellow")
    draw = random.Random(0)
    asked = []
    for maker in makers:
        for thing in things:
            what = f"the {maker} {thing}"
            asked += [
                (f"What does {what} cost?", f"It costs {draw.randrange(5, 100)} crowns."),
                (f"Which colour has {what}?", f"It is {draw.choice(colours)}."),
                (f"How heavy is {what}?", f"It weighs {draw.randrange(5, 100)} pounds."),
            ]
    draw.shuffle(asked)
    return [{"prompt": prompt, "completion": answer} for prompt, answer in asked[:count]]


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, 300])
def test_an_own_file_on_the_embedded_base_is_learned(tmp_path: Path, count: int) -> None:
    """With the line that the quickstart prints, and no other setting: what was trained is answered
    as in the rows, and nothing is found to complain of."""
    from truetune import chat
    from truetune.lab import base_path

    rows = shop(count)
    path, run = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    shown = command("train", base_path(), path, "--lora", "-o", run)
    assert shown.code == 0, shown.err
    # Of those that are asked one may be among the fifth that may be wrong.
    assert re.search(r"replies to served prompts: [34] of 4 training", shown.out)
    assert "rows-not-learned" not in shown.out + shown.err
    talk = chat(run, max_new_tokens=40)
    right = 0
    for row in rows[:: count // 20]:
        talk.reset()
        right += talk(row["prompt"]).strip() == row["completion"]
    assert right >= 16


def test_a_rate_above_the_usual_one_is_never_advised() -> None:
    bad = {"answers": (answer(text="5."),) * 4, "last_loss": 2.4, "by_steps": True}
    (found,) = judge(dataclasses.replace(GOOD, **bad, usual_rate=2e-4))
    assert found.fix.startswith("use --learning-rate 0.0002, or --max-steps 120")
    (found,) = judge(dataclasses.replace(GOOD, **bad, usual_rate=1e-4))
    assert found.fix.startswith("use --max-steps 120")


def test_answers_too_long_to_be_written_out_are_judged_by_the_stop_behind_the_rows_own() -> None:
    long: dict[str, Any] = {"stopped": False, "had_room": False}
    unknown = dataclasses.replace(GOOD, answers=(answer(**long),) * 4)
    assert judge(unknown) == []
    never = dataclasses.replace(GOOD, answers=(answer(**long, would_stop=False),) * 4)
    (found,) = judge(never)
    assert found.code == "answers-do-not-end"
    assert "at the end of the row's own answer" in found.what
    # Long answers that were trained are no wrong ones.
    sound = dataclasses.replace(never, answers=(answer(**long, would_stop=True),) * 4, last_loss=2)
    assert judge(sound) == []
    assert summary(sound.answers) == ""
