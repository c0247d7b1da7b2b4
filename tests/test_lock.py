"""One writer: who gets a lock, who does not, and whose death is believed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from truetune.errors import SaveError
from truetune.system import lock
from truetune.system.lock import Busy, hold, require_free, require_held

# What an owner in a process of its own does; of a file system without locks it is told by `flock`.
WITHOUT = f"""
import fcntl
def flock(*_):
    raise OSError({errno.ENOSYS}, "no locks here")
fcntl.flock = flock
"""
OWNER = """
import sys, time
from pathlib import Path
from truetune.system.lock import Busy, hold
path, starts, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, starts - time.time()))
try:
    with hold(path):
        print("held", flush=True)
        time.sleep(seconds)
except Busy:
    print("busy", flush=True)
"""


@pytest.fixture(params=["flock", "no flock"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code that another process begins with."""
    if request.param == "flock":
        return ""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    return WITHOUT


@pytest.fixture
def owner(kernel: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(path: Path, *, at: float = 0, seconds: float = 600) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", kernel + OWNER, str(path), str(at), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def others(path: Path, **changes: Any) -> lock.Owner:
    """A lock file as another owner left it."""
    left = replace(lock._this(), **changes)
    path.write_text(json.dumps(asdict(left)))
    return left


def test_one_process_at_a_time(tmp_path: Path, owner: Any) -> None:
    path = tmp_path / "lock"
    process = owner(path)
    assert said(process) == "held"
    before = path.read_bytes()
    for attempt in (lambda: hold(path).__enter__(), lambda: require_free(path)):
        with pytest.raises(Busy) as caught:
            attempt()
        assert caught.value.exit_code == 2
        assert f"process {process.pid} on " in caught.value.what
        assert caught.value.fix
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_it_is_gone_when_it_is_let_go(tmp_path: Path, owner: Any) -> None:
    path = tmp_path / "lock"
    process = owner(path, seconds=0.1)
    assert said(process) == "held"
    process.wait(10)
    assert not path.exists()
    require_free(path)
    with hold(path) as dead:
        assert dead is None
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_was_killed(tmp_path: Path, owner: Any) -> None:
    path = tmp_path / "lock"
    process = owner(path)
    assert said(process) == "held"
    process.send_signal(signal.SIGKILL)
    process.wait()
    require_free(path)
    with hold(path) as dead:
        assert dead
        assert dead.pid == process.pid
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_is_used_again(tmp_path: Path, kernel: str) -> None:
    path = tmp_path / "lock"
    left = others(path, pid=os.getppid(), began="12")
    with hold(path) as dead:
        assert dead == left


def test_another_machine_is_alive_as_long_as_it_says_so(tmp_path: Path, kernel: str) -> None:
    path = tmp_path / "lock"
    # Even where this kernel gives us the lock: it may not know of the other's.
    left = others(path, machine="another", host="elsewhere")
    for attempt in (lambda: hold(path).__enter__(), lambda: require_free(path)):
        with pytest.raises(Busy, match=f"process {left.pid} on elsewhere") as caught:
            attempt()
        assert "seconds ago" in caught.value.why
    assert json.loads(path.read_text()) == asdict(left)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
    quiet = time.time() - lock._DEAD_AFTER - 1
    os.utime(path, (quiet, quiet))
    with hold(path) as dead:
        assert dead == left


def test_a_container_counts_processes_of_its_own(tmp_path: Path, kernel: str) -> None:
    # The pid runs here, and says nothing of there; a kernel that gave its lock knows of both.
    path = tmp_path / "lock"
    others(path, space="pid:[1]")
    if kernel:
        with pytest.raises(Busy):
            hold(path).__enter__()
    else:
        with hold(path) as dead:
            assert dead


def test_it_shows_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(lock, "_SIGN_OF_LIFE", 0.02)
    path = tmp_path / "lock"
    with hold(path):
        os.utime(path, (0, 0))
        for _ in range(200):
            if path.stat().st_mtime:
                break
            time.sleep(0.02)
        assert path.stat().st_mtime > time.time() - 10


@pytest.mark.parametrize("text", ["", '{"pid": 12', "[]", '{"pid": 1}', "\0" * 9000])
def test_a_name_that_was_not_written_whole(tmp_path: Path, kernel: str, text: str) -> None:
    path = tmp_path / "lock"
    path.write_text(text)
    if kernel:  # it may be being written
        with pytest.raises(Busy):
            hold(path).__enter__()
        os.utime(path, (0, 0))
    with hold(path) as dead:
        assert dead is None


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_together_one_gets_it(tmp_path: Path, owner: Any, stale: bool) -> None:
    for trial in range(3):
        path = tmp_path / f"lock-{trial}"
        if stale:
            others(path, pid=os.getppid(), began="12")
        together = time.time() + 0.7
        started = [owner(path, at=together, seconds=600) for _ in range(6)]
        assert sorted(said(process) for process in started) == ["busy"] * 5 + ["held"]
        for process in started:
            process.kill()
            process.wait()


def test_one_thread_at_a_time_and_the_same_as_often_as_it_likes(
    tmp_path: Path, kernel: str
) -> None:
    path = tmp_path / "lock"
    caught: list[Exception] = []

    def attempt() -> None:
        try:
            with hold(path):
                pass
        except Exception as error:
            caught.append(error)

    def in_a_thread() -> None:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    with hold(path):
        with hold(path):
            require_free(path)
        assert path.exists()
        in_a_thread()
        assert isinstance(caught[0], Busy)
    in_a_thread()
    assert len(caught) == 1
    assert not path.exists()


def test_a_lock_file_that_was_moved_away_is_made_again(
    tmp_path: Path, owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SIGN_OF_LIFE", 0.05)
    path = tmp_path / "lock"
    require_held(path)  # nobody holds it: nothing to lose
    with hold(path):
        for remove in (lambda: path.rename(tmp_path / "away"), path.unlink):
            remove()
            deadline = time.monotonic() + 10
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            require_held(path)
            assert said(owner(path)) == "busy"
        assert lock.is_alive(path)
    assert not path.exists()


def test_a_lock_that_another_took_stays_the_others(tmp_path: Path, owner: Any) -> None:
    path = tmp_path / "lock"
    with hold(path):
        path.unlink()
        other = owner(path)
        assert said(other) == "held"
        with pytest.raises(SaveError, match="taken over") as caught:
            require_held(path)
        assert caught.value.code == "lock-lost"
    assert path.exists()
    assert said(owner(path)) == "busy"


def test_a_folder_that_was_moved_away_is_somebody_elses_error(tmp_path: Path, kernel: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with hold(folder / "lock"):
        folder.rename(tmp_path / "moved")
        require_held(folder / "lock")
        assert not folder.exists()


def test_a_link_is_not_followed(tmp_path: Path, kernel: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(OSError, match="lock"), hold(path):
        pass
    with contextlib.suppress(OSError):
        require_free(path)
    assert victim.read_text() == "precious"
    assert path.is_symlink()


def test_a_thread_that_cannot_be_started(
    tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is used up there is no sign of life, and nothing stays locked either."""

    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "lock"
    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", fails)
        with pytest.raises(RuntimeError, match="thread"), hold(path):
            pass
    assert not path.exists()
    with hold(path) as dead:
        assert dead is None


THREADS_DIE = """
import _thread, sys, threading
_thread.start_new_thread = threading._start_new_thread = lambda *_: 1
from pathlib import Path
from truetune.errors import is_out_of_memory
from truetune.system import threads
from truetune.system.lock import hold
threads._FIRST = 0.1
try:
    with hold(Path(sys.argv[1])):
        print("held")
except RuntimeError as error:
    print("no memory" if is_out_of_memory(error) else error)
"""


def test_a_thread_that_dies_at_its_first_step_is_not_waited_for(tmp_path: Path) -> None:
    """As one does that finds no memory: nobody waits for its first sign for ever."""
    path = tmp_path / "lock"
    done = subprocess.run(
        [sys.executable, "-c", THREADS_DIE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "no memory\n"
    assert not path.exists()
