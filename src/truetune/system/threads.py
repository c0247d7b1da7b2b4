"""A thread that nobody waits for.

`threading.Thread.start` waits for the new thread's first sign, and waits for ever where memory is
used up and the thread ends before it gives one.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from typing import Any


def begin(work: Callable[..., Any], *arguments: Any) -> None:
    """Start a thread that ends with the process.

    Raises:
        RuntimeError: the system gives no thread.
    """
    _thread.start_new_thread(work, arguments)
