"""One training run: the hooks of the training loop, the files that they write, and the final
artifact.

input   Prepared (proved examples, contract, plan), the loaded model, the run directory
does    metrics, samples and checkpoints while the loop runs; then artifact, then manifest
output  RunResult; every file of the run directory
"""

from __future__ import annotations

import contextlib
import gc
import json
import shlex
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.behaviour.steps import Probe, StepFacts, usual_probes
from truetune.behaviour.watch import not_taken, once
from truetune.compare import row_losses
from truetune.engine.checkpoint import (
    Checkpoint,
    gather_states,
    last_good,
    load_state,
)
from truetune.engine.memory import give_freed_pages_back
from truetune.engine.parallel import Group
from truetune.engine.trainer import SFTTrainer
from truetune.errors import (
    Collapsed,
    Interrupted,
    NonFiniteLoss,
    OutOfMemory,
    ToldElsewhere,
)
from truetune.findings import Finding, phrase
from truetune.listener import Listener
from truetune.model.load import LoadedModel
from truetune.model.lora import trainable_share
from truetune.model.new_tokens import RowsBefore
from truetune.model.save import SaveReport
from truetune.run.answers import outcome_of, sampled_answers, trained_answers
from truetune.run.artifact import rows_of_new_tokens, save_artifact
from truetune.run.checkpoint import write_checkpoint
from truetune.run.environment import environment
from truetune.run.load_model import load_start
from truetune.run.non_finite import find_cause
from truetune.run.outcome import Answer, judge
from truetune.run.pages import write_pages
from truetune.run.prepare import Prepared
from truetune.run.result import RunResult
from truetune.run.shared_replies import SharedReplies
from truetune.run.stop import BrokenOff, Stop, interruptible
from truetune.run.trackers import Trackers
from truetune.run.vital_signs import VitalSigns
from truetune.run_dir import (
    REWOUND,
    STEP,
    UNVERIFIED,
    VERDICT,
    RunDir,
    write_json,
    write_sealed,
    write_text,
)
from truetune.system.lazy import torch
from truetune.system.signals import Stopped, number_of
from truetune.verification.verdict import Verdict


@dataclass(frozen=True)
class _Judged:
    """What an evaluation says of a run.

    Attributes:
        findings: of the vital signs.
        healthy: they were taken, and show nothing worse than a note.
        is_best: no healthy evaluation had a lower held-out loss.
        waited_enough: nor did so many after the best one.
    """

    findings: list[Finding]
    healthy: bool
    is_best: bool
    waited_enough: bool


