"""Runs that are killed, stopped, starved and doubled, in forked copies of one process: what each
trial left, and whether it went on to the same bits as a run that nothing happened to."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("start-up", "step", "evaluation", "saving", "verify")
SETTINGS = """--batch-size 8 --micro-batch-size 3 --max-steps 6 --learning-rate 1e-2 --save-steps 2
    --eval-steps 4 --lora --lora-r 4 --lora-dropout 0.3""".split()  # noqa: SIM905
# Seconds after which a process hangs: as a multiple of an untouched run, which a busy machine slows
# down like all others.
_PATIENCE, _FIRST = 20, 900.0
# Whose calls count to which phase.
_WHERE = {
    "truetune.pipeline:_started": "start-up",
    "truetune.engine.trainer:SFTTrainer._step": "step",
    "truetune.engine.trainer:SFTTrainer.evaluate": "evaluation",
    "truetune.job:Job.on_eval": "evaluation",
    "truetune.job:Job.save_checkpoint": "saving",
    "truetune.job:Job._save_artifact": "saving",
    "truetune.pipeline:verify": "verify",
    "truetune.job:Job.finish": "verify",
}


@dataclass
class Tally:
    """What came of the trials of one row of the table.

    Attributes:
        tried: how many.
        ends: how each ended, and how often.
        lost: what should not have been, in words.
    """

    tried: int = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (negative: by that signal) and its screen."""

    status: int
    out: str
    err: str

    @property
    def code(self) -> str:
        """Of the error that was shown."""
        found = [line for line in self.err.splitlines() if line.startswith("error[")]
        return found[0].partition("]")[0].removeprefix("error[") if found else ""


class Trials:
    """A tiny model, its rows, one untouched run, and all the ways to disturb another."""

    def __init__(self, folder: Path) -> None:
        from tiny_models import write_model
        from tiny_runs import sums, write_rows

        self.folder = folder
        self.model = write_model(folder / "tiny")
        self.data = write_rows(folder / "rows.jsonl", sums(110))
        self._number = 0
        self.patience, began = _FIRST, time.monotonic()
        ended = self.process(self.start(folder / "whole"))
        assert ended.status == 0, ended.err
        self.whole = result(folder / "whole")
        self.patience = 60 + _PATIENCE * (time.monotonic() - began)

    def start(self, run: Path) -> list[str]:
        return ["train", str(self.model), str(self.data), "-o", str(run), *SETTINGS]

    def place(self) -> Path:
        """A folder that nobody has used."""
        self._number += 1
        return self.folder / f"trial-{self._number}"

    def process(self, words: list[str], before: Callable[[], None] | None = None) -> Ended:
        """Run a command line in a forked process, disturbed by what `before` prepares there."""
        pid, screens = self.launch(words, before)
        return self.wait(pid, screens)

    def launch(
        self, words: list[str], before: Callable[[], None] | None = None
    ) -> tuple[int, list[Path]]:
        self._number += 1
        screens = [self.folder / f"screen-{self._number}.{name}" for name in ("out", "err")]
        pid = os.fork()
        if not pid:
            _child(words, screens, before)
        return pid, screens

    def wait(self, pid: int, screens: list[Path]) -> Ended:
        late = time.monotonic() + self.patience
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Ended(-999, "", "it hung")
            time.sleep(0.01)
        out, err = (path.read_text(errors="replace") for path in screens)
        return Ended(os.waitstatus_to_exitcode(status), out, err)

    def counts(self) -> dict[str, int]:
        """How many calls each phase of an untouched run makes."""
        told = self.folder / "counts.json"

        def count() -> None:
            seen: collections.Counter[str] = collections.Counter()
            _watch(lambda phase: seen.update([phase]))
            _at_exit(lambda: told.write_text(json.dumps(seen)))

        assert self.process(self.start(self.place()), count).status == 0
        found: dict[str, int] = json.loads(told.read_text())
        return found

    def ended_at(self, phase: str, call: int, number: int) -> tuple[Path, Ended]:
        """A run that gets a signal at a call of a phase."""
        run = self.place()

        def arm() -> None:
            left = [call]

            def at(where: str) -> None:
                if where == phase:
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), number)

            _watch(at)

        return run, self.process(self.start(run), arm)

    def go_on(self, run: Path) -> str:
        """Bring a run to its end as its user would; how, or what is wrong."""
        for _ in range(3):
            if (run / "manifest.json").is_file():
                break
            shown = self.process(["train", "--resume", str(run)])
            if shown.code in ("no-run",):
                shown = self.process(self.start(run))
                how = "started again"
            else:
                how = "resumed"
            if problem := problem_of(shown):
                return problem
            if shown.status:
                return f"LOST: exit {shown.status}, {shown.code}: {shown.err[:300]}"
        else:
            return "LOST: it does not come to an end"
        if (run / "run.lock").exists():
            # Its owner was killed between the manifest and the end: nobody has to do anything.
            (run / "run.lock").unlink()
        now = result(run)
        differing = [key for key in self.whole if now.get(key) != self.whole[key]]
        if differing or now.keys() != self.whole.keys():
            return f"LOST: other {differing or sorted(now.keys() ^ self.whole.keys())}"
        return how if "how" in locals() else "was finished"


