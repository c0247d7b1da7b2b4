"""What a run tells while it works. The command line draws it; tests record it; the default is
silence. Library code never prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truetune.behaviour.steps import StepFacts
    from truetune.findings import Finding
    from truetune.recipe.plan import Plan


class Listener:
    """Every method does nothing; override what you want to hear."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def progress(self, done: int, total: int | None) -> None:
        """Rows done in the current stage."""

    def finding(self, finding: Finding) -> None:
        """Something was found; told once."""

    def planned(self, plan: Plan, facts: dict[str, Any]) -> None:
        """The numbers of the run are known: the compute starts next."""

    def step(self, facts: StepFacts, plan: Plan) -> None:
        """An optimizer step is done."""

    def evaluated(self, step: int, loss: float) -> None:
        """Loss on the held-out rows, in nats per supervised token."""

    def sample(self, sample: dict[str, Any]) -> None:
        """An answer to a held-out prompt: step, messages, answer, stopped, expected."""

    def saved(self, path: str) -> None:
        """A checkpoint or the artifact is on disk."""
