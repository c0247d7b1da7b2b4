"""Runs that are killed, stopped, starved and doubled, in forked copies of one process: what each
trial left, and whether it went on to the same bits as a run that nothing happened to."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# By the number of a call made in them; "verify" and "anywhere" by the clock, as their work is done
# by another process, or in single long calls.
PHASES = (
    "start-up",
    "reading rows",
    "first step",
    "step",
    "evaluation",
    "checkpoint",
    "artifact",
    "verify",
    "anywhere",
)
TIMED = ("verify", "anywhere")
SETTINGS = """--batch-size 8 --micro-batch-size 3 --max-steps 6 --learning-rate 1e-2 --save-steps 2
    --eval-steps 4 --lora --lora-r 4 --lora-dropout 0.3""".split()  # noqa: SIM905
# Seconds after which a process hangs: as a multiple of an untouched run, which a busy machine slows
# down like all others.
_PATIENCE, _FIRST = 20, 900.0
LOST = "LOST: "


def _phase_of_step(trainer: Any) -> str:
    return "step" if trainer.step else "first step"


# Whose calls count to which phase.
_WHERE: dict[str, str | Callable[[Any], str]] = {
    "_started": "start-up",
    "_read": "reading rows",
    "SFTTrainer._step": _phase_of_step,
    "SFTTrainer.evaluate": "evaluation",
    "Job.on_eval": "evaluation",
    "Job.save_checkpoint": "checkpoint",
    "Job._save_artifact": "artifact",
    "verify": "verify",
}
_MODULES = {
    "_started": "truetune.run.pipeline",
    "_read": "truetune.run.prepare",
    "verify": "truetune.run.pipeline",
    "SFTTrainer": "truetune.engine.trainer",
    "Job": "truetune.run.job",
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

    def count(self, said: str) -> None:
        self.tried += 1
        if said.startswith(LOST):
            self.lost.append(said.removeprefix(LOST))
        else:
            self.ends[said] += 1


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
        import torch

        from tiny_models import write_model
        from tiny_runs import sums, write_rows

        # A forked copy of a process whose math library has threads waits for them for ever.
        torch.set_num_threads(1)
        self.folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.model = write_model(folder / "tiny")
        self.data = write_rows(folder / "rows.jsonl", sums(110))
        self._number = 0
        self.patience = _FIRST
        self._import_all()
        began = time.monotonic()
        ended = self.process(self.start(folder / "whole"))
        assert ended.status == 0, ended.err
        self.seconds = time.monotonic() - began
        self.whole = result(folder / "whole")
        self.patience = 60 + _PATIENCE * self.seconds

    def _import_all(self) -> None:
        """What a run imports on its way, once for all copies."""
        told = self.folder / "modules"
        run = self.start(self.place())
        self.process(run, lambda: _last.append(lambda: told.write_text("\n".join(sys.modules))))
        for name in told.read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        # A copy that collects garbage would copy all of these pages.
        gc.collect()
        gc.freeze()

    def start(self, run: Path) -> list[str]:
        return ["train", str(self.model), str(self.data), "-o", str(run), *SETTINGS]

    def place(self) -> Path:
        """A folder that nobody has used."""
        self._number += 1
        return self.folder / f"trial-{self._number}"

    def process(
        self, words: list[str], before: Callable[[], None] | None = None, *, fresh: bool = False
    ) -> Ended:
        """Run a command line in a forked process, disturbed by what `before` prepares there.

        Args:
            fresh: verify in a fresh process, as everybody's runs do; it takes seconds to start.
        """
        return self.wait(*self.launch(words, before, fresh=fresh))

    def launch(
        self, words: list[str], before: Callable[[], None] | None = None, *, fresh: bool = False
    ) -> tuple[int, list[Path]]:
        self._number += 1
        screens = [self.folder / f"screen-{self._number}.{name}" for name in ("out", "err")]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _child(words, screens, before, self.temporary, fresh=fresh)
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
            time.sleep(0.005)
        out, err = (path.read_text(errors="replace") for path in screens)
        for path in screens:
            path.unlink()
        return Ended(os.waitstatus_to_exitcode(status), out, err)

    def left_running(self) -> list[int]:
        """Processes that a trial's process started, and that outlived it for seconds."""
        mark = f"TMPDIR={self.temporary}".encode()
        late = time.monotonic() + 10
        while True:
            found = []
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):
                    # What exec was given: forked copies of this process do not have it.
                    if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
            if not found or time.monotonic() > late:
                return found
            time.sleep(0.02)

    def counts(self, *, timed: bool = True) -> dict[str, float]:
        """How many calls each phase of an untouched run makes; of those by the clock, its
        seconds."""
        told = self.folder / "counts.json"

        def count() -> None:
            seen: collections.Counter[str] = collections.Counter()
            _watch(lambda phase: seen.update([phase]))
            _last.append(lambda: told.write_text(json.dumps(seen)))

        ended = self.process(self.start(self.place()), count)
        assert ended.status == 0, ended.err
        found: dict[str, float] = json.loads(told.read_text())
        if not timed:
            return found
        began = time.monotonic()
        assert self.process(self.start(self.place()), fresh=True).status == 0
        whole = time.monotonic() - began
        return {**found, "verify": max(whole - self.seconds, 1.0), "anywhere": whole}

    def ended_at(self, phase: str, point: float, number: int) -> tuple[Path, Ended]:
        """A run that gets a signal in a phase.

        Args:
            point: at which call, or after how many seconds.
        """
        run = self.place()

        def later() -> None:
            def send() -> None:
                time.sleep(point)
                os.kill(os.getpid(), number)

            threading.Thread(target=send, daemon=True).start()

        def arm() -> None:
            if phase == "anywhere":
                later()
                return
            left = [1 if phase in TIMED else int(point)]

            def at(where: str) -> None:
                if where == phase:
                    left[0] -= 1
                    if not left[0]:
                        later() if phase in TIMED else os.kill(os.getpid(), number)

            _watch(at, only=phase)

        return run, self.process(self.start(run), arm, fresh=phase in TIMED)

    def signalled(self, phase: str, point: float, number: int) -> str:
        """How a run ended and went on that got a signal in a phase."""
        run, shown = self.ended_at(phase, point, number)
        place = f" ({phase}, {point:.5g})"
        if running := self.left_running():
            return f"{LOST}processes {running} outlived the run{place}"
        if number == signal.SIGKILL:
            if shown.status not in (-number, 0):
                return f"{LOST}exit {shown.status}: {shown.err[:300]}{place}"
        else:
            if problem := problem_of(shown):
                return problem + place
            if shown.status not in (128 + number, 0):
                return f"{LOST}exit {shown.status}: {shown.err[:300]}{place}"
            if (run / "run.lock").exists():
                return f"{LOST}the lock was left behind{place}"
            if shown.status == 0 and not (run / "manifest.json").is_file():
                return f"{LOST}exit 0 without an end{place}"
        said = self.go_on(run)
        return said + place if said.startswith(LOST) else said

    def points(self, phase: str, most: float, number: int, name: str) -> Iterator[float]:
        """One at random from each of so many equal parts of a phase."""
        drawn = random.Random(f"{phase} {name}")
        for part in range(number):
            point = (part + drawn.random()) * most / number
            yield point if phase in TIMED else 1 + int(point)

    def killed_run(self, step: int) -> Path:
        """A run that was killed after a step."""
        run = self.place()
        self.process(
            self.start(run),
            lambda: after_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        )
        return run

    def go_on(self, run: Path) -> str:
        """Bring a run to its end as its user would; how, or what is wrong."""
        how = "already finished"
        for _ in range(3):
            if (run / "manifest.json").is_file():
                break
            shown = self.process(["train", "--resume", str(run)])
            how = "resumed"
            if shown.code == "no-run":
                shown = self.process(self.start(run))
                how = "started again"
            if problem := problem_of(shown):
                return problem
            if shown.status:
                return f"{LOST}exit {shown.status}, {shown.code}: {shown.err[:300]}"
        else:
            return f"{LOST}it does not come to an end"
        # Its owner was killed between the manifest and the end: nobody has to do anything.
        (run / "run.lock").unlink(missing_ok=True)
        now = result(run)
        differing = [key for key in self.whole if now.get(key) != self.whole[key]]
        if differing or now.keys() != self.whole.keys():
            return f"{LOST}other {differing or sorted(now.keys() ^ self.whole.keys())}"
        if how != "already finished" and (left := sorted(p.name for p in self.temporary.iterdir())):
            return f"{LOST}left in the temporary folder: {left}"
        shutil.rmtree(run)
        return how


