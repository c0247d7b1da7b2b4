"""The step that is saved is the one whose held-out loss was lowest, and a run stops waiting for a
lower one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tiny_models import write_model
from tiny_runs import command, lines, write_rows
from truetune.listener import Listener
from truetune.recipe.sources import make_recipe
from truetune.run.pipeline import train
from truetune.run_dir import RunDir

STEPS = 40


class Killed(Exception):
    """The process is gone."""


class Killer(Listener):
    """Ends the process, as it were, behind the evaluation of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def evaluated(self, step: int, loss: float) -> None:
        if step == self.at:
            raise Killed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that say nothing about their answers: what is learned by heart of the trained ones
    makes the held-out ones worse."""
    folder = tmp_path_factory.mktemp("patience")
    write_model(folder / "tiny")
    rng = random.Random(0)
    rows = [
        {"prompt": f"{rng.randrange(10**4)}?", "completion": str(rng.randrange(10**6))}
        for _ in range(56)
    ]
    write_rows(folder / "train.jsonl", rows[:24])
    write_rows(folder / "held.jsonl", rows[24:])
    return folder


def settings(place: Path, output: Path, **more: Any) -> dict[str, Any]:
    given = {
        "model": str(place / "tiny"),
        "data": str(place / "train.jsonl"),
        "eval_data": str(place / "held.jsonl"),
        "output": str(output),
        "max_steps": STEPS,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "eval_steps": 2,
        "save_steps": 4,
        "save_total_limit": 1,
        "patience": 3,
    }
    return given | more


def trained(place: Path, output: Path, listener: Listener | None = None, **more: Any) -> RunDir:
    return train(make_recipe(("test", settings(place, output, **more))), listener).run


@pytest.fixture(scope="module")
def run(place: Path) -> RunDir:
    return trained(place, place / "run")


def held_out(run: RunDir) -> dict[int, float]:
    return {v["step"]: v["eval_loss"] for v in lines(run.file("metrics.jsonl")) if "eval_loss" in v}


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_a_run_stops_waiting_and_saves_its_best_step(run: RunDir) -> None:
    losses = held_out(run)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert max(losses) == best + 3 * 2 < STEPS
    manifest = json.loads(run.file("manifest.json").read_text())
    assert (manifest["steps"], manifest["eval_loss"]) == (best, losses[best])
    assert manifest["verified"] is True
    artifact = run.artifact()
    assert artifact
    kept = weights(run.checkpoint_path(best))
    for name, tensor in weights(artifact).items():
        assert tensor.equal(kept[name].to(tensor.dtype)), name
    (note,) = [f for f in lines(run.file("findings.jsonl")) if f["code"] == "best-step-saved"]
    assert "held-out-rising" not in {f["code"] for f in lines(run.file("findings.jsonl"))}
    page = run.file("report.html").read_text(encoding="utf-8")
    assert "<p>The model of step" in page.partition("<h2>")[0]
    assert f"step {best}" in note["what"]


def test_a_killed_one_saves_the_same(place: Path, run: RunDir, tmp_path: Path) -> None:
    at = max(held_out(run)) - 2
    with pytest.raises(Killed):
        trained(place, tmp_path / "run", Killer(at))
    assert command("train", "--resume", tmp_path / "run").code == 0
    again = RunDir(tmp_path / "run")
    assert held_out(again) == held_out(run)
    one, other = again.artifact(), run.artifact()
    assert one
    assert other
    name = "model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_whose_last_step_is_best_saves_that(place: Path, tmp_path: Path) -> None:
    run = trained(place, tmp_path / "run", max_steps=6, learning_rate=1e-3)
    losses = held_out(run)
    assert min(losses, key=lambda step: losses[step]) == 6
    assert json.loads(run.file("manifest.json").read_text())["steps"] == 6
    assert not [f for f in lines(run.file("findings.jsonl")) if f["code"] == "best-step-saved"]


def test_without_held_out_rows_it_is_refused(place: Path, tmp_path: Path) -> None:
    shown = command(
        *("train", place / "tiny", place / "train.jsonl", "-o", tmp_path / "run"),
        *("--patience", 2),
    )
    assert shown.code == 2
    assert "patience-without-rows" in shown.err
    assert not (tmp_path / "run").exists()
