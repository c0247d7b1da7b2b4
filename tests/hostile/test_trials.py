"""A handful of the trials of docs/reliability.md; `make reliability` does hundreds of each."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import reliability
from trials import (
    LOST,
    Trials,
    at_once,
    damaged,
    exports_at_once,
    full_disk,
    little_memory,
    may_mount,
    other_clock,
    read_only,
)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="trials fork, and look into /proc"
)
needs_mounts = pytest.mark.skipif(
    sys.platform.startswith("linux") and not may_mount(),
    reason="a process may not have mounts of its own here",
)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def counts(trials: Trials) -> dict[str, float]:
    return trials.counts(timed=False)


def of_one(trials: Trials, phase: str, counts: dict[str, float], number: int) -> str:
    (point,) = trials.points(phase, counts[phase], 1, f"quick {number}")
    return trials.signalled(phase, point, number)


@pytest.mark.parametrize("phase", ["reading rows", "step", "checkpoint", "artifact"])
def test_a_killed_run(trials: Trials, counts: dict[str, float], phase: str) -> None:
    begun = phase != "reading rows"
    said = of_one(trials, phase, counts, signal.SIGKILL)
    assert said == ("resumed" if begun else "started again")


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (signal.SIGTERM, "start-up"),
        (signal.SIGINT, "evaluation"),
        (signal.SIGHUP, "first step"),
    ],
)
def test_a_stopped_run(trials: Trials, counts: dict[str, float], number: int, phase: str) -> None:
    assert not of_one(trials, phase, counts, number).startswith(LOST)


def test_a_resume_beside_a_working_run(trials: Trials) -> None:
    assert at_once(trials, "resume beside") == "one ran, one was refused: run-busy"


def test_two_exports_at_once(trials: Trials) -> None:
    assert exports_at_once(trials, 0.0).startswith("one is complete, one was refused: output-")


@needs_mounts
def test_a_full_disk(trials: Trials) -> None:
    assert full_disk(trials, 300_000) in ("resumed", "started again")


@needs_mounts
def test_a_file_system_that_becomes_read_only(trials: Trials) -> None:
    assert read_only(trials, 3) == "resumed"


def test_a_checkpoint_of_which_a_bit_was_flipped(trials: Trials) -> None:
    killed = trials.killed_run(5)
    previous = "resumed from the previous checkpoint"
    for both, ends in ((False, previous), (True, "refused, nothing changed")):
        said = damaged(trials, killed, killed, "trainer_state.json", "a bit flipped", both)
        assert said == ends


def test_what_is_lost_is_seen(trials: Trials) -> None:
    """A trial that could not fail would show nothing: another weight, a traceback, a hang."""
    run = trials.killed_run(3)
    weights = next((run / "checkpoints").glob("step-*/adapter_model.safetensors"))

    def other_weights() -> None:
        # Behind the back of the digests.
        from truetune.engine import checkpoint

        content = bytearray(weights.read_bytes())
        content[-2] ^= 1
        weights.write_bytes(content)
        checkpoint.sha256 = lambda path: ""  # type: ignore[assignment]
        read = checkpoint.read_sealed

        def unsealed(path: Path) -> object:
            facts, _ = read(path)
            facts["files"] = {name: {"sha256": ""} for name in facts["files"]}
            return facts, True

        checkpoint.read_sealed = unsealed  # type: ignore[assignment]

    assert trials.process(["train", "--resume", str(run)], other_weights).status == 0
    assert trials.go_on(run).startswith(f"{LOST}other ")

    def raises() -> None:
        import truetune.run.pipeline

        truetune.run.pipeline.prepare = None  # type: ignore[assignment]

    shown = trials.process(trials.start(trials.place()), raises)
    assert "Traceback" in shown.err
    before, trials.patience = trials.patience, 0.2
    assert trials.process(trials.start(trials.place())).status == -999
    trials.patience = before


@pytest.mark.slow
def test_little_memory_and_another_clock(trials: Trials) -> None:
    for megabytes in (0, 30):
        assert not little_memory(trials, megabytes).startswith(LOST)
    assert other_clock(trials, -3600.0) == "resumed"


@pytest.mark.slow
def test_the_whole_table_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reliability.py", "--points", "2"])
    monkeypatch.setitem(os.environ, "TMPDIR", str(tmp_path))
    assert reliability.main() == 0, capsys.readouterr().out
