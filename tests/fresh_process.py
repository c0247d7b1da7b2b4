"""The fresh process of verification, run in this one: files and JSON are all it shares."""

from __future__ import annotations

import json
from typing import Any

import pytest

from truetune.errors import TruetuneError
from truetune.verification import worker
from truetune.verification.fresh import VerifyError


def ask_here(request: Any) -> dict[str, Any]:
    """As `truetune.verification.fresh.ask`, without the seconds that a process costs."""
    try:
        found = worker.answer(json.loads(json.dumps(request)))
    except TruetuneError as error:
        parts = {"where": error.where, "why": error.why, "fix": error.fix, "code": error.code}
        raise VerifyError(error.what, **parts) from error
    answered: dict[str, Any] = json.loads(json.dumps(found))
    return answered


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truetune.verification.artifact.ask", ask_here)