def problem_of(shown: Ended) -> str:
    if shown.status == -999:
        return f"{LOST}a hang"
    if "Traceback" in shown.err:
        return f"{LOST}a traceback: " + " | ".join(shown.err.strip().splitlines()[-4:])[:400]
    return ""


def result(run: Path) -> dict[str, Any]:
    """What must be equal: every file but for times and places."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or name in ("manifest.json", "env.json"):
            continue
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        elif name == "recipe.yaml":
            recipe = yaml.safe_load(path.read_text().replace(str(run), "RUN"))
            # A run that took another's place is the same run.
            found[name] = {key: value for key, value in recipe.items() if key != "overwrite"}
        elif name == "verify.json":
            found[name] = path.read_text().replace(str(run), "RUN")
        elif name == "report.html" or name.endswith("/README.md"):
            found[name] = True  # they name their folder, and are made of the others
        elif name == "findings.jsonl" or name.startswith("checkpoints/"):
            found.setdefault(name.partition("/")[0], True)  # what happened is told there
        elif name == "verify_rows.jsonl":
            *rows, last = path.read_text().splitlines()
            record = json.loads(last)["record"]
            record["run"].pop("recipe.yaml")  # it names the folder
            found[name] = [*rows, record]
        else:
            found[name] = path.read_bytes()
    return found


_last: list[Callable[[], Any]] = []


def _child(
    words: list[str],
    screens: list[Path],
    before: Callable[[], None] | None,
    temporary: Path,
    *,
    fresh: bool,
) -> None:
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
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        _quick(fresh=fresh)
        if before:
            before()
        from truetune.cli.verbs import main

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


def _quick(*, fresh: bool) -> None:
    """Short samples, and verify in this process: a fresh one imports torch for seconds."""
    import truetune.behaviour.measure
    import truetune.run.pipeline
    from truetune.verification import artifact

    if not fresh:
        from fresh_process import ask_here

        artifact.ask = ask_here
    truetune.run.pipeline.verify = artifact.verify
    truetune.behaviour.measure.REPLY_TOKENS = 4


def _watch(seen: Callable[[str], None], only: str = "") -> None:
    """Be told of every call, of Python and of C, with the phase that it is made in."""
    stack: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if stack and event in ("call", "c_call"):
            seen(stack[-1])

    def within(function: Any, named: str | Callable[[Any], str]) -> Any:
        def wrapped(*arguments: Any, **words: Any) -> Any:
            phase = named if isinstance(named, str) else named(arguments[0])
            stack.append(phase)
            sys.setprofile(profile if only in ("", phase) else None)
            try:
                return function(*arguments, **words)
            finally:
                stack.pop()
                sys.setprofile(profile if stack and only in ("", stack[-1]) else None)

        return wrapped

    for place, phase in _WHERE.items():
        *outer, name = place.split(".")
        owner: Any = importlib.import_module(_MODULES[place.split(".")[0]])
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, within(getattr(owner, name), phase))


def after_step(step: int, what: Callable[[], None]) -> None:
    """Have something happen when a step of this process's run was told."""
    from truetune.cli.screen import Screen

    told = Screen.step

    def after(self: Any, facts: Any, plan: Any) -> None:
        told(self, facts, plan)
        if facts.step == step:
            what()

    Screen.step = after  # type: ignore[method-assign]


