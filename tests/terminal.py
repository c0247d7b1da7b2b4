"""A command at a terminal of its own: what it writes, and keys that are pressed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence


class Terminal:
    """A running command, whose terminal this is.

    Attributes:
        text: what it has written so far. It is always read: who writes to a terminal that nobody
            reads waits for ever.
    """

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process, self._end, self.text = process, end, ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Wait until a pattern stands in the text."""
        last = time.monotonic() + seconds
        while time.monotonic() < last and self._reader.is_alive():
            if found := re.search(pattern, self.text):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} is not in {self.text!r}")

    def press(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait(self, seconds: float) -> int:
        """The exit code, when all that was written is read."""
        code = self.process.wait(seconds)
        self._reader.join(seconds)
        return code

    def _read(self) -> None:
        # On Linux the end of the last writer is an error.
        with contextlib.suppress(OSError):
            while raw := os.read(self._end, 65536):
                self.text += raw.decode("utf-8", "replace")


@contextlib.contextmanager
def at_terminal(words: Sequence[str], **environment: str) -> Iterator[Terminal]:
    """Start a command whose terminal is a new one; it has ended when the block has."""
    import fcntl
    import pty
    import termios

    own, its = pty.openpty()

    def lead() -> None:
        # Ctrl-C reaches the group in front of the terminal that the process controls.
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        words, stdin=its, stdout=its, stderr=its, preexec_fn=lead, close_fds=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **environment},
    )  # fmt: skip
    os.close(its)
    try:
        yield Terminal(process, own)
    finally:
        process.kill()
        process.wait()
        os.close(own)