class Job:
    """One training run: the loop's hooks and what they write."""

    def __init__(
        self,
        run: RunDir,
        prepared: Prepared,
        loaded: LoadedModel,
        listener: Listener,
        trackers: Trackers,
        findings: list[Finding],
        group: Group,
    ) -> None:
        self.run, self.prepared, self.loaded, self.group = run, prepared, loaded, group
        self.plan = prepared.plan
        self.contract, self.listener, self.trackers = prepared.contract, listener, trackers
        self.findings = [*prepared.findings, *findings]
        for finding in findings:
            listener.finding(finding)
        self.replies = SharedReplies(group)
        self.signs = VitalSigns(run, prepared, self.contract, self.replies)
        # Findings of probes that were reported, by code and level: each is reported once.
        self.reported: set[tuple[str, str]] = set()
        self.rows_before: RowsBefore | None = None
        if prepared.new_tokens and group.leads:
            self.rows_before = rows_of_new_tokens(prepared, loaded, at_start=True)
        listener.stage("probing the model and its memory")
        self.trainer = self._trainer()
        self.steps = 0
        self.last_loss = float("nan")
        self.last_eval: float | None = None
        self.answers: tuple[Answer, ...] = ()
        # None if the trained model is no adapter; and its commit.
        self.base = loaded.base if loaded.is_adapter else None
        self.base_revision = loaded.base_revision if self.base else None
        self._samples_now: list[dict[str, Any]] = []

    def _trainer(self) -> SFTTrainer:
        return SFTTrainer.of_plan(
            self.loaded.model,
            self.plan,
            examples=self.prepared.examples,
            pad_id=self.contract.pad_id,
            eval_iters=0,
            autocast_dtype=self.loaded.compute_dtype,
            group=self.group,
            probes=[self._milder(probe) for probe in usual_probes()],
            on_step=self.on_step,
            on_eval=self.on_eval,
            on_finding=self._step_found,
        )

    def _milder(self, probe: Probe) -> Probe:
        """With --on-collapse continue, a run continues as long as its numbers are finite."""

        def ask(facts: StepFacts) -> Finding | None:
            finding = probe(facts)
            if finding is None or self.plan.on_collapse != "continue":
                return finding
            return finding if finding.code == NonFiniteLoss.default_code else _warned(finding)

        return ask

    def _step_found(self, finding: Finding) -> None:
        """What the loop found; rows that it names are indices of examples."""
        if finding.rows:
            rows = [int(row) for row in finding.rows]
            if finding.code == "loss-spike" and len(hardest := self._hardest(rows)) < len(rows):
                why = f"of the {len(rows)} examples of the step, these have the highest loss"
                rows, finding = hardest, replace(finding, count=len(hardest), why=why)
            names = tuple(self.prepared.rows[row] for row in rows)
            finding = replace(finding, where=names[0], rows=names)
        self._found(finding)

    def _hardest(self, rows: list[int]) -> list[int]:
        """Those of a step's examples that stand behind its loss: far above the middle of them, or
        the first of all; the highest first."""
        examples = [self.prepared.examples[row] for row in rows]
        # Whatever a model raises when it is asked again: all of the step are named.
        try:
            summed = row_losses(self.loaded, [(e.ids, e.mask) for e in examples])
        except (RuntimeError, ValueError):
            return rows
        mean = {
            row: loss / max(sum(example.mask), 1)
            for row, loss, example in zip(rows, summed, examples, strict=True)
        }
        order = sorted(mean, key=lambda row: -mean[row])
        least = _ABOVE_MIDDLE * statistics.median(mean.values())
        return [row for row in order if mean[row] > least] or order[:1]

    def write_start(self) -> None:
        """What is known before the first step."""
        import yaml

        trainable, total = trainable_share(self.loaded.model)
        facts = {
            "trainable_parameters": trainable,
            "parameters": total,
            "choices": [vars(choice) for choice in self.loaded.choices],
            "route": {
                "kind": self.trainer.route.kind,
                "reason": self.trainer.route.reason,
                "micro_batch_tokens": self.trainer.limits.tokens if self.trainer.limits else None,
            },
            "processes": self.group.size,
            "check": "skipped by --no-check" if self.plan.no_check else "passed",
        }
        recipe = yaml.safe_dump(self.plan.rows(), sort_keys=False, allow_unicode=True)
        write_json(self.run.file("contract.json"), self.contract.as_dict())
        write_text(self.run.file("recipe.yaml"), recipe)
        write_json(self.run.file("data.json"), self.prepared.data)
        write_json(self.run.file("env.json"), {**environment(), **facts})
        self.run.replace_lines("findings.jsonl", [f.as_dict() for f in self.findings])
        self.listener.planned(self.plan, {**facts, "data": self.prepared.data})
        self.trackers.start(self.plan.rows())

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Seed a new run, or continue a checkpoint's."""
        # Each process draws dropout of its own.
        torch.manual_seed(self.plan.seed + self.group.rank)
        with self.group.together():
            if checkpoint:
                load_state(
                    self.trainer, checkpoint.folder, run=self.identity(), facts=checkpoint.facts
                )
            self._rewind()
            self._recall_rate()
        self._recall_loss()
        self._evaluate_again()

    def _rewind(self) -> None:
        self.run.rewind(self.trainer.step)

    def _recall_loss(self) -> None:
        """The loss of the step that a checkpoint was saved after: it may have been the last one."""
        written = [
            line["loss"]
            for line in self.run.lines("metrics.jsonl")
            if "loss" in line and line["step"] <= self.trainer.step
        ]
        if self.trainer.step and written:
            self.last_loss = written[-1]

    def _evaluate_again(self) -> None:
        """A checkpoint is saved before its step is evaluated: the run may have been killed between
        the two, or between the loss and the samples."""
        step = self.trainer.step
        if step % self.plan.eval_steps and step < self.plan.max_steps:
            return
        self._keep_until(step)
        if step:
            self.trainer.evaluate_now(self.prepared.eval_examples)

    def _keep_until(self, step: int) -> None:
        """Remove what was written about the evaluation of a step."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [v for v in self.run.lines(name) if v["step"] < step or "loss" in v]
            self.run.replace_lines(name, kept)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued exactly."""
        return identity(self.prepared, self.group.size)

    def train_and_save(self) -> SaveReport:
        """The loop, then the artifact."""
        try:
            with interruptible(self.at_work, self.group) as stop:
                self.train(stop)
                self._ask()
                report = self._save_artifact()
                self._keep_for_later(report)
            if stop.number is not None:
                raise self.interrupted("stopped when all steps were done", stop.number)
            return report
        except NonFiniteLoss as error:
            self._keep_batch(error)
            raise
        except Collapsed as error:
            self.run.append("findings.jsonl", error.finding.as_dict())
            error.where = error.where or str(self.run.path)
            path = shlex.quote(str(self.run.path))
            if self.run.file(REWOUND).is_file():
                error.why += (
                    "; the run had already returned to a checkpoint, which it does only once"
                )
            error.fix += (
                f"; to continue anyway: `truetune train --resume {path} --on-collapse continue`"
            )
            raise
        except OutOfMemory as error:
            error.where = ", ".join(self.prepared.rows[row] for row in error.rows)
            raise
        except (KeyboardInterrupt, Stopped) as error:
            raise self.interrupted("stopped immediately", number_of(error)) from None

    def train(self, stop: Stop) -> None:
        """All steps.

        Raises:
            Interrupted: a signal stopped one of the processes; the last step is saved.
            Collapsed: a probe stopped the run, and it does not go back.
        """
        examples = self.prepared.eval_examples or None
        self._stop = stop
        done = False
        while not done:
            try:
                with contextlib.suppress(BrokenOff):
                    if not self.trainer.step:
                        self.trainer.evaluate_now(examples)
                        self._keep_healthy()
                    self.trainer.train(examples)
                done = True
            except Collapsed as error:
                if not self._goes_back(error):
                    raise
        numbers = [number for number in self.group.gather(stop.number) if number is not None]
        if numbers:
            self.save_checkpoint()
            raise self.interrupted(
                f"stopped after step {self.trainer.step}; it is saved", numbers[0]
            )
        self._take_best()
        self.steps = self.trainer.step

    def at_work(self) -> SFTTrainer | None:
        """The trainer; None while another one is being created."""
        return getattr(self, "trainer", None)

    def _keep_for_later(self, report: SaveReport) -> None:
        """All that the end of the run needs: one that is stopped while the artifact is verified
        goes on with that. Several processes go on together, from their last checkpoint."""
        if self.group.size > 1:
            return
        facts = {
            "run": self.identity(),
            "artifact": report.folder.name,
            "files": {file.name: file.sha256 for file in report.files},
            "dtype": report.dtype,
            "cast_error": report.cast_error,
            "steps": self.steps,
            "train_loss": self.last_loss,
            "eval_loss": self.last_eval,
            "base": self.base,
            "base_revision": self.base_revision,
            "answers": [vars(answer) for answer in self.answers],
        }
        write_sealed(self.run.file(UNVERIFIED), facts)

    def release(self) -> None:
        """Give the weights and the optimizer back: whoever opens the artifact needs the room."""
        del self.trainer
        self.loaded = replace(self.loaded, model=None)
        gc.collect()
        give_freed_pages_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def finish(self, report: SaveReport, verdict: Verdict | None) -> RunResult:
        """verify.json, and the manifest, last of all."""
        if verdict:
            write_json(self.run.file(VERDICT), verdict.as_dict())
            for finding in verdict.findings():
                # The error that ends the run shows them.
                self._record(finding)
        self.trackers.finish()
        for finding in write_pages(self.run):
            self._found(finding)
        self.run.finish(
            {
                "finished": True,
                "artifact": report.folder.name,
                "steps": self.steps,
                "train_loss": self.last_loss,
                "eval_loss": self.last_eval,
                "dtype": report.dtype,
                "rounding_of_weights": report.cast_error,
                "verified": verdict.passed if verdict else None,
            }
        )
        return self.result(report.folder, verdict)

    def result(self, artifact: Path, verdict: Verdict | None = None) -> RunResult:
        """Of the finished run."""
        return RunResult(
            self.run,
            artifact,
            self.plan,
            self.contract,
            self.last_loss,
            self.last_eval,
            self.findings,
            self.base,
            self.prepared.model.served_eos_ids,
            verdict,
            self.base_revision,
            self.answers,
        )

    def interrupted(self, what: str, number: int) -> Interrupted:
        """The error for a run that a signal ended."""
        saved = self.run.checkpoints()
        last = int(saved[-1].name.removeprefix(STEP)) if saved else 0
        trained = self.run.file(UNVERIFIED).is_file()
        go_on = "verify it" if trained else f"continue from step {last} of {self.plan.max_steps}"
        return Interrupted(
            what,
            where=str(self.run.path),
            fix=f"{go_on} with `truetune train --resume {shlex.quote(str(self.run.path))}`",
            number=number,
        )

    def on_step(self, facts: StepFacts) -> None:
        self.last_loss = facts.loss
        if facts.step % self.plan.logging_steps == 0 or facts.step == self.plan.max_steps:
            line = {
                "step": facts.step,
                "loss": facts.loss,
                "learning_rate": facts.learning_rate,
                "grad_norm": facts.grad_norm,
                "tokens": facts.num_tokens,
                "supervised_tokens": facts.num_supervised,
                "seconds": round(facts.seconds, 4),
            }
            self.run.append("metrics.jsonl", line)
            self.signs.trained(line)
            self.trackers.log(line, facts.step)
        self.listener.step(facts, self.plan)
        if self.is_saved_after(facts.step):
            self.save_checkpoint()

    def is_saved_after(self, step: int) -> bool:
        """Whether a step is followed by a checkpoint; the last one by the artifact."""
        return step % self.plan.save_steps == 0 and step < self.plan.max_steps

    def on_eval(self, step: int, loss: float | None) -> None:
        """Held-out loss and vital signs, written and judged.

        Raises:
            Collapsed: they say so, and the run is not to go on.
        """
        self.last_eval = loss
        found = self.group.gather(self._judged(step, loss))[0]
        if found.healthy:
            self._keep_healthy()
        if found.is_best and step < self.plan.max_steps:
            self.save_checkpoint()
        worst = next((f for f in found.findings if f.level == "error"), None)
        if worst and self.plan.on_collapse != "continue":
            raise Collapsed(worst.what, why=worst.why, fix=worst.fix, code=worst.code)
        if found.waited_enough:
            self.trainer.stop_requested = True

    def _judged(self, step: int, loss: float | None) -> _Judged:
        """What an evaluation says of the run; of the process that writes."""
        due = self.signs.due(step, loss)
        self._write_eval(step, loss)
        findings = self._take_signs(step, loss) if due else []
        self.replies.finish()
        best = self.signs.best() if self.plan.patience else None
        return _Judged(
            findings,
            healthy=due and self.signs.healthy_step() == step,
            is_best=best is not None and best[0] == step,
            waited_enough=best is not None and self.signs.waited() >= (self.plan.patience or 0),
        )

    def _write_eval(self, step: int, loss: float | None) -> None:
        if loss is not None:
            self._write_metrics({"step": step, "eval_loss": loss}, step)
            self.listener.evaluated(step, loss)

    def _take_signs(self, step: int, loss: float | None) -> list[Finding]:
        """What the vital signs say; of the process that writes."""
        self.listener.stage("answering fixed prompts")
        try:
            measured, findings = self.signs.take(self.loaded, step, loss)
        except ToldElsewhere:
            raise
        except Exception as error:  # whatever a model's generation raises: training goes on
            self._tell([not_taken(step, error)])
            return []
        self._tell(self.signs.noticed())
        self._write_metrics(measured.vitals.as_dict(), step)
        self._samples_now = measured.samples
        for sample in measured.samples:
            self.run.append("samples.jsonl", sample)
        for sample in measured.samples[:_SHOWN_SAMPLES]:
            self.listener.sample(sample)
        self.trackers.samples(self._samples_now, step)
        goes_on = self.plan.on_collapse == "continue"
        # The error that ends the run shows itself.
        self._tell(
            [_warned(f) if goes_on else f for f in findings if goes_on or f.level != "error"]
        )
        return findings

    def _tell(self, findings: list[Finding]) -> None:
        for finding in once(findings, self.reported):
            self._found(finding)

    def _write_metrics(self, line: dict[str, Any], step: int) -> None:
        self.run.append("metrics.jsonl", line)
        self.trackers.log(line, step)

    # ------------------------------------------------------------------------- going back

    def _keep_healthy(self) -> None:
        """A run that may go back keeps what it goes back to."""
        step = self.trainer.step
        if self.plan.on_collapse == "rewind" and step < self.plan.max_steps:
            self.save_checkpoint()

    def _goes_back(self, error: Collapsed) -> bool:
        """Go back to the last healthy checkpoint with half the learning rate, once."""
        step = self.trainer.step
        if error.rows:
            error.where = self._named(error.rows)
        if self.plan.on_collapse != "rewind" or self.run.file(REWOUND).is_file():
            return False
        # No process records that the run went back before all processes have seen that it had not.
        self.group.gather("went on")
        healthy = [folder for folder in self.run.checkpoints() if folder <= self._last_healthy()]
        checkpoint, _ = last_good(healthy)
        if checkpoint is None:
            return False
        rate = self.trainer.max_lr / 2
        back = Finding(
            "rewound",
            "warning",
            f"the run collapsed at step {step:,} and went back to step "
            f"{checkpoint.facts['step']:,}, with a learning rate of {rate:.2g} instead of "
            f"{self.trainer.max_lr:.2g}: {error.what}",
            where=error.where,
            why=error.why,
            fix="nothing to do now; start the next run with the lower --learning-rate",
        )
        self.listener.stage("going back to the last healthy checkpoint")
        self._load(checkpoint)
        self._went_back({"from": step, "learning_rate": rate, "finding": back.as_dict()})
        with self.group.together():
            self._rewind()
        self.trainer.max_lr = rate
        self._recall_loss()
        self.reported.clear()
        self.signs.went_back()
        self._found(back)
        self._evaluate_again()
        return True

    def _load(self, checkpoint: Checkpoint) -> None:
        """Weights and trainer as they were at an earlier step."""
        self.release()
        self.loaded, _ = load_start(self.prepared, checkpoint.folder)
        trainer = self._trainer()
        with self.group.together():
            load_state(trainer, checkpoint.folder, run=self.identity(), facts=checkpoint.facts)
        self.trainer = trainer
        self.trainer.stop_requested = self._stop.number is not None

    def _take_best(self) -> None:
        """The step that is saved, of a run with patience: where the held-out loss was lowest."""
        best = self.group.gather(self.signs.best())[0] if self.plan.patience else None
        step = self.trainer.step
        if best is None or best[0] == step:
            return
        checkpoint, _ = last_good([self.run.checkpoint_path(best[0])])
        if checkpoint is None:
            return
        self.listener.stage("going back to the best checkpoint")
        self._load(checkpoint)
        self.last_eval = best[1]
        self._samples_now = [v for v in self.run.lines("samples.jsonl") if v["step"] == best[0]]
        self._recall_loss()
        self._found(_best_taken(step, self.plan.max_steps, *best))

    def _went_back(self, facts: dict[str, Any]) -> None:
        """Written first: a run that is killed here goes on with the same rate."""
        write_json(self.run.file(REWOUND), facts)

    def _recall_rate(self) -> None:
        """The learning rate of a run that went back before it was resumed."""
        path = self.run.file(REWOUND)
        if path.is_file():
            self.trainer.max_lr = json.loads(path.read_text(encoding="utf-8"))["learning_rate"]

    def save_checkpoint(self) -> None:
        """Of the step that was taken last; older ones leave as the plan says."""
        states = gather_states(self.trainer)
        folder = self.run.checkpoint_path(self.trainer.step)
        if folder.exists():
            return
        self.run.require_mine()
        again = f"`truetune train --resume {shlex.quote(str(self.run.path))}`"
        write_checkpoint(
            folder, self.trainer, self.loaded, self.contract, self.identity(), states, again
        )
        needed = self._needed()
        for old in self.run.checkpoints()[: -self.plan.save_total_limit]:
            if old not in needed:
                shutil.rmtree(old)
        self.listener.saved(str(folder))

    def _needed(self) -> set[Path]:
        """Checkpoints that may yet be gone back to."""
        needed = {self._last_healthy()} if self.plan.on_collapse == "rewind" else set()
        if self.plan.patience and (best := self.signs.best()):
            needed.add(self.run.checkpoint_path(best[0]))
        return needed

    def _last_healthy(self) -> Path:
        """What a run that collapses goes back to."""
        return self.run.checkpoint_path(self.signs.healthy_step())

    def _save_artifact(self) -> SaveReport:
        self.run.require_mine()
        self.listener.stage("saving and reloading")
        report = save_artifact(self.run, self.prepared, self.loaded, self.rows_before, self._found)
        self.listener.saved(str(report.folder))
        return report

    def _ask(self) -> None:
        """What the run has plainly not learned, by what it answers as served; the held-out prompts
        were answered at the last evaluation."""
        if self.prepared.is_text:
            return
        self.listener.stage("answering training prompts")
        trained = trained_answers(self.loaded, self.contract, self.prepared)
        self.answers = (*trained, *sampled_answers(self._samples_now))
        # Whatever followed the saved step does not describe it.
        lines = [v for v in self.run.lines("metrics.jsonl") if v["step"] <= self.trainer.step]
        for finding in judge(outcome_of(self.answers, lines, self.prepared, self.plan)):
            self._found(finding)

    def _found(self, finding: Finding) -> None:
        self._record(finding)
        self.listener.finding(finding)

    def _record(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.run.append("findings.jsonl", finding.as_dict())

    def _keep_batch(self, error: NonFiniteLoss) -> None:
        """The examples that broke the loss, for whoever looks."""
        tokens = self.contract.tokens
        rows = sorted(set(error.rows))
        kept = [
            {
                "where": self.prepared.rows[row],
                "ids": self.prepared.examples[row].ids,
                "mask": self.prepared.examples[row].mask,
                "text": tokens.decode(self.prepared.examples[row].ids),
            }
            for row in rows
        ]
        path = self.run.file("non_finite_batch.json")
        write_json(path, {"step": self.trainer.step + 1, "examples": kept})
        blamed: Iterable[int] = rows
        # Whatever a broken model raises when it is asked again: the error is reported as it is.
        with contextlib.suppress(RuntimeError, ValueError):
            examples = {row: self.prepared.examples[row] for row in rows}
            cause = find_cause(self.loaded, examples, self.trainer.step + 1)
            error.why, error.fix, blamed = cause.why, cause.fix, cause.rows or rows
        error.where = f"{self._named(blamed)}; all examples of the step are in {path}"
        self.run.append("findings.jsonl", error.finding.as_dict())

    def _named(self, rows: Iterable[int]) -> str:
        """The first few of the rows that examples come from."""
        return phrase((self.prepared.rows[row] for row in sorted(set(rows))), _NAMED)


# Replies that are shown while a run works; rows that an error names.
_SHOWN_SAMPLES, _NAMED = 4, 4
# Times the median loss of a step's examples, above which one stands behind a spike.
_ABOVE_MIDDLE = 2.0


def _warned(finding: Finding) -> Finding:
    """Turn an error into a warning, for a run that continues."""
    return replace(finding, level="warning") if finding.level == "error" else finding


def _best_taken(step: int, steps: int, best: int, loss: float) -> Finding:
    early = f" of {steps:,}" if step < steps else ""
    return Finding(
        "best-step-saved",
        "note",
        f"the model of step {best:,} is saved: its held-out loss, {loss:.4f}, is the lowest of the "
        f"{step:,} steps{early} that were taken",
        why="--patience selects the best step; replies at that step were healthy",
        fix="nothing to do; a new run with that many steps would also decay its learning rate "
        "fully",
    )


def identity(prepared: Prepared, processes: int) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued exactly."""
    return {
        **prepared.plan.identity(),
        "data": prepared.data["train"]["sha256"],
        "contract": prepared.contract.fingerprint(),
        "new_tokens": [token.text for token in prepared.new_tokens],
        "processes": processes,
    }
