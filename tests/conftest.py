"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# On a loaded machine seconds say nothing about the code.
settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def no_process_after_each_run() -> Iterator[None]:
    """A run ends with a fresh process that takes seconds to import torch; tests of that stage ask
    for it (`verified_runs`), others leave it out."""
    from truetune.verification.verdict import Check, Verdict

    def left_out(source: str, **_: Any) -> Verdict:
        return Verdict(source, (Check("opens", "not-checked", "left out by the tests"),))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("truetune.run.pipeline.verify", left_out)
        yield


@pytest.fixture
def verified_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end as they do for everybody."""
    from truetune.verification.artifact import verify

    monkeypatch.setattr("truetune.run.pipeline.verify", verify)


@pytest.fixture(scope="session", autouse=True)
def signals_as_at_a_terminal() -> None:
    """A suite that was started in the background inherits ignored signals; tests send them."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)
