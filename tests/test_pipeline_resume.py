"""Runs that end before their end: killed, interrupted, out of disk. What is resumed equals what was
never stopped: the same metrics, the same samples, the same weights to the bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_models import write_model
from tiny_runs import Shown, command, lines, sums, write_rows
from truetune.behaviour.measure import Prober
from truetune.engine.checkpoint import read_facts
from truetune.errors import Interrupted, SaveError
from truetune.listener import Listener
from truetune.recipe.sources import make_recipe, recorded_recipe
from truetune.run.pipeline import train
from truetune.run_dir import RunDir
from truetune.system.signals import raised

STEPS = 6
# Saved and evaluated at other steps, but for step 4.
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch_size": 3,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "eval_steps": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": True, "lora_r": 4, "lora_dropout": 0.3},
}


class Killed(Exception):
    """Stands for the end of the process: nothing of the run may catch it."""


class Killer(Listener):
    """Ends the process at a step, or when something was saved."""

    def __init__(self, at: str) -> None:
        self.event, _, step = at.partition(" ")
        self.at = int(step)

    def step(self, facts: Any, plan: Any) -> None:
        self.hit("step", facts.step)

    def saved(self, path: str) -> None:
        if "step-" in path:
            self.hit("saved", int(path.rpartition("-")[2]))

    def evaluated(self, step: int, loss: float) -> None:
        self.hit("evaluated", step)

    def hit(self, event: str, step: int) -> None:
        if (event, step) == (self.event, self.at):
            raise Killed


class Stopper(Killer):
    """Sends a signal there instead: Ctrl-C, if nothing else is said."""

    def __init__(self, at: str, number: int = signal.SIGINT) -> None:
        super().__init__(at)
        self.number = number

    def saved(self, path: str) -> None:
        super().saved(path)
        if "step-" not in path:
            self.hit("artifact", 0)

    def stage(self, name: str) -> None:
        if name == "saving and reloading":
            self.hit("saving", 0)

    def hit(self, event: str, step: int) -> None:
        if (event, step) == (self.event, self.at):
            self.event = "sent"
            os.kill(os.getpid(), self.number)


class Place:
    """A model, rows, and runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "tiny")
        self.data = write_rows(folder / "rows.jsonl", sums(110))
        self.whole: dict[str, RunDir] = {}

    def settings(self, kind: str, output: Path) -> dict[str, Any]:
        paths = {"model": str(self.model), "data": str(self.data), "output": str(output)}
        return {**SETTINGS, **KINDS[kind], **paths}

    def start(self, kind: str, output: Path, listener: Listener | None = None) -> RunDir:
        return train(make_recipe(("test", self.settings(kind, output))), listener).run

    def uninterrupted(self, kind: str) -> RunDir:
        if kind not in self.whole:
            self.whole[kind] = self.start(kind, self.folder / f"whole-{kind}")
        return self.whole[kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("resume"))


def resume(path: Path) -> Shown:
    return command("train", "--resume", path)


def without_time(run: RunDir) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in lines(run.file("metrics.jsonl"))
    ]


def assert_same(run: RunDir, whole: RunDir, *, stopped: bool = False) -> None:
    """The same run; one that a signal stopped has a checkpoint of that step besides."""

    def files_of(run: RunDir) -> set[str]:
        files = set(json.loads(run.file("manifest.json").read_text())["files"])
        return {name for name in files if not (stopped and name.startswith("checkpoints/"))}

    assert run.finished
    assert without_time(run) == without_time(whole)
    assert lines(run.file("samples.jsonl")) == lines(whole.file("samples.jsonl"))
    artifact, wanted = run.artifact(), whole.artifact()
    assert artifact
    assert wanted
    (weights,) = artifact.glob("*.safetensors")
    assert weights.read_bytes() == (wanted / weights.name).read_bytes()
    assert files_of(run) == files_of(whole)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "at",
    [
        "step 1",  # before the first checkpoint: from the start
        "step 3",  # a step is lost
        "saved 4",  # the checkpoint is there, its step's evaluation is not
        "evaluated 4",  # the loss is written, the samples are not
        "step 6",  # all steps are done, the artifact is not there
        "evaluated 6",
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    place: Place, tmp_path: Path, kind: str, at: str
) -> None:
    with pytest.raises(Killed):
        place.start(kind, tmp_path / "run", Killer(at))
    run = RunDir(tmp_path / "run")
    assert not run.finished
    shown = resume(run.path)
    assert (shown.code, shown.err) == (0, "")
    assert_same(run, place.uninterrupted(kind))