def problem_of(shown: Ended) -> str:
    if shown.status == -999:
        return "LOST: a hang"
    if "Traceback" in shown.err:
        return "LOST: a traceback: " + shown.err.strip().splitlines()[-1][:200]
    return ""


def result(run: Path) -> dict[str, Any]:
    """What must be equal: every file but for times and places."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or name in ("manifest.json", "env.json", "verify.json"):
            continue
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        elif name == "recipe.yaml":
            found[name] = path.read_text().replace(str(run), "RUN")
        elif name == "findings.jsonl" or name.startswith("checkpoints/"):
            found.setdefault(name.partition("/")[0], True)  # what happened is told there
        else:
            found[name] = path.read_bytes()
    return found


def _child(words: list[str], screens: list[Path], before: Callable[[], None] | None) -> None:
    """Never returns."""
    code = 99
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            default = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
        for path, descriptor in zip(screens, (1, 2), strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        _quick()
        if before:
            before()
        from truetune.cli import main

        try:
            main(words)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        for what in _last:
            what()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_last: list[Callable[[], Any]] = []


def _at_exit(what: Callable[[], Any]) -> None:
    _last.append(what)


def _quick() -> None:
    """Verify in this process, and short samples: a fresh process imports torch for seconds."""
    import truetune.job
    import truetune.pipeline
    import truetune.verify
    import truetune.verify.artifact
    from fresh_process import ask_here

    truetune.verify.artifact.ask = ask_here  # type: ignore[assignment]
    truetune.pipeline.verify = truetune.verify.verify
    truetune.job._SAMPLE_TOKENS = 4


def _watch(seen: Callable[[str], None]) -> None:
    """Be told of every call, of Python and of C, with the phase that it is made in."""
    stack: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if stack and event in ("call", "c_call"):
            seen(stack[-1])

    def within(function: Any, phase: str) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            stack.append(phase)
            sys.setprofile(profile)
            try:
                return function(*arguments, **named)
            finally:
                stack.pop()
                if not stack:
                    sys.setprofile(None)

        return wrapped

    import importlib

    for place, phase in _WHERE.items():
        module, _, names = place.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = names.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, within(getattr(owner, name), phase))


def after_step(step: int, what: Callable[[], None]) -> None:
    """Have something happen when a step of this process's run was told."""
    from truetune.screen import Screen

    told = Screen.step

    def after(self: Any, facts: Any, plan: Any) -> None:
        told(self, facts, plan)
        if facts.step == step:
            what()

    Screen.step = after  # type: ignore[method-assign]


# Faults of the machine.


