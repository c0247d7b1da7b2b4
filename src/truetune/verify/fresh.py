"""Asking a fresh process, and getting plain values back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from truetune import child
from truetune.errors import TruetuneError


class VerifyError(TruetuneError):
    """The fresh process could not open what was saved."""

    default_code = "verify-failed"


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Start a process with nothing but the request, and wait for its reply.

    Raises:
        VerifyError: it could not open the artifact (with the error's own words), or died.
    """
    reply = child.ask(
        "truetune.verify.worker", json.dumps(request).encode("utf-8"), loads_models=True
    )
    if reply.status:
        raise VerifyError(
            f"the process that was to open it ended with {reply.status}",
            where=str(request["artifact"]["folder"]),
            why=reply.last_words or "killed, most likely for want of memory",
            fix="free some memory and run `truetune verify` again",
            code="verify-crashed",
        )
    found: dict[str, Any] = json.loads(reply.data)
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
