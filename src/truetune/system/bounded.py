"""Limit the memory that one call of foreign code may use: beyond the limit, its allocations
fail."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# The limit is the whole process's: two who set it at once would put back each other's.
_one = threading.Lock()


@contextlib.contextmanager
def bounded(growth: int) -> Iterator[None]:
    """Let the process's own memory grow by so many bytes and no further; on Linux, elsewhere there
    is no such limit.

    Meant for a short call into a library that reports a failed allocation: what other threads
    allocate meanwhile counts too.
    """
    pages = _data_pages()
    if pages is None:
        yield
        return
    import resource

    with _one:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = pages * os.sysconf("SC_PAGE_SIZE") + growth
        if soft != resource.RLIM_INFINITY:
            most = min(most, soft)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_pages() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[5])
    except (OSError, ValueError, IndexError):
        return None