# Faults of the machine.

_NEW_MOUNTS, _PRIVATE, _BIND, _REMOUNT, _READ_ONLY = 0x20000, 0x44000, 0x1000, 0x20, 0x1


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
            traceback.print_exc()
            said = f"{LOST}{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(pid, 0)
    return said


def full_disk(trials: Trials, size: int) -> str:
    """A run on a disk of that size, which then gets room."""

    folder = trials.place()

    def work() -> str:
        with small_disk(folder, size) as grow:
            shown = trials.process(trials.start(folder / "run"))
            if problem := problem_of(shown):
                return f"{problem} (disk of {size:,} bytes)"
            if shown.status not in (0, 1, 2):
                return f"{LOST}exit {shown.status} (disk of {size:,} bytes)"
            if shown.status and "No space left" not in shown.err:
                return f"{LOST}not said: {shown.err[:300]} (disk of {size:,} bytes)"
            grow(1 << 30)
            said = trials.go_on(folder / "run")
            return f"{said} (disk of {size:,} bytes)" if said.startswith(LOST) else said

    return apart(work)


def read_only(trials: Trials, step: int) -> str:
    """A run whose file system becomes read-only after a step; resumed while it is, and after."""

    run = trials.place()

    def work() -> str:
        _own_mounts()

        def freeze() -> None:
            _mount(str(run), str(run), "", _BIND)
            _mount(str(run), str(run), "", _BIND | _REMOUNT | _READ_ONLY)

        first = trials.process(trials.start(run), lambda: after_step(step, freeze))
        again = trials.process(["train", "--resume", str(run)])
        for shown, codes in ((first, (1,)), (again, (2,))):
            if problem := problem_of(shown):
                return problem
            if shown.status not in codes or "Read-only file system" not in shown.err:
                return f"{LOST}exit {shown.status}: {shown.err[:300]}"
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
        return f"{problem} ({megabytes} MB)"
    # A C++ library that finds no memory in a thread of its own ends the process uncaught.
    aborted = shown.status == -signal.SIGABRT
    if shown.status < 0 and not aborted:
        return f"{LOST}ended by {-shown.status} ({megabytes} MB)"
    said = trials.go_on(run)
    if said.startswith(LOST):
        return f"{said} ({megabytes} MB)"
    return f"ended by a library, {said}" if aborted else said


