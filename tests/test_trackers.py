"""Experiment trackers: what they are given, and what is said where one cannot be used."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tiny_models import write_model
from tiny_runs import command, lines, sums, write_rows
from truetune.errors import UsageError
from truetune.run.trackers import NAMES, Trackers
from truetune.run_dir import RunDir


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl", sums(110))
    return folder


class Recorder:
    """What accelerate asks of a tracker, kept in lists."""

    requires_logging_directory = False
    made: ClassVar[list[Recorder]] = []

    def __init__(self, run_name: str, logging_dir: Path | None = None) -> None:
        self.run_name, self.logging_dir = run_name, logging_dir
        self.events: list[tuple[Any, ...]] = []
        Recorder.made.append(self)

    def start(self) -> None:
        self.events.append(("start",))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(("settings", values))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.events.append(("log", step, values))

    def finish(self) -> None:
        self.events.append(("finish",))


class Writer(Recorder):
    """One that writes files, the last of them when it is closed."""

    requires_logging_directory = True

    def start(self) -> None:
        assert self.logging_dir
        (self.logging_dir / self.run_name).mkdir(parents=True)

    def finish(self) -> None:
        assert self.logging_dir
        (self.logging_dir / self.run_name / "events").write_text("all of them")
        super().finish()


def register(monkeypatch: pytest.MonkeyPatch, tracker: type[Recorder]) -> None:
    """Stand in for wandb, as if it were installed."""
    from accelerate import tracking

    from truetune.run import trackers

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", tracker)
    monkeypatch.setattr(trackers, "_PACKAGES", {"wandb": ("accelerate",)})
    monkeypatch.setattr(Recorder, "made", [])


def run(place: Path, out: Path, *words: Any) -> Any:
    shared = ("train", place / "tiny", place / "rows.jsonl", "-o", out, "--max-steps", "2")
    return command(*shared, "--report-to", "wandb", *words)


def test_a_tracker_receives_settings_and_metrics(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, Recorder)
    assert run(place, tmp_path / "first", "--seed", "7").code == 0
    (tracker,) = Recorder.made
    assert tracker.run_name == "first"
    assert [event[0] for event in tracker.events] == [
        # Two steps, and at each evaluation, one before the first step, its loss and vital signs.
        *("start", "settings", "log", "log", "log", "log", "log", "log", "log", "log", "finish"),
    ]
    assert tracker.events[1][1]["seed"] == "7"
    logged = [{"step": step, **values} for _, step, values in tracker.events[2:-1]]
    written = lines(tmp_path / "first" / "metrics.jsonl")
    assert logged == [{k: v for k, v in line.items() if k != "probe"} for line in written]


def test_files_of_a_tracker_are_part_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    register(monkeypatch, Writer)
    assert run(place, tmp_path / "first").code == 0
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert manifest["files"]["trackers/first/events"]["bytes"] == len("all of them")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    # A run with such files is replaced like any other.
    assert run(place, tmp_path / "first", "--overwrite").code == 0


def test_a_tracker_is_closed_when_the_run_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, Recorder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert run(place, tmp_path / "first", "--save-steps", "1").code == 1
    (tracker,) = Recorder.made
    assert {event[0] for event in tracker.events[2:-1]} == {"log"}
    assert [tracker.events[at][0] for at in (0, 1, -1)] == ["start", "settings", "finish"]


def test_a_tracker_that_cannot_start(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoggedOut(Recorder):
        def start(self) -> None:
            raise RuntimeError("api_key not configured")

    register(monkeypatch, LoggedOut)
    shown = run(place, tmp_path / "first")
    assert shown.code == 2
    assert "error[tracker]: the tracker wandb cannot be started: api_key not" in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named(place: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    words = ("train", place / "tiny", place / "rows.jsonl", "-o", tmp_path / "run")
    shown = command(*words, "--report-to", name)
    assert shown.code == 2
    assert f"error[tracker-missing]: --report-to {name} needs a package" in shown.err
    assert f"pip install {name}" in shown.err
    assert not RunDir(tmp_path / "run").path.exists()


def test_an_unknown_tracker() -> None:
    with pytest.raises(UsageError, match="unknown tracker 'tensorbord'") as caught:
        Trackers(["wandb", "tensorbord"], Path("run"))
    assert "tensorboard" in caught.value.fix


def test_no_tracker_imports_nothing() -> None:
    trackers = Trackers([], Path("run"))
    trackers.start({"seed": {"value": 1, "origin": "default"}})
    trackers.log({"step": 1, "loss": 2.0}, 1)
    trackers.finish()


def test_tensorboard_writes_into_the_run(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    shared = ("train", place / "tiny", place / "rows.jsonl", "-o", tmp_path / "run")
    assert command(*shared, "--max-steps", "1", "--report-to", "tensorboard").code == 0
    assert list((tmp_path / "run" / "trackers" / "run").glob("events.out.tfevents.*"))
