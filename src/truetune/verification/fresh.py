"""Send a request to a fresh process, and receive plain values."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.errors import TruetuneError
from truetune.system import child


class VerifyError(TruetuneError):
    """The fresh process could not open what was saved."""

    default_code = "verify-failed"


# The module that the fresh process runs.
_WORKER: Path | str = "truetune.verification.worker"


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Start a process with nothing but the request, and wait for its reply.

    Raises:
        VerifyError: it could not open the artifact (with the error's own words), or died.
    """
    reply = child.ask(_WORKER, json.dumps(request).encode("utf-8"), loads_models=True)
    try:
        if reply.status:
            raise ValueError
        found: dict[str, Any] = json.loads(reply.data)
    except ValueError:
        folder = str(request["artifact"]["folder"])
        raise _crashed(reply.status, reply.errors, folder) from None
    if "error" in found:
        raise VerifyError(**found["error"])
    return found


def _crashed(code: int, said: str, folder: str) -> VerifyError:
    """Why it ended without a reply: an error in Python, no memory, or something unknown."""
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    frames = [line for line in lines if line.startswith('File "')]
    out_of_memory = code == -signal.SIGKILL or "MemoryError" in last or "out of memory" in last
    if out_of_memory:
        why = last or "the system killed it, most likely because of lack of memory"
        fix = "free some memory and run `truetune verify` again"
    elif any(line.startswith("Traceback") for line in lines):
        why = f"{last}\n{frames[-1]}" if frames else last
        fix = (
            "repair the Python environment if the error names a package or a file of another "
            "program; otherwise report it, with these lines"
        )
    else:
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = last or f"it printed nothing ({died})"
        fix = "run `truetune verify` again; report it if the error remains"
    return VerifyError(
        f"the process that loads the model ended with {code}",
        where=folder,
        why=why,
        fix=fix,
        code="verify-crashed",
    )