def other_clock(trials: Trials, jump: float) -> str:
    """The clock of the machine is set in the middle of a run, which is then killed and resumed."""
    run = trials.place()

    def arm() -> None:
        now = time.time
        ahead = [0.0]
        time.time = lambda: now() + ahead[0]

        def set_clock() -> None:
            ahead[0] = jump

        after_step(2, set_clock)
        after_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))

    shown = trials.process(trials.start(run), arm)
    if shown.status != -signal.SIGKILL:
        return f"{LOST}exit {shown.status}: {shown.err[:300]}"
    return trials.go_on(run)


def at_once(trials: Trials, kind: str, delay: float = 0.0) -> str:
    """Two processes that want the same run: one has it, the other is refused and changes nothing.

    Args:
        kind: "start" (two simultaneous), "resume" (two), "resume beside" or "overwrite beside" (a
            working run).
        delay: seconds after which the second one comes.
    """
    run = trials.killed_run(3) if kind == "resume" else trials.place()
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
    time.sleep(delay)
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
        return trials.go_on(run).replace(
            "already finished", f"one ran, one was refused: {refused[0]}"
        )
    if codes == [0, 0] and kind == "overwrite beside":
        return trials.go_on(run).replace("already finished", "one after the other")
    return f"{LOST}exits {codes}: {[shown.err[:200] for shown in ended]}"


