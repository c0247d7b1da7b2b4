"""Signals that ask a program to end: Ctrl-C, a scheduler's SIGTERM, a terminal that hangs up. All
are treated alike, and end with exit code 128 + the signal's number."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator

# SIGHUP does not exist on Windows.
_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# The last one that was raised: an exception that a destructor swallows must not be forgotten.
_raised: list[int] = []


class Stopped(BaseException):
    """The program was asked to end. Unlike Ctrl-C, which breaks off an answer in a chat, this is
    for nobody but the end of the program.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def number_of(error: BaseException) -> int:
    """The signal behind a KeyboardInterrupt."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise an exception, as Ctrl-C does: whatever was begun is cleaned up."""

    def stop(number: int, _: object) -> None:
        _raised.append(number)
        _survive_hangup(number)
        raise Stopped(number)

    try:
        with _handling(stop, [number for number in _ENDING if number != signal.SIGINT]):
            yield
    finally:
        _raised.clear()


@contextlib.contextmanager
def handled(ask: Callable[[int], None]) -> Iterator[None]:
    """The first signal asks for the end, and interrupts nothing unless `ask` raises. A second
    Ctrl-C ends at once; a scheduler's second SIGTERM says nothing new."""
    asked = False
    at_once = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        _survive_hangup(number)
        if asked and number == signal.SIGINT and callable(at_once):
            at_once(number, frame)  # type: ignore[arg-type]
        if not asked:
            asked = True
            ask(number)

    with _handling(stop, _ENDING):
        for number in _raised:
            stop(number, None)
        yield


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None], numbers: list[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handled in before.items():
        # nohup has its program ignore that the terminal hangs up. A shell that puts a job in the
        # background has it ignore Ctrl-C, and whoever sends SIGINT to such a job means it.
        if handled is not signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handled in before.items():
            # None: it was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handled is None else handled)


def _survive_hangup(number: int) -> None:
    """A terminal that is gone fails every write; the words for it go nowhere instead."""
    if number != getattr(signal, "SIGHUP", None):
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