def test_twice_killed(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        place.start("lora", tmp_path / "run", Killer("step 3"))
    with pytest.raises(Killed):
        train(
            recorded_recipe(tmp_path / "run" / "recipe.yaml"),
            Killer("step 5"),
            resume=tmp_path / "run",
        )
    assert resume(tmp_path / "run").code == 0
    assert_same(RunDir(tmp_path / "run"), place.uninterrupted("lora"))


def test_the_origins_of_settings_survive(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        place.start("full", tmp_path / "run", Killer("step 3"))
    recorded = (tmp_path / "run" / "recipe.yaml").read_text()
    assert resume(tmp_path / "run").code == 0
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recorded


def test_a_run_is_resumed_from_any_folder(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    settings = {**place.settings("full", tmp_path / "run"), "model": "tiny", "data": "rows.jsonl"}
    with pytest.raises(Killed):
        train(make_recipe(("test", settings)), Killer("step 3"))
    monkeypatch.chdir(tmp_path)
    assert resume(Path("run")).code == 0


def test_what_a_kill_in_the_middle_of_a_save_leaves_is_removed(
    place: Place, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        place.start("full", tmp_path / "run", Killer("step 5"))
    half = tmp_path / "run" / "checkpoints" / "..step-00000006.partial.partial-77"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    assert resume(tmp_path / "run").code == 0
    assert not half.exists()
    assert_same(RunDir(tmp_path / "run"), place.uninterrupted("full"))


KILL = """
import os, sys
from truetune.listener import Listener
from truetune.run.pipeline import train
from truetune.recipe.sources import make_recipe

class Kill(Listener):
    def step(self, facts, plan):
        if facts.step == 3:
            os._exit(9)

train(make_recipe(("test", eval(sys.argv[1]))), Kill())
"""


def test_a_process_that_is_really_killed(place: Place, tmp_path: Path) -> None:
    settings = place.settings("lora", tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", KILL, repr(settings)], timeout=120, check=False)
    assert done.returncode == 9
    assert resume(tmp_path / "run").code == 0
    assert_same(RunDir(tmp_path / "run"), place.uninterrupted("lora"))


# Ctrl-C.


def test_ctrl_c_saves_at_the_end_of_the_step(place: Place, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        place.start("lora", tmp_path / "run", Stopper("step 3"))
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.exit_code == 130
    assert f"truetune train --resume {tmp_path / 'run'}" in caught.value.fix
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000002", "step-00000003"]
    assert not run.finished
    assert resume(run.path).code == 0
    assert without_time(run) == without_time(place.uninterrupted("lora"))


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("at", "step"),
    [
        ("step 3", 3),
        ("saved 4", 4),
        ("evaluated 4", 4),
        ("step 6", 6),
        ("evaluated 6", 6),
        ("saving 0", 6),
        ("artifact 0", 6),
    ],
)
def test_every_signal_saves_wherever_it_comes(
    place: Place, tmp_path: Path, number: int, at: str, step: int
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted) as caught:
        place.start("lora", tmp_path / "run", Stopper(at, number))
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert caught.value.exit_code == 128 + number
    run = RunDir(tmp_path / "run")
    if at in ("saving 0", "artifact 0"):
        assert "verify it with" in caught.value.fix
        assert [path.name for path in run.checkpoints()] == ["step-00000002", "step-00000004"]
    else:
        assert f"from step {step} of 6" in caught.value.fix
        assert run.checkpoints()[-1].name.endswith(str(step))
    assert not run.finished
    shown = resume(run.path)
    assert (shown.code, shown.err) == (0, "")
    assert_same(run, place.uninterrupted("lora"), stopped=True)
    last, whole = (
        json.loads(each.file("manifest.json").read_text()) for each in (run, place.whole["lora"])
    )
    for fact in ("train_loss", "eval_loss"):
        assert last[fact] == whole[fact]


def test_an_evaluation_is_broken_off(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that has sent SIGTERM waits for seconds, an evaluation may take minutes."""

    measured = Prober.measure

    def endless(prober: Prober, loaded: Any, step: int) -> Any:
        if not step:
            return measured(prober, loaded, step)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("nobody broke it off")

    monkeypatch.setattr(Prober, "measure", endless)
    with pytest.raises(Interrupted, match="after step 4"):
        place.start("full", tmp_path / "run")
    monkeypatch.undo()
    assert resume(tmp_path / "run").code == 0
    assert_same(RunDir(tmp_path / "run"), place.uninterrupted("full"))


def test_a_scheduler_that_says_it_twice(place: Place, tmp_path: Path) -> None:
    class Twice(Listener):
        def step(self, facts: Any, plan: Any) -> None:
            if facts.step == 3:
                for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                    os.kill(os.getpid(), number)
                    time.sleep(0.05)

    with pytest.raises(Interrupted, match="after step 3") as caught:
        place.start("lora", tmp_path / "run", Twice())
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for stage in ("prepare", "load_start"):
        with monkeypatch.context() as patch:
            patch.setattr(f"truetune.run.pipeline.{stage}", lambda *_: os.kill(os.getpid(), number))
            shown = command("train", place.model, place.data, "-o", tmp_path / "deep" / "run")
        assert shown.code == 128 + number
        assert "Traceback" not in shown.err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_in_verify(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    """The resumed run verifies what was saved: it loads no weight and computes no step."""
    more = ["--lora", "--lora-dropout", "0"] if kind == "lora" else []
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    words = ["train", place.model, place.data, *more, "--max-steps", "2", "-o"]
    with monkeypatch.context() as patch:
        patch.setattr("truetune.run.pipeline.verify", lambda *_, **__: os.kill(os.getpid(), number))
        shown = command(*words, run.path)
    assert shown.code == 128 + number
    assert "before it was verified" in shown.err
    assert f"verify it with `truetune train --resume {run.path}`" in shown.err
    assert not run.finished
    assert not run.file("run.lock").exists()
    assert [path.name for path in run.checkpoints()] == ["step-00000001"]
    before = {path: path.stat().st_mtime_ns for path in sorted(run.path.rglob("*"))}
    with monkeypatch.context() as patch:
        patch.setattr("truetune.run.pipeline.load_start", None)
        shown = resume(run.path)
    assert shown.code == 0, shown.err
    assert run.finished
    # Nothing of what was there is written again, but for the page, which said that it was stopped.
    changed = {
        path.name
        for path, then in before.items()
        if path.is_file() or not path.exists()
        if not path.exists() or path.stat().st_mtime_ns != then
    }
    assert changed == {"unverified.json", "report.html"}
    assert command(*words, whole.path).code == 0
    one, two = (json.loads(each.file("manifest.json").read_text()) for each in (run, whole))
    for facts in (one, two):
        for name in ("recipe.yaml", "env.json", "verify_rows.jsonl", "metrics.jsonl"):
            facts["files"].pop(name)  # times and places
        facts["files"].pop("verify.json")
        facts["files"].pop("report.html")
        facts["files"].pop(f"{facts['artifact']}/README.md")  # it names its folder
    assert one == two


@pytest.mark.parametrize("change", ["weights", "facts", "a file more", "no facts"])
def test_what_is_not_whole_any_more_is_trained_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("truetune.run.pipeline.verify", lambda *_, **__: os.kill(os.getpid(), 15))
        with pytest.raises(Interrupted, match="before it was verified"), raised():
            place.start("full", run.path)
    if change == "facts":
        path = run.file("unverified.json")
        path.write_text(path.read_text().replace('"train_loss": ', '"train_loss": 1'))
    elif change == "weights":
        path = run.file("model") / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif change == "a file more":
        (run.file("model") / "pytorch_model.bin").write_bytes(b"somebody's")
    else:
        run.file("unverified.json").unlink()
    shown = resume(run.path)
    assert shown.code == 0, shown.err
    assert_same(run, place.uninterrupted("full"))
    assert "finished" in run.file("manifest.json").read_text()


def test_nohup_is_respected(place: Place, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = place.start("lora", tmp_path / "run", Stopper("step 3", signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.finished


def test_a_second_ctrl_c_stops_at_once(place: Place, tmp_path: Path) -> None:
    class Twice(Listener):
        def step(self, facts: Any, plan: Any) -> None:
            if facts.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)  # two signals that wait together would be delivered as one
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)

    with pytest.raises(Interrupted, match="immediately") as caught:
        place.start("full", tmp_path / "run", Twice())
    assert "from step 2 of 6" in caught.value.fix
    assert [p.name for p in RunDir(tmp_path / "run").checkpoints()] == ["step-00000002"]


def test_ctrl_c_at_the_keyboard(place: Place, tmp_path: Path) -> None:
    words = ["train", place.model, place.data, "-o", tmp_path / "run", "--max-steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "truetune.cli.verbs", *map(str, words), "--batch-size", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"`truetune train --resume {tmp_path / 'run'}`" in err
    assert "Traceback" not in err + out
    (checkpoint,) = RunDir(tmp_path / "run").checkpoints()
    assert f"from step {int(checkpoint.name.removeprefix('step-'))} of 100000" in err


# What cannot be resumed.


def test_a_finished_run(place: Place) -> None:
    run = place.uninterrupted("full")
    before = run.file("manifest.json").read_text()
    shown = resume(run.path)
    assert shown.code == 2
    assert "error[run-finished]" in shown.err
    assert run.file("manifest.json").read_text() == before


def test_a_folder_that_is_no_run(place: Place, tmp_path: Path) -> None:
    for path in (place.model, tmp_path / "none"):
        shown = resume(path)
        assert shown.code == 2
        assert "error[no-run]" in shown.err


@pytest.mark.parametrize("words", [["--lora"], ["--seed", "3"], ["-o", "x"], ["other.jsonl"]])
def test_other_settings_beside_resume(place: Place, words: list[str]) -> None:
    shown = command("train", "--resume", place.uninterrupted("full").path, *words)
    assert shown.code == 2
    assert "error[resume-with-settings]" in shown.err


@pytest.mark.parametrize("what", ["recipe", "rows"])
def test_a_run_whose_settings_or_rows_were_changed(place: Place, tmp_path: Path, what: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(30))
    settings = {**place.settings("full", tmp_path / "run"), "data": str(data)}
    with pytest.raises(Killed):
        train(make_recipe(("test", settings)), Killer("step 3"))
    if what == "rows":
        write_rows(data, sums(31))
    else:
        recipe = tmp_path / "run" / "recipe.yaml"
        value = yaml.safe_load(recipe.read_text())
        value["learning_rate"]["value"] = 1e-5
        recipe.write_text(yaml.safe_dump(value))
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    shown = resume(tmp_path / "run")
    assert shown.code == 1
    assert "error[checkpoint]" in shown.err
    assert ("learning_rate: 0.01 then, 1e-05 now" if what == "recipe" else "data: ") in shown.err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept


def damage(checkpoint: Path, name: str) -> None:
    """Turn one bit over; of the step, make another one."""
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    if name == "trainer_state.json":
        content[:] = content.replace(b'"step": ', b'"step": 1')
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer_state.safetensors", "trainer_state.json", "config.json"]
)
def test_a_damaged_checkpoint_is_passed_over(place: Place, tmp_path: Path, name: str) -> None:
    with pytest.raises(Killed):
        place.start("full", tmp_path / "run", Killer("step 5"))
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000002", "step-00000004"]
    damage(run.checkpoints()[-1], name)
    shown = resume(run.path)
    assert shown.code == 0
    assert "warning[checkpoint-damaged]" in shown.out + shown.err
    assert "continues from step 2 instead" in shown.out + shown.err
    found = [line for line in lines(run.file("findings.jsonl")) if line["level"] == "warning"]
    assert "checkpoint-damaged" in [line["code"] for line in found]
    # What is written in its place is whole again.
    assert_same(run, place.uninterrupted("full"))
    assert read_facts(run.checkpoints()[-1])["step"] == 4


def test_a_checkpoint_under_another_name_is_passed_over(place: Place, tmp_path: Path) -> None:
    """Whole, byte for byte, and of another step than it says."""
    with pytest.raises(Killed):
        place.start("full", tmp_path / "run", Killer("step 5"))
    run = RunDir(tmp_path / "run")
    last = run.checkpoints()[-1]
    last.rename(last.with_name("step-00000005"))
    shown = resume(run.path)
    assert shown.code == 0
    assert "the checkpoint is of step 4, which differs from its folder's name" in shown.out
    assert_same(run, place.uninterrupted("full"))


def test_when_all_checkpoints_are_damaged(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        place.start("full", tmp_path / "run", Killer("step 5"))
    run = RunDir(tmp_path / "run")
    for checkpoint in run.checkpoints():
        damage(checkpoint, "model.safetensors")
    shown = resume(run.path)
    assert shown.code == 1
    assert "error[checkpoint-damaged]" in shown.err
    assert "model.safetensors" in shown.err
    assert len(run.checkpoints()) == 2
    # The remedy that is named works.
    assert "remove that folder" in shown.err
    for checkpoint in run.checkpoints():
        shutil.rmtree(checkpoint)
    assert resume(run.path).code == 0
    assert_same(run, place.uninterrupted("full"))


def test_all_is_on_the_disk_before_it_gets_its_name(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power keeps what was flushed: every file and its folder before the
    rename, the folder above after it."""
    flushed: set[int] = set()
    renamed: list[Path] = []
    flush, move = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)
        while renamed and renamed[-1].stat().st_ino == os.fstat(descriptor).st_ino:
            renamed.pop()

    def moving(name: str) -> Any:
        def to(source: Any, target: Any, **how: Any) -> None:
            inside = [Path(source), *Path(source).rglob("*")]
            if (tmp_path / "run") in Path(target).parents:
                late = [path for path in inside if path.stat().st_ino not in flushed]
                assert not late, f"{target} gets its name before {late} are on the disk"
                renamed.append(Path(target).parent)
            move[name](source, target, **how)

        return to

    monkeypatch.setattr(os, "fsync", fsync)
    for name in move:
        monkeypatch.setattr(os, name, moving(name))
    run = place.start("lora", tmp_path / "run")
    assert run.finished
    assert renamed == []


def test_files_have_the_mode_of_any_other(place: Place, tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            run = place.start("lora", tmp_path / f"run-{mask}")
        finally:
            os.umask(before)
        files = [path for path in run.path.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {mode}


# A disk that fills up.


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Filler(Listener):
    """Fills the disk after a step."""

    def __init__(self, patch: pytest.MonkeyPatch, target: str) -> None:
        self.patch, self.target = patch, target

    def step(self, facts: Any, plan: Any) -> None:
        if facts.step == 3:
            self.patch.setattr(self.target, full_disk, raising=False)


@pytest.mark.parametrize(
    "target",
    [
        "safetensors.torch.save_file",  # optimizer state
        "transformers.PreTrainedModel.save_pretrained",  # weights
        "os.replace",  # the new name
        "truetune.run_dir.open",  # a line of metrics
    ],
)
def test_a_disk_that_fills_up(place: Place, tmp_path: Path, target: str) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SaveError) as caught:
        place.start("full", tmp_path / "run", Filler(patch, target))
    assert caught.value.exit_code == 1
    assert "No space left on device" in str(caught.value)
    run = RunDir(tmp_path / "run")
    # The earlier checkpoint is whole, nothing half-written stands beside it.
    (checkpoint,) = (run.path / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000002"
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
    # With room again the run goes on to the same end.
    assert resume(run.path).code == 0
    assert_same(run, place.uninterrupted("full"))


def test_a_disk_that_fills_up_shows_no_traceback(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    shown = command(
        *("train", place.model, place.data, "-o", tmp_path / "run"),
        *("--max-steps", "3", "--save-steps", "1"),
    )
    assert shown.code == 1
    assert "error[save]: the checkpoint could not be saved" in shown.err
    assert f"truetune train --resume {tmp_path / 'run'}" in shown.err