def exports_at_once(trials: Trials, delay: float) -> str:
    """Two exports of one run into one folder: one is there whole, the other is refused."""
    whole, output = trials.folder / "whole", trials.place()
    words = ["export", str(whole), "--merge", "-o", str(output)]
    first = trials.launch(words)
    time.sleep(delay)
    second = trials.launch(words)
    ended = [trials.wait(*second), trials.wait(*first)]
    for shown in ended:
        if problem := problem_of(shown):
            return problem
    codes = sorted(shown.status for shown in ended)
    refused = [shown.code for shown in ended if shown.status == 2]
    if codes != [0, 2] or refused[0] not in ("output-exists", "output-busy"):
        return f"{LOST}exits {codes}: {[shown.err[:200] for shown in ended]}"
    left = [path.name for path in trials.folder.iterdir() if output.name in path.name]
    if left != [output.name]:
        return f"{LOST}left behind: {left}"
    alone = trials.folder / "exported"
    if not alone.exists():
        assert trials.process([*words[:-1], str(alone)]).status == 0
    for path in sorted(alone.iterdir()):
        if path.name == "README.md":
            # The card names its folder.
            continue
        one, two = (
            (folder / path.name).read_bytes().replace(str(folder).encode(), b"FOLDER")
            for folder in (alone, output)
        )
        if one != two:
            return f"{LOST}{path.name} is another"
    shutil.rmtree(output)
    return f"one is complete, one was refused: {refused[0]}"


# Checkpoints that are not as they were written.

DAMAGES = ("a bit flipped", "cut in half", "emptied", "removed", "of another run", "a file added")


def damaged(trials: Trials, killed: Path, other: Path, file: str, how: str, both: bool) -> str:
    """A run whose last checkpoint was damaged, or both of them, is resumed.

    Args:
        killed: a run with checkpoints of steps 2 and 4; it is copied.
        other: a run of another seed, killed at the same place.
    """
    run = trials.place()
    shutil.copytree(killed, run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(killed), str(run)))
    (run / "run.lock").unlink(missing_ok=True)
    names = ["step-00000002", "step-00000004"]
    for name in names if both else names[1:]:
        path = run / "checkpoints" / name / file
        content = bytearray(path.read_bytes())
        if how == "a bit flipped":
            at = random.Random(f"{file} {name}").randrange(8 * len(content))
            content[at // 8] ^= 1 << at % 8
        elif how == "cut in half":
            del content[len(content) // 2 :]
        elif how == "emptied":
            content.clear()
        elif how == "of another run":
            content[:] = (other / "checkpoints" / name / file).read_bytes()
        path.write_bytes(content)
        if how == "removed":
            path.unlink()
        elif how == "a file added":
            path.with_name(f"added-{file}").write_bytes(content)
    unchanged = (
        path.is_file()
        and path.read_bytes() == (killed / "checkpoints" / names[1] / file).read_bytes()
    )
    place = f" ({file}, {how}{', both' if both else ''})"
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    shown = trials.process(["train", "--resume", str(run)])
    if problem := problem_of(shown):
        return problem + place
    if unchanged and how == "of another run":
        # Tokenizer and config are the same in every run.
        how, both = "the same bytes", False
    elif "checkpoint-damaged" not in shown.out + shown.err:
        return f"{LOST}nothing was said, exit {shown.status}{place}"
    if both:
        after = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
        if shown.status != 1 or before != after:
            return f"{LOST}exit {shown.status}, or files were changed{place}"
        shutil.rmtree(run)
        return "refused, nothing changed"
    if shown.status:
        return f"{LOST}exit {shown.status}: {shown.err[:300]}{place}"
    if not (run / "manifest.json").is_file():
        return f"{LOST}exit 0 without an end{place}"
    said = trials.go_on(run)
    if said.startswith(LOST):
        return said + place
    which = "the same, unchanged" if how == "the same bytes" else "the previous"
    return f"resumed from {which} checkpoint"
