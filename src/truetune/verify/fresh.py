"""Asking a fresh process, and getting plain values back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.errors import TruetuneError


class VerifyError(TruetuneError):
    """The fresh process could not open what was saved."""

    default_code = "verify-failed"


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Start a process with nothing but the request, and wait for its reply.

    Raises:
        VerifyError: it could not open the artifact (with the error's own words), or died.
    """
    with tempfile.TemporaryDirectory(prefix="truetune-verify-") as folder:
        question, reply = Path(folder) / "request.json", Path(folder) / "reply.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "truetune.verify.worker", str(question), str(reply)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if not reply.is_file():
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise VerifyError(
                f"the process that was to open it ended with {done.returncode}",
                where=str(request["artifact"]["folder"]),
                why=last[0] if last else "killed, most likely for want of memory",
                fix="free some memory and run `truetune verify` again",
                code="verify-crashed",
            )
        found: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    if "error" in found:
        error = found["error"]
        raise VerifyError(
            error["what"],
            where=error["where"],
            why=error["why"],
            fix=error["fix"],
            code=error["code"],
        )
    return found
