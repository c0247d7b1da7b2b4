"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.findings import Finding
from truetune.recipe.plan import Plan
from truetune.run.outcome import Answer
from truetune.run_dir import RunDir
from truetune.verification.verdict import Verdict


@dataclass(frozen=True)
class RunResult:
    """The result of `train`.

    Attributes:
        run: the directory.
        artifact: adapter/ or model/ in it.
        plan: the numbers of the run.
        contract: what was trained and will be served.
        train_loss, eval_loss: of the last step and the last evaluation (None without held-out
            rows), in nats per supervised token.
        findings: all that was found.
        base: the model without adapter, where an adapter was trained.
        base_revision: its commit, where it came from the Hub.
        base_stop_ids: on which a server of the model that training started from ends an answer.
        verdict: what a fresh process found; None if it was not asked.
        answers: to a few trained and held-out prompts, asked as served.
    """

    run: RunDir
    artifact: Path
    plan: Plan
    contract: PromptContract
    train_loss: float
    eval_loss: float | None
    findings: list[Finding]
    base: str | None
    base_stop_ids: tuple[int, ...]
    verdict: Verdict | None = None
    base_revision: str | None = None
    answers: tuple[Answer, ...] = ()

    def __repr__(self) -> str:
        held = "" if self.eval_loss is None else f", held-out loss {self.eval_loss:.4f}"
        verified = "" if self.verdict is None else f"; verified: {self.verdict.passed}"
        return (
            f"{self.run.path}: {self.plan.max_steps:,} steps, loss {self.train_loss:.4f}{held}; "
            f"saved in {self.artifact}{verified}"
        )
