"""Render in a separate process, with a memory limit and a deadline.

input   template source, special tokens, date, JSON texts, and jobs by the numbers of those texts
does    keeps one worker process, sends it jobs in batches, and stops it if one answer, or all
        answers of a template, exceed their limit of CPU time; a worker that ended in any other way
        is replaced once, because the system may have ended it
output  one answer per job, as `worker.py` returns it; ["hang"], ["slow"] or ["died", how] if there
        was none; a template that was stopped once is not run again
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truetune.errors import TruetuneError
from truetune.system import child, threads

# Processor seconds after which a template hangs. One render takes well under a millisecond; a very
# long conversation some tens.
DEADLINE = 15.0
# As often as long by the clock: a process on a crowded machine waits for its turn. Where the kernel
# measures no processor time, the clock decides.
_WAIT = 40.0 if hasattr(signal, "setitimer") else 1.0
# Processor seconds that all answers of one template may take together, beyond what texts take
# anyhow: a render takes 30 microseconds and a few for each kilobyte; allowed is a thousandfold.
TOTAL = 60.0
_PER_TEXT, _PER_MEGABYTE = 0.03, 10.0
# A loaded machine may take its time to import the libraries.
_START = 120.0
# A process that has closed its pipe has ended, or will at once.
_END = 10.0
_BATCH = 512

Answer = list[Any]


class Worker:
    """The worker process and the thread that reads its answers."""

    def __init__(self) -> None:
        self.process = child.start(
            Path(__file__).with_name("worker.py"),
            environment={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.owner = os.getpid()
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._ready: Answer = []
        # What it has of the texts of requests.
        self._texts: Sequence[str] = ()
        threads.begin(self._read)

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream
        try:
            for line in stream:
                self._answers.put(json.loads(line))
        except (OSError, ValueError):
            pass
        finally:  # whatever ends this thread, nobody waits for more
            self._answers.put(None)

    def send(self, request: dict[str, Any], texts: Sequence[str]) -> None:
        """Hand over a request, and the texts that its jobs name where they are different than those
        of the request before."""
        if texts is not self._texts:
            request, self._texts = {**request, "texts": texts}, texts
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone; the reader says so

    def ready(self) -> Answer:
        """["ready"] when its libraries are loaded, which is waited for; else as `receive`."""
        if self._ready != ["ready"]:
            self._ready = self._next(_START)
        return self._ready

    def receive(self) -> tuple[float, Answer]:
        """The next answer and its processor seconds; ["hang"] after the deadline, ["died", how]
        when the process has ended."""
        frame = self._next(_WAIT * DEADLINE)
        return (0.0, frame) if frame[0] in ("hang", "died") else (float(frame[0]), frame[1])

    def _next(self, seconds: float) -> Answer:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return ["hang"]
        return self._ended() if answer is None else answer

    def _ended(self) -> Answer:
        """How the process ended."""
        try:
            status = self.process.wait(_END)
        except subprocess.TimeoutExpired:
            return ["died", "it closed its pipe"]
        if hasattr(signal, "SIGPROF") and status == -signal.SIGPROF:
            return ["hang"]
        if status < 0:
            return ["died", f"signal {signal.Signals(-status).name}"]
        return ["died", f"exit code {status}"]

    @property
    def usable(self) -> bool:
        # A forked child must not talk through its parent's pipes.
        return self.process.poll() is None and self.owner == os.getpid()

    def kill(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()


_lock = threading.RLock()
_worker: Worker | None = None
# Templates that were stopped: their other rows are not waited for.
_stopped: dict[str, Answer] = {}
# Seconds that each template may still take.
_left: dict[str, float] = {}
_LAST = ("hang", "slow", "died", "memory", "size")


def _started() -> Worker:
    global _worker
    if _worker is None or not _worker.usable:
        if _worker is not None:
            _worker.kill()  # it is gone; its pipes are not
        _worker = Worker()
    return _worker


def start() -> None:
    """Start the worker in the background."""
    with _lock:
        _started()


# A contract that is fitted, tried with other arguments and saved asks about one template often.
@functools.lru_cache(maxsize=64)
def describe(source: str) -> Answer:
    """What a template reads and writes; see `worker.py`."""
    with _lock:
        if source not in _stopped:
            answer = _answers(source, {"describe": source}, 1, len(source))[0]
            if answer[0] not in _LAST:
                return answer
            _stopped[source] = answer
        return _stopped[source]


def render(
    source: str,
    special: dict[str, Any],
    date: str,
    texts: Sequence[str],
    jobs: Sequence[tuple[tuple[int, ...], int | None, bool, int]],
) -> list[Answer]:
    """One answer per job, in order. A template that had to be stopped is not run again.

    Args:
        texts: messages, tools and arguments as JSON, without repetition.
        jobs: (messages, tools, generation prompt, arguments) each, by the texts' numbers.
    """
    answers: list[Answer] = []
    sizes = [len(text) for text in texts]
    with _lock:
        for first in range(0, len(jobs), _BATCH):
            if source in _stopped:
                break
            batch = list(jobs[first : first + _BATCH])
            request = {"source": source, "special": special, "date": date, "jobs": batch}
            size = sum(sizes[number] for messages, *_ in batch for number in messages)
            answers += _answers(source, request, len(batch), size, texts)
            if answers[-1][0] in _LAST:
                _stopped[source] = answers[-1]
    return (
        answers + [_stopped[source]] * (len(jobs) - len(answers)) if source in _stopped else answers
    )


def _answers(
    source: str, request: dict[str, Any], number: int, size: int, texts: Sequence[str] = ()
) -> list[Answer]:
    """The answers to a request, within the time that so many texts of this size may take."""
    answers = _tried(source, request, number, size, texts)
    if answers[-1][0] != "died":
        return answers
    # Templates fail in Python's ways; what ends a process is mostly the system, and not the
    # template. One that does it twice is believed to.
    answers = [answer for answer in answers if answer[0] != "died"]
    if "jobs" in request:
        request = {**request, "jobs": request["jobs"][len(answers) :]}
    return answers + _tried(source, request, number - len(answers), size, texts)


def _tried(
    source: str, request: dict[str, Any], number: int, size: int, texts: Sequence[str]
) -> list[Answer]:
    worker = _started_twice()
    answers: list[Answer] = []
    try:
        worker.send({**request, "seconds": DEADLINE}, texts)
        left = _left.get(source, TOTAL) + number * _PER_TEXT + size * _PER_MEGABYTE / 2**20
        while len(answers) < number:
            seconds, answer = worker.receive()
            left -= seconds
            answers.append(answer if left > 0 else ["slow"])
            if answers[-1][0] in _LAST:
                # What it still has in hand belongs to a template that is not trusted any more.
                worker.kill()
                return answers + [answers[-1]] * (number - len(answers))
        # What was not used of a batch's own time is not saved up for others.
        _left[source] = min(left, _left.get(source, TOTAL))
    except BaseException:
        # Interrupted: the answers still to come would be taken for those of the next request.
        worker.kill()
        raise
    return answers


def _started_twice() -> Worker:
    """A worker that is ready.

    Raises:
        TruetuneError: two worker processes failed to start; no template caused this.
    """
    for _ in range(2):
        worker = _started()
        ready = worker.ready()
        if ready == ["ready"]:
            return worker
        worker.kill()
    how = f"no answer within {_START:g} seconds" if ready == ["hang"] else ready[1]
    raise TruetuneError(
        f"the process that renders chat templates did not start: {how}",
        why="the machine is out of memory or overloaded, or the installation is damaged",
        fix="free some memory and try again; otherwise check the output of `python -c 'import "
        "transformers'`",
        code="renderer-not-started",
    )


def placeholder(value: Any) -> str:
    """Return the form in which transformers passes values that are not plain data to a template."""
    return f"<{type(value).__name__}>"


@atexit.register
def _stop() -> None:
    if _worker is not None:
        _worker.kill()
