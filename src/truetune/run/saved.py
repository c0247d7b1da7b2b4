"""Resume a run that was stopped after its artifact was saved and before it was verified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from truetune.engine.checkpoint import Checkpoint
from truetune.engine.parallel import Group
from truetune.findings import Finding
from truetune.listener import Listener
from truetune.model.save import SaveReport
from truetune.reporting.card import CARD
from truetune.run.job import Job, identity
from truetune.run.outcome import Answer
from truetune.run.prepare import Prepared
from truetune.run.trackers import Trackers
from truetune.run_dir import UNVERIFIED, RunDir, read_sealed, sha256


class Saved(Job):
    """A run that was stopped when its artifact was whole, and before it was verified: no weight is
    loaded, and no step is computed again.

    Args:
        facts: of `saved_facts`.
    """

    def __init__(
        self,
        run: RunDir,
        prepared: Prepared,
        facts: Mapping[str, Any],
        listener: Listener,
        trackers: Trackers,
        findings: list[Finding],
    ) -> None:
        self.run, self.prepared, self.group = run, prepared, Group()
        self.plan = prepared.plan
        self.contract, self.listener, self.trackers = prepared.contract, listener, trackers
        self.findings = [Finding(**line) for line in run.lines("findings.jsonl")]
        for finding in findings:
            self._found(finding)
        self.steps = facts.get("steps", self.plan.max_steps)
        self.last_loss, self.last_eval = facts["train_loss"], facts["eval_loss"]
        self.base, self.base_revision = facts["base"], facts["base_revision"]
        self.answers = tuple(Answer(**answer) for answer in facts["answers"])
        self._facts = facts

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Do nothing: training is complete."""

    def train_and_save(self) -> SaveReport:
        """Return the saved artifact."""
        facts = self._facts
        folder = self.run.file(facts["artifact"])
        return SaveReport(folder, (), facts["dtype"], facts["cast_error"], ())

    def release(self) -> None:
        """Do nothing: no weights were loaded."""


def saved_facts(run: RunDir, prepared: Prepared) -> dict[str, Any] | None:
    """What a run left that waits for nothing but its verification; None if it has to be
    trained: its artifact is not whole, or not what these rows and settings give."""
    try:
        facts, whole = read_sealed(run.file(UNVERIFIED))
        folder = run.file(facts["artifact"])
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        # The model card is written after the verification.
        there.discard(CARD)
        same = json.loads(json.dumps(identity(prepared, 1), default=str)) == facts["run"]
        if not whole or not same or there != facts["files"].keys():
            return None
        if any(sha256(folder / name) != digest for name, digest in facts["files"].items()):
            return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return facts