def may_mount() -> bool:
    """Whether a process may have mounts of its own here."""
    pid = os.fork()
    if not pid:
        try:
            _own_mounts()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [text.encode() for text in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


_NEW_MOUNTS, _PRIVATE, _BIND, _REMOUNT, _READ_ONLY = 0x20000, 0x44000, 0x1000, 0x20, 0x1


def _own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", "", _PRIVATE)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes for this process alone, and a way to make it larger."""
    folder.mkdir()
    _own_mounts()
    _mount("tmpfs", str(folder), "tmpfs", 0, f"size={size}")
    yield lambda more: _mount("tmpfs", str(folder), "tmpfs", _REMOUNT, f"size={more}")


def apart(work: Callable[[], str]) -> str:
    """Do something in a forked process; what it says."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            said = work()
        except BaseException as error:
            said = f"LOST: {type(error).__name__}: {error}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(pid, 0)
    return said


def full_disk(trials: Trials, size: int) -> str:
    """A run on a disk of that size, which then gets room."""

    def work() -> str:
        folder = trials.place()
        with small_disk(folder, size) as grow:
            shown = trials.process(trials.start(folder / "run"))
            if problem := problem_of(shown):
                return problem
            if shown.status not in (0, 1, 2):
                return f"LOST: exit {shown.status}"
            if shown.status and "No space left" not in shown.err:
                return f"LOST: not said: {shown.err[:300]}"
            grow(1 << 30)
            return trials.go_on(folder / "run")

    return apart(work)


def read_only(trials: Trials, step: int) -> str:
    """A run whose file system becomes read-only after a step; resumed while it is, and after."""

    def work() -> str:
        _own_mounts()
        run = trials.place()

        def freeze() -> None:
            _mount(str(run), str(run), "", _BIND)
            _mount(str(run), str(run), "", _BIND | _REMOUNT | _READ_ONLY)

        first = trials.process(trials.start(run), lambda: after_step(step, freeze))
        again = trials.process(["train", "--resume", str(run)])
        for shown, codes in ((first, (1,)), (again, (2,))):
            if problem := problem_of(shown):
                return problem
            if shown.status not in codes or "Read-only file system" not in shown.err:
                return f"LOST: exit {shown.status}: {shown.err[:300]}"
        ctypes.CDLL(None).umount2(str(run).encode(), 2)
        return trials.go_on(run)

    return apart(work)


def little_memory(trials: Trials, megabytes: int) -> str:
    """A run that may take no more address space than it has and a little, then one that may."""
    run = trials.place()

    def arm() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    shown = trials.process(trials.start(run), arm)
    if problem := problem_of(shown):
        return problem
    return trials.go_on(run)


def other_clock(trials: Trials, jump: float) -> str:
    """The clock of the machine is set in the middle of a run."""
    run = trials.place()

    def arm() -> None:
        began, now = time.monotonic(), time.time
        time.time = lambda: now() + (jump if time.monotonic() - began > 0.3 else 0)

    shown = trials.process(trials.start(run), arm)
    if problem := problem_of(shown):
        return problem
    return trials.go_on(run)


def at_once(trials: Trials, kind: str) -> str:
    """Two processes that want the same run: one has it, the other is refused and changes nothing.

    Args:
        kind: "start" (two simultaneous), "resume" (two), "resume beside" or "overwrite beside" (a
            working run).
    """
    run = trials.place()
    if kind == "resume":
        trials.process(
            trials.start(run), lambda: after_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        )
    words = {
        "start": [trials.start(run)] * 2,
        "resume": [["train", "--resume", str(run)]] * 2,
        "resume beside": [trials.start(run), ["train", "--resume", str(run)]],
        "overwrite beside": [trials.start(run), [*trials.start(run), "--overwrite"]],
    }[kind]
    first = trials.launch(words[0])
    if kind.endswith("beside"):
        late = time.monotonic() + trials.patience
        while not (run / "recipe.yaml").is_file() and time.monotonic() < late:
            time.sleep(0.005)
    second = trials.launch(words[1])
    ended = [trials.wait(*second), trials.wait(*first)]
    for shown in ended:
        if problem := problem_of(shown):
            return problem
    codes = sorted(shown.status for shown in ended)
    refused = [shown.code for shown in ended if shown.status == 2]
    # Whoever comes when the other has ended is refused for that; --overwrite may then begin.
    known = {"run-busy", "run-exists", "run-finished"}
    if codes == [0, 2] and set(refused) <= known:
        return trials.go_on(run).replace("was finished", f"one ran, one was refused: {refused[0]}")
    if codes == [0, 0] and kind == "overwrite beside":
        return trials.go_on(run).replace("was finished", "one after the other")
    return f"LOST: exits {codes}: {[shown.err[:200] for shown in ended]}"
