"""The run directory: atomic writes, manifest last, nothing of a stranger's removed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import command
from truetune import run_dir as run_module
from truetune.errors import OutputExists, SaveError, UsageError
from truetune.run_dir import RunDir, claimed, opened, scratch, sha256, write_json, write_text
from truetune.system.lock import hold


def unfinished(path: Path) -> RunDir:
    """What a run leaves that was killed between its second checkpoint and its end."""
    run = RunDir(path)
    run.make()
    write_text(run.file("recipe.yaml"), "model: {value: m, origin: command line}\n")
    write_json(run.file("contract.json"), {"fingerprint": "f"})
    run.append("metrics.jsonl", {"step": 1})
    for step in (2, 4):
        folder = run.checkpoint_path(step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(f"weights {step}")
    return run


def finished(path: Path) -> RunDir:
    run = unfinished(path)
    (run.file("model")).mkdir()
    (run.file("model") / "config.json").write_text("{}")
    run.finish({"finished": True})
    return run


def everything(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def refused(run: RunDir, *, overwrite: bool = False) -> OutputExists:
    before = everything(run.path)
    with pytest.raises(OutputExists) as caught:
        run.make(overwrite=overwrite)
    assert everything(run.path) == before
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return caught.value


def test_the_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    manifest = json.loads(run.file("manifest.json").read_text())
    assert manifest["finished"] is True
    assert set(manifest["files"]) == set(everything(run.path)) - {"manifest.json"}
    for name, facts in manifest["files"].items():
        path = run.path / name
        assert facts == {"bytes": path.stat().st_size, "sha256": sha256(path)}


def test_an_empty_or_a_new_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "deep" / "new"):
        RunDir(path).make()
        assert list(path.iterdir()) == []


def test_a_finished_run_is_kept_unless_told(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    error = refused(run)
    assert error.code == "run-exists"
    assert "--overwrite" in error.fix
    run.make(overwrite=True)
    assert list(run.path.iterdir()) == []


def test_an_unfinished_run_is_kept_unless_told(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    error = refused(run)
    assert error.code == "run-unfinished"
    assert f"--resume {run.path}" in error.fix
    run.make(overwrite=True)
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [finished, unfinished])
@pytest.mark.parametrize("name", ["notes.txt", "data", "checkpoints/notes.txt", ".hidden.tmp"])
def test_a_strangers_file_is_never_removed(
    tmp_path: Path, overwrite: bool, kind: object, name: str
) -> None:
    run = kind(tmp_path / "run")  # type: ignore[operator]
    (run.path / name).write_text("mine")
    error = refused(run, overwrite=overwrite)
    if overwrite or "/" not in name:
        assert error.code == "output-not-ours"
        assert name in error.what


@pytest.mark.parametrize("name", ["model/mine.bin", "checkpoints/step-00000002/mine.bin"])
def test_a_strangers_file_deep_in_a_finished_run(tmp_path: Path, name: str) -> None:
    run = finished(tmp_path / "run")
    (run.path / name).write_text("mine")
    assert name in refused(run, overwrite=True).what


def test_somebodys_recipe_and_model_are_no_run(tmp_path: Path) -> None:
    # The names are those of a run, the files are not.
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    (project / "model" / "config.json").write_text("{}")
    (project / "recipe.yaml").write_text("model: model\n")
    assert not RunDir(project).looks_like_one()
    assert refused(RunDir(project), overwrite=True).code == "output-not-ours"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExists, match="is a file"):
        RunDir(tmp_path / "file").make(overwrite=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="cannot create the output folder"):
        RunDir(tmp_path / "file" / "run").make()


def test_what_a_kill_left_half_written_is_taken_away(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    left = [
        run.file(".adapter.partial-123"),
        run.file("checkpoints") / ".step-00000006.partial",
        run.file("checkpoints") / "..step-00000006.partial.partial-123",
    ]
    for folder in left:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    run.file(".manifest.json.tmp").write_text("{")
    assert [p.name for p in run.checkpoints()] == ["step-00000002", "step-00000004"]
    run.rewind(4)
    assert not any(path.exists() for path in left)
    assert not run.file(".manifest.json.tmp").exists()
    # Neither does it stand in the way of a new start.
    left[0].mkdir()
    run.make(overwrite=True)
    assert list(run.path.iterdir()) == []


def test_rewind_cuts_step_files_and_leaves_both_behind(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 6):
        run.append("metrics.jsonl", {"step": step, "loss": step / 2})
    run.append("metrics.jsonl", {"step": 4, "eval_loss": 1.0})
    with open(run.file("metrics.jsonl"), "a") as file:
        file.write('{"step": 6, "lo')  # the process died here
    run.rewind(4)
    assert [v["step"] for v in run.lines("metrics.jsonl")] == [1, 2, 3, 4, 4]
    assert run.file("samples.jsonl").read_text() == ""


def test_jsonl_keeps_text_as_it_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append("samples.jsonl", {"answer": "é\u2028\n\x1b[31m"})
    assert run.file("samples.jsonl").read_bytes().count(b"\n") == 1
    assert next(run.lines("samples.jsonl"))["answer"] == "é\u2028\n\x1b[31m"
    assert list(run.lines("none.jsonl")) == []


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.json"
    write_json(path, {"old": True})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device") as caught:
        write_json(path, {"new": True})
    assert caught.value.exit_code == 1
    assert json.loads(path.read_text()) == {"old": True}
    assert os.listdir(tmp_path) == ["data.json"]


def test_a_full_disk_while_appending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "open", full, raising=False)
    with pytest.raises(SaveError, match="No space left on device") as caught:
        RunDir(tmp_path).append("metrics.jsonl", {})
    assert caught.value.where.endswith("metrics.jsonl")


def test_open_takes_runs_only(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError) as caught:
            RunDir.open(path)
        assert caught.value.code == "no-run"
    run = unfinished(tmp_path / "run")
    assert RunDir.open(run.path).path == run.path
    assert not run.finished
    assert finished(tmp_path / "other").finished


def test_what_is_opened_for_a_run(tmp_path: Path) -> None:
    assert opened("owner/name") == "owner/name"
    assert opened(str(tmp_path)) == str(tmp_path)
    assert opened(str(finished(tmp_path / "a").path)) == str(tmp_path / "a" / "model")
    run = unfinished(tmp_path / "b")
    assert opened(str(run.path)) == str(run.checkpoint_path(4))
    for step in (2, 4):
        (run.checkpoint_path(step) / "model.safetensors").unlink()
        run.checkpoint_path(step).rmdir()
    with pytest.raises(UsageError) as caught:
        opened(str(run.path))
    assert caught.value.code == "run-empty"


# One writer.


@pytest.fixture
def at_work() -> Iterator[Callable[[Path], None]]:
    """Another writer of a folder: a thread of this process is kept out like another process."""
    done, threads = threading.Event(), []

    def work(path: Path) -> None:
        begun = threading.Event()

        def hold_it() -> None:
            with hold(path / "run.lock"):
                begun.set()
                done.wait(60)

        threads.append(threading.Thread(target=hold_it))
        threads[-1].start()
        assert begun.wait(10)

    yield work
    done.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "model", "rows.jsonl", "-o", "RUN"),
        ("train", "model", "rows.jsonl", "-o", "RUN", "--overwrite"),
        ("train", "--resume", "RUN"),
        ("quickstart", "-o", "RUN"),
        ("quickstart", "-o", "RUN", "--overwrite"),
        ("lab", "pretrain", "-o", "RUN"),
        ("lab", "run", "knowledge", "-o", "RUN"),
    ],
)
@pytest.mark.parametrize("kind", [finished, unfinished, None])
def test_a_run_at_work_is_left_alone(
    tmp_path: Path,
    at_work: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    kind: Callable[[Path], RunDir] | None,
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    if kind:
        kind(path)
    elif "--resume" in words:
        return
    at_work(path)
    before = everything(path)
    # Nothing is read or loaded for it: what would be would fail.
    monkeypatch.setattr("truetune.run.pipeline.ask_early", None)
    monkeypatch.setattr("truetune.cli.verbs.ask_first", lambda _: None)
    shown = command(*(str(path) if word == "RUN" else word for word in words))
    assert shown.code == 2
    assert "error[run-busy]: another process is writing this run (process " in shown.err
    assert everything(path) == before


def test_a_writer_whose_lock_was_taken_over_stops(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    lock = run.file("run.lock")
    with run.writing(run.require_unfinished):
        lock.rename(run.file("moved.lock"))
        run.append("metrics.jsonl", {"step": 3})  # only gone: it is there again
        assert lock.is_file()
        lock.rename(run.file("moved.lock"))
        lock.write_text("")
        before = everything(run.path)
        for write in (
            lambda: run.append("metrics.jsonl", {"step": 4}),
            lambda: run.finish({}),
            run.require_mine,
        ):
            with pytest.raises(SaveError) as caught:
                write()
            assert caught.value.code == "lock-lost"
            assert caught.value.where == str(lock)
        assert everything(run.path) == before
    assert lock.exists()  # it is the other's
    run.append("metrics.jsonl", {"step": 4})  # by whoever holds none, such as a tracker


def test_who_waits_for_nobody_imports_no_torch(
    tmp_path: Path, at_work: Callable[[Path], None]
) -> None:
    run = unfinished(tmp_path / "run")
    at_work(run.path)
    code = (
        "import sys\nfrom truetune.cli.verbs import main\n"
        "try:\n    main(['train', '--resume', sys.argv[1]])\n"
        "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 False\n"
    assert "error[run-busy]" in done.stderr


def test_readers_need_no_lock(tmp_path: Path, at_work: Callable[[Path], None]) -> None:
    run = finished(tmp_path / "run")
    at_work(run.path)
    assert RunDir.open(run.path).finished
    assert opened(str(run.path)) == str(run.file("model"))


def test_a_lock_is_no_part_of_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "deep" / "run")
    with run.writing(run.require_room) as dead:
        assert dead is None
        assert run.file("run.lock").is_file()
        unfinished(run.path).finish({})
        assert "run.lock" not in json.loads(run.file("manifest.json").read_text())["files"]
    assert not run.file("run.lock").exists()
    # Nor where its owner was killed when all was done.
    run.file("run.lock").write_text("{}")
    refused(run)
    with run.writing(lambda: run.require_room(overwrite=True)):
        run.make(overwrite=True)
        assert os.listdir(run.path) == ["run.lock"]
    # A start that comes to nothing leaves the folder as it was: this one was there before.
    assert list(run.path.iterdir()) == []


def test_a_start_that_comes_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "deep" / "run")
    with pytest.raises(SaveError), run.writing(run.require_room):
        raise SaveError("nothing")
    assert list(tmp_path.iterdir()) == []


def test_what_was_refused_is_not_even_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "run")
    monkeypatch.setattr(run_module, "hold", None)
    for require in (run.require_room, run.require_unfinished):
        with pytest.raises(UsageError), run.writing(require):
            pass


def test_a_run_that_is_finished_in_between(tmp_path: Path) -> None:
    run, asked = unfinished(tmp_path / "run"), []

    def require() -> None:
        run.require_unfinished()
        if not asked:
            run.finish({})  # by another process, which ends before the lock is taken
        asked.append(1)

    with pytest.raises(UsageError, match="nothing to resume"), run.writing(require):
        pass
    assert not run.file("run.lock").exists()


def test_a_killed_writer_is_named(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    code = (
        "import os, sys\nfrom truetune.run_dir import claimed\n"
        "with claimed(sys.argv[1], resume=True):\n    os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert done.returncode == 9
    assert run.file("run.lock").is_file()
    with claimed(run.path, resume=True) as (again, dead):
        assert again.path == run.path
        assert dead
        assert dead.pid != os.getpid()


@pytest.mark.parametrize("there", [".contract.json.tmp", "contract.json", "both"])
def test_a_start_that_was_killed_in_its_first_file(tmp_path: Path, there: str) -> None:
    run = RunDir(tmp_path / "run")
    run.make()
    if there != ".contract.json.tmp":
        write_json(run.file("contract.json"), {"fingerprint": "f"})
    if there != "contract.json":
        name = ".recipe.yaml.tmp" if there == "both" else there
        run.file(name).write_text("{")
    run.make()
    assert list(run.path.iterdir()) == []


def test_somebodys_contract_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "contract.json").write_text('{"party": "of the first part"}')
    assert refused(RunDir(tmp_path)).code == "output-not-ours"


@pytest.mark.parametrize("kind", [finished, unfinished])
def test_a_removal_that_is_killed_can_be_repeated(
    tmp_path: Path, kind: Callable[[Path], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    removals = len(os.listdir(kind(tmp_path / "counted").path))
    for last in range(removals + 1):
        run, remove, count = kind(tmp_path / f"run-{last}"), run_module._remove, iter(range(99))

        def killed(path: Path, remove: Any = remove, count: Any = count, last: int = last) -> None:
            if path.exists() and next(count) == last:
                raise KeyboardInterrupt
            remove(path)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "_remove", killed)
            with contextlib.suppress(KeyboardInterrupt):
                run.make(overwrite=True)
        run.make(overwrite=True)
        assert list(run.path.iterdir()) == []


def test_a_temporary_folder_is_swept_when_its_process_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_work: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os\nfrom truetune.run_dir import scratch\nwith scratch():\n    os._exit(9)"
    subprocess.run(
        [sys.executable, "-c", code], check=False, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    (left,) = tmp_path.iterdir()
    (left / "weights").write_text("weights")
    working, young, other = (
        tmp_path / name for name in ("truetune-scratch-at-work", "truetune-scratch-young", "other")
    )
    for folder in (working, young, other):
        folder.mkdir()
    at_work(working)
    with scratch() as mine:
        assert set(tmp_path.iterdir()) == {mine, working, young, other}
    assert set(tmp_path.iterdir()) == {working, young, other}


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts need root")
def test_a_read_only_file_system(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    words = [sys.executable, "-m", "truetune", "train", "--resume", str(run.path)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(run.path), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.returncode == 2
    assert "error[output-not-writable]" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
