"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.findings import Finding, counted
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
        contract: how prompts are made and where answers end, in training and serving.
        train_loss, eval_loss: losses of the last step and of the last evaluation (None without
            held-out rows), in nats per supervised token.
        findings: all findings of the run.
        base: the base model, if an adapter was trained.
        base_revision: the commit of the base, if it came from the Hub.
        base_stop_ids: the tokens on which a server of the original model ends an answer.
        verdict: what a fresh process found; None if verification was turned off.
        answers: the model's answers to a few trained and held-out prompts, as served.
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
            f"{self.run.path}: {counted(self.plan.max_steps, 'step')}, loss "
            f"{self.train_loss:.4f}{held}; saved in {self.artifact}{verified}"
        )
