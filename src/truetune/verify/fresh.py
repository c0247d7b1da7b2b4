"""Asking a fresh process, and getting plain values back.

The request goes through the process's standard input and the reply through its standard output:
nothing of the rows lies in a temporary folder, and the process ends when its parent does.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from truetune.errors import TruetuneError

# This very package, wherever it lies, and nothing else of that folder. -P: no module is taken from
# the working folder, in which anybody may have put a file named like one of Python's own.
_START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("truetune", sys.argv[1])
package = sys.modules["truetune"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from truetune.verify.worker import main
sys.exit(main())
"""
_PACKAGE = str(Path(__file__).parents[1] / "__init__.py")


class VerifyError(TruetuneError):
    """The fresh process could not open what was saved."""

    default_code = "verify-failed"


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Start a process with nothing but the request, and wait for its reply.

    Raises:
        VerifyError: it could not open the artifact (with the error's own words), or died.
    """
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, _PACKAGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
        )
        try:
            reply = _converse(process, request)
        finally:
            _end(process)
        if reply is None:
            complaints.seek(0)
            said = complaints.read().decode("utf-8", "replace")
            raise _crashed(process.returncode, said, str(request["artifact"]["folder"]))
    if "error" in reply:
        error = reply["error"]
        raise VerifyError(
            error["what"],
            where=error["where"],
            why=error["why"],
            fix=error["fix"],
            code=error["code"],
        )
    return reply


def _converse(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> Any:
    """The reply; None where there was no whole one."""
    assert process.stdin
    assert process.stdout
    # Where it died before it read all, it is told below.
    with contextlib.suppress(OSError):
        process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
        process.stdin.flush()
    # The input stays open: its end tells the process that its parent is gone.
    data = process.stdout.read()
    process.wait()
    with contextlib.suppress(ValueError):
        return json.loads(data)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened: no process and no pipe is left."""
    if process.poll() is None:
        process.kill()
        process.wait()
    pipes: list[IO[bytes] | None] = [process.stdin, process.stdout]
    for pipe in pipes:
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def _crashed(code: int, said: str, folder: str) -> VerifyError:
    """Why it ended without a reply: an error in Python, no memory, or something unknown."""
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    frames = [line for line in lines if line.startswith('File "')]
    out_of_memory = code == -signal.SIGKILL or "MemoryError" in last or "out of memory" in last
    if out_of_memory:
        why = last or "the system killed it, most likely for want of memory"
        fix = "free some memory and run `truetune verify` again"
    elif any(line.startswith("Traceback") for line in lines):
        why = f"{last}\n{frames[-1]}" if frames else last
        fix = (
            "mend the Python environment where the error names a package or a file of another "
            "program; else report it, with these lines"
        )
    else:
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = last or f"it said nothing ({died})"
        fix = "run `truetune verify` again; report it if it stays"
    return VerifyError(
        f"the process that was to open it ended with {code}",
        where=folder,
        why=why,
        fix=fix,
        code="verify-crashed",
    )
