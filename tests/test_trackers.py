"""Experiment trackers: what they are given, and what is said where one cannot be used."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tiny_models import write_model
from tiny_runs import command, lines, sums, write_rows
from truetune.errors import UsageError
from truetune.reporting.facts import asked
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
    assert [event[0] for event in tracker.events[:2]] == ["start", "settings"]
    assert {event[0] for event in tracker.events[2:-1]} == {"log"}
    assert tracker.events[-1] == ("finish",)
    assert tracker.events[1][1]["seed"] == "7"
    logged = [{"step": step, **values} for _, step, values in tracker.events[2:-1]]
    metrics = lines(tmp_path / "first" / "metrics.jsonl")
    assert logged == [{k: v for k, v in line.items() if k != "probe"} for line in metrics]


def test_files_of_a_tracker_are_part_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert [event[0] for event in tracker.events[:3]] == ["start", "settings", "log"]
    assert tracker.events[-1] == ("finish",)


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


class Vocal(Recorder):
    """One whose library takes text."""

    name = "wandb"


def test_samples_go_where_text_is_taken_and_shares_of_the_probes_everywhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    register(monkeypatch, Vocal)
    monkeypatch.setattr("truetune.run.trackers._TEXTS", {"wandb": lambda *a: told.append(a)})
    assert run(place, tmp_path / "first").code == 0
    samples = lines(tmp_path / "first" / "samples.jsonl")
    assert sum(len(rows) for _, _, rows, _ in told) == len(samples) > 0
    _, columns, rows, step = told[-1]
    assert columns == ["step", "where", "prompt", "reply", "ended", "expected"]
    last = [line for line in samples if line["step"] == step]
    assert [row[1] for row in rows] == [line["where"] for line in last]
    assert [row[2] for row in rows] == [asked(line) for line in last]
    trackers = Trackers([], Path("run"))
    trackers._trackers = [recorder := Vocal("run")]
    trackers.log({"step": 3, "probe": True, "stop_rate": 0.5}, 3)
    trackers.samples(
        [{"where": "a", "prompt": "<|user|>", "answer": "\x1b[31m" + "x" * 9000, "stopped": False}],
        3,
    )
    assert recorder.events == [("log", 3, {"stop_rate": 0.5})]
    assert told[-1][2][0][:3] == ["3", "a", "<|user|>"]
    assert told[-1][2][0][3].startswith("\\x1b[31mxx")
    assert len(told[-1][2][0][3]) == 2000


# Each library for real, offline, where it is installed.


LOSSES = [2.0, 0.5]
SAMPLE = {
    "where": "rows.jsonl:3",
    "messages": [{"role": "user", "content": "2+1?"}],
    "answer": "3.\n<b>",
    "stopped": True,
    "expected": "3.",
}


def with_library(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, a probe and a sample, told to a library that needs no account."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": "tried",
        "TRACKIO_DIR": str(folder / "trackio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(folder)
    (folder / "run").mkdir()
    trackers = Trackers([name], folder / "run")
    trackers.start({"seed": {"value": 7, "origin": "default"}})
    for step, loss in enumerate(LOSSES, 1):
        trackers.log({"step": step, "loss": loss}, step)
    trackers.log({"step": 2, "probe": True, "stop_rate": 0.75}, 2)
    trackers.samples([{**SAMPLE, "step": 2}], 2)
    trackers.finish()


def test_tensorboard_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_library("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "run" / "trackers" / "run"))
    read.Reload()
    assert [event.value for event in read.Scalars("loss")] == LOSSES
    assert [event.value for event in read.Scalars("stop_rate")] == [0.75]
    (text,) = read.Tensors("samples/rows.jsonl:3/text_summary")
    assert b"    reply: 3.\n    reply: <b>" in text.tensor_proto.string_val[0]


def test_wandb_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_library("wandb", tmp_path, monkeypatch)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # Its own process writes the file, and may do so after `finish` returns.
    last = time.monotonic() + 30
    while b"stop_rate" not in (held := written.read_bytes()) and time.monotonic() < last:
        time.sleep(0.1)
    assert b"loss" in held
    assert b"stop_rate" in held
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.json")
    assert ["2", "rows.jsonl:3", "2+1?", "3.\n<b>", "yes", "3."] in json.loads(table.read_text())[
        "data"
    ]


def test_mlflow_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_library("mlflow", tmp_path, monkeypatch)
    import mlflow

    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "loss")
    assert [point.value for point in history] == LOSSES
    assert found.data.metrics["stop_rate"] == 0.75
    table = mlflow.load_table("samples.json", run_ids=[found.info.run_id])
    assert table["reply"].tolist() == ["3.\n<b>"]


def test_trackio_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_library("trackio", tmp_path, monkeypatch)
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("run")
    logs = SQLiteStorage.get_logs("run", name)
    assert [line["loss"] for line in logs if "loss" in line] == LOSSES
    assert [line["stop_rate"] for line in logs if "stop_rate" in line] == [0.75]
    (samples,) = (line["samples"] for line in logs if "samples" in line)
    assert "rows.jsonl:3" in json.dumps(samples)
