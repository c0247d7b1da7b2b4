"""Events of a run. The command line displays them; by default nothing is shown, because library
code never prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truetune.behaviour.steps import StepFacts
    from truetune.findings import Finding
    from truetune.recipe.plan import Plan


class Listener:
    """Receives the events of a run. Every method does nothing; override the ones that you need."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def progress(self, done: int, total: int | None) -> None:
        """The current stage made progress: `done` of `total`, which is None if unknown."""

    def finding(self, finding: Finding) -> None:
        """A finding was reported; each is reported once."""

    def planned(self, plan: Plan, facts: dict[str, Any]) -> None:
        """The plan of the run is known, and training is about to begin."""

    def step(self, facts: StepFacts, plan: Plan) -> None:
        """An optimizer step was taken."""

    def evaluated(self, step: int, loss: float) -> None:
        """The held-out rows were evaluated: `loss` is in nats per supervised token."""

    def sample(self, sample: dict[str, Any]) -> None:
        """The model answered a held-out prompt. Keys: step, messages, answer, stopped, expected."""

    def saved(self, path: str) -> None:
        """A checkpoint or the artifact was written to disk."""
