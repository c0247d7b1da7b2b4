"""A thread, and no waiting for ever if there is no memory for one.

`threading.Thread.start` waits for the new thread's first sign, however long: a thread that finds no
memory ends before it gives one.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Any

# Seconds until a thread's first sign, on a machine with many times its load.
_FIRST = 30.0


def begin(work: Callable[..., Any], *arguments: Any) -> None:
    """Start a thread that ends with the process.

    Raises:
        RuntimeError: the system gives no thread, or it ended at once; as it is of threading's own.
    """
    begun = threading.Event()

    def run() -> None:
        begun.set()
        work(*arguments)

    _thread.start_new_thread(run, ())
    if not begun.wait(_FIRST):
        raise RuntimeError("can't start new thread: it ended before it began")
