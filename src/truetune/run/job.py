"""A run at work: the loop's hooks, what they write, and the way to the finished artifact.

input   Prepared (proved examples, contract, plan), the loaded model, the run directory
does    metrics, samples and checkpoints while the loop runs; then artifact, then manifest
output  RunResult; every file of the run directory
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.compare import Measured
from truetune.contract.contract import PromptContract
from truetune.engine.checkpoint import Checkpoint, gather_states, load_state, save_state
from truetune.engine.memory import give_freed_pages_back
from truetune.engine.parallel import Group
from truetune.engine.probes import StepFacts
from truetune.engine.trainer import SFTTrainer
from truetune.errors import (
    Interrupted,
    NonFiniteLoss,
    OutOfMemory,
    SaveError,
    TruetuneError,
)
from truetune.findings import Finding
from truetune.generate import Sampling, replies, replies_to_ids
from truetune.listener import Listener
from truetune.model.load import LoadedModel
from truetune.model.lora import trainable_share
from truetune.model.new_tokens import RowsBefore, rows_now, rows_report
from truetune.model.readback import round_as_saved
from truetune.model.save import SaveReport, save_model
from truetune.recipe.plan import Plan
from truetune.run.environment import environment
from truetune.run.outcome import ROOM, Answer, Outcome, judge, mean, short_rows
from truetune.run.prepare import Prepared
from truetune.run.trackers import Trackers
from truetune.run_dir import STEP, RunDir, flush_folder, write_json, write_text
from truetune.system.signals import Stopped, number_of, told
from truetune.verification.artifact import VERDICT
from truetune.verification.new_tokens import written_findings, written_tokens
from truetune.verification.record import measure_rows, take_record, write_rows
from truetune.verification.verdict import Verdict

# Held-out prompts answered at each evaluation, for samples.jsonl.
_NUM_SAMPLES = 4
_SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class RunResult:
    """What `train` leaves.

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
        verdict: what a fresh process found; None where it was not asked.
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
        self.rows_before = self._rows(at_start=True) if prepared.new_tokens else None
        listener.stage("probing the model and its memory")
        self.trainer = self._trainer()
        self.last_loss = float("nan")
        self.last_eval: float | None = None
        self.answers: tuple[Answer, ...] = ()
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
            on_step=self.on_step,
            on_eval=self.on_eval,
            on_finding=self._found,
        )

    def _rows(self, *, at_start: bool = False) -> RowsBefore:
        """The rows of new tokens, and what all others hash to."""
        return rows_now(
            self.loaded.model,
            self.prepared.new_tokens,
            is_adapter=self.loaded.is_adapter,
            at_start=at_start,
        )

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
        import torch

        # Each process draws dropout of its own.
        torch.manual_seed(self.plan.seed + self.group.rank)
        with self.group.together():
            if checkpoint:
                load_state(
                    self.trainer, checkpoint.folder, run=self.identity(), facts=checkpoint.facts
                )
            self._rewind()
        self._recall_loss()
        self._evaluate_again()

    def _rewind(self) -> None:
        self.run.rewind(self.trainer.step)

    def _recall_loss(self) -> None:
        """The loss of the step that a checkpoint was saved after: it may have been the last one."""
        written = [line["loss"] for line in self.run.lines("metrics.jsonl") if "loss" in line]
        if self.trainer.step and written:
            self.last_loss = written[-1]

    def _evaluate_again(self) -> None:
        """A checkpoint is saved before its step is evaluated: the run may have been killed between
        the two, or between the loss and the samples."""
        step, examples = self.trainer.step, self.prepared.eval_examples
        if not step or not examples:
            return
        if step % self.plan.eval_steps and step < self.plan.max_steps:
            return
        self._keep_until(step)
        self.on_eval(step, self.trainer.evaluate(examples))

    def _keep_until(self, step: int) -> None:
        """Take away what was written of the evaluation of a step."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [v for v in self.run.lines(name) if v["step"] < step or "loss" in v]
            self.run.replace_lines(name, kept)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued exactly."""
        return {
            **self.plan.identity(),
            "data": self.prepared.data["train"]["sha256"],
            "contract": self.contract.fingerprint(),
            "new_tokens": [token.text for token in self.prepared.new_tokens],
            "processes": self.group.size,
        }

    def train_and_save(self) -> SaveReport:
        """The loop, then the artifact."""
        try:
            with interruptible(self.trainer, self.group) as stop:
                self.train(stop)
                self._ask()
                report = self._save_artifact()
            if stop.number is not None:
                self._save_after_all()
                raise self.interrupted("stopped when all steps were done", stop.number)
            return report
        except NonFiniteLoss as error:
            self._keep_batch(error)
            raise
        except OutOfMemory as error:
            error.where = ", ".join(self.prepared.rows[row] for row in error.rows)
            raise
        except (KeyboardInterrupt, Stopped) as error:
            raise self.interrupted("stopped at once", number_of(error)) from None

    def train(self, stop: Stop) -> None:
        """All steps.

        Raises:
            Interrupted: a signal stopped one of the processes; the last step is saved.
        """
        with contextlib.suppress(_BrokenOff):
            self.trainer.train(self.prepared.eval_examples or None)
        numbers = [number for number in self.group.gather(stop.number) if number is not None]
        if numbers:
            self.save_checkpoint()
            raise self.interrupted(
                f"stopped after step {self.trainer.step}; it is saved", numbers[0]
            )

    def _save_after_all(self) -> None:
        """A checkpoint of the last step, where the artifact is no end yet. Of several processes the
        others have no part in this any more; their run repeats the steps since its last one."""
        if self.group.size == 1:
            self.save_checkpoint()

    def release(self) -> None:
        """Give the weights and the optimiser back: whoever opens the artifact needs the room."""
        import torch

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
        self.run.finish(
            {
                "finished": True,
                "artifact": report.folder.name,
                "steps": self.plan.max_steps,
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
        base = self.loaded.base if self.loaded.is_adapter else None
        return RunResult(
            self.run,
            artifact,
            self.plan,
            self.contract,
            self.last_loss,
            self.last_eval,
            self.findings,
            base,
            self.prepared.model.served_eos_ids,
            verdict,
            self.loaded.base_revision if base else None,
            self.answers,
        )

    def interrupted(self, what: str, number: int) -> Interrupted:
        """What is told when a signal ended the run."""
        saved = self.run.checkpoints()
        last = int(saved[-1].name.removeprefix(STEP)) if saved else 0
        return Interrupted(
            what,
            where=str(self.run.path),
            fix=f"go on from step {last} of {self.plan.max_steps} with "
            f"`truetune train --resume {shlex.quote(str(self.run.path))}`",
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
            self.trackers.log(line, facts.step)
        self.listener.step(facts, self.plan)
        if self.is_saved_after(facts.step):
            self.save_checkpoint()

    def is_saved_after(self, step: int) -> bool:
        """Whether a step is followed by a checkpoint; the last one by the artifact."""
        return step % self.plan.save_steps == 0 and step < self.plan.max_steps

    def on_eval(self, step: int, loss: float) -> None:
        self.last_eval = loss
        line = {"step": step, "eval_loss": loss}
        self.run.append("metrics.jsonl", line)
        self.trackers.log(line, step)
        self.listener.evaluated(step, loss)
        self._samples_now = self._samples(step)
        for sample in self._samples_now:
            self.run.append("samples.jsonl", sample)
            self.listener.sample(sample)

    def save_checkpoint(self) -> None:
        """Weights as an artifact that transformers or peft opens, beside them the trainer's state;
        the folder gets its name when all of it is on disk."""
        states = gather_states(self.trainer)
        final = self.run.checkpoint_path(self.trainer.step)
        if final.exists():
            return
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            report = save_model(self.loaded, self.contract, partial)
            save_state(
                self.trainer,
                partial,
                run=self.identity(),
                states=states,
                hashes={file.name: file.sha256 for file in report.files},
            )
            os.replace(partial, final)
            flush_folder(final.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, TruetuneError) or not isinstance(error, Exception):
                raise
            # safetensors has an exception of its own for a full disk.
            raise SaveError(
                f"the checkpoint could not be saved: {error}",
                where=str(final),
                why=f"{type(error).__name__} while writing; earlier checkpoints are intact",
                fix="free some space, then "
                f"`truetune train --resume {shlex.quote(str(self.run.path))}`",
            ) from error
        for old in self.run.checkpoints()[: -self.plan.save_total_limit]:
            shutil.rmtree(old)
        self.listener.saved(str(final))

    def _samples(self, step: int) -> list[dict[str, Any]]:
        """Answers to the first held-out prompts, as they would be served."""
        chats = [c for c in self.prepared.eval_conversations if c.messages][:_NUM_SAMPLES]
        last = [max(i for i, m in enumerate(c.messages) if m["role"] == "assistant") for c in chats]
        prompts = [
            replace(chat, messages=chat.messages[:turn])
            for chat, turn in zip(chats, last, strict=True)
        ]
        sampling = Sampling(max_new_tokens=_SAMPLE_TOKENS)
        answers = replies(self.loaded, self.contract, prompts, sampling)
        return [
            {
                "step": step,
                "where": chat.where,
                "messages": list(prompt.messages),
                "answer": reply.text,
                "stopped": reply.stopped,
                "expected": chat.messages[turn]["content"],
            }
            for chat, turn, prompt, reply in zip(chats, last, prompts, answers, strict=True)
        ]

    def _save_artifact(self) -> SaveReport:
        name = "adapter" if self.loaded.is_adapter else "model"
        folder = self.run.file(name)
        self.listener.stage("saving, and reading back")
        self._prove_rows()
        # All weights go back to the type that the model came in, so that it serves as before; the
        # rounding is measured and told. An adapter stays float32.
        dtype = None if self.loaded.is_adapter else self.prepared.model.dtype
        fresh = folder.with_name(f".{name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        before = None if dtype is None else measure_rows(self.loaded, self.prepared.verify_rows)
        report = save_model(self.loaded, self.contract, fresh, dtype=dtype)
        self._keep_record(report, name, before)
        _replace_folder(folder, fresh)
        report = replace(report, folder=folder)
        if report.cast_error:
            self._found(
                Finding(
                    "weights-rounded",
                    "note",
                    f"weights were trained in float32 and saved in {report.dtype}, as the model "
                    f"came: the largest rounding is {report.cast_error:.2g}",
                )
            )
        for finding in report.findings:
            self._found(finding)
        self.listener.saved(str(folder))
        return report

    def _ask(self) -> None:
        """A few trained prompts as they would be served, and what the run has plainly not learned;
        the held-out ones were answered at the last evaluation."""
        if self.prepared.is_text:
            return
        self.listener.stage("asking trained prompts")
        chosen = short_rows(self.prepared.examples, _NUM_SAMPLES)
        prompts, spans = [], []
        for row in chosen:
            example = self.prepared.examples[row]
            first = example.mask.index(1)
            prompts.append(example.ids[:first])
            spans.append(example.ids[first : first + example.num_supervised])
        most = ROOM * max(map(len, spans), default=0) + 8
        said = replies_to_ids(self.loaded, self.contract, prompts, Sampling(max_new_tokens=most))
        tokens, stops = self.contract.tokens, set(self.contract.stop_ids)
        trained = [
            Answer(
                True,
                self.prepared.rows[row],
                tokens.decode([i for i in span if i not in stops]),
                reply.text,
                reply.stopped,
            )
            for row, span, reply in zip(chosen, spans, said, strict=True)
        ]
        held_out = [
            Answer(
                False,
                str(sample["where"]),
                str(sample["expected"] or ""),
                str(sample["answer"]),
                bool(sample["stopped"]),
                had_room=sample["stopped"]
                or len(sample["answer"]) > ROOM * len(str(sample["expected"] or "")),
            )
            for sample in self._samples_now
        ]
        self.answers = (*trained, *held_out)
        for finding in judge(self._outcome()):
            self._found(finding)

    def _outcome(self) -> Outcome:
        lines = list(self.run.lines("metrics.jsonl"))
        losses = [line["loss"] for line in lines if "loss" in line]
        few = max(len(losses) // 10, 1)
        taken = sum(line["tokens"] for line in lines if "tokens" in line)
        whole = sum(len(example.ids) for example in self.prepared.examples)
        return Outcome(
            self.answers,
            mean(losses[:few]),
            mean(losses[-few:]),
            tuple((line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line),
            self.plan.max_steps,
            self.plan.learning_rate,
            self.plan.logging_steps * taken / max(whole, 1),
            self.plan.epochs is None,
        )

    def _keep_record(self, report: SaveReport, name: str, before: Measured | None) -> None:
        """What the model in memory predicts, as it was saved: a fresh process is held to it."""
        rounded = report.cast_error is not None
        if rounded:
            round_as_saved(self.loaded, report.dtype)
        rows = self.prepared.verify_rows
        record = take_record(
            self.loaded,
            self.contract,
            rows,
            self.run,
            report.folder,
            name,
            files={file.name: file.sha256 for file in report.files},
            dtype=report.dtype,
            before_rounding=before if rounded else None,
            context=self.prepared.model.context_length,
        )
        write_rows(self.run, rows, record)

    def _prove_rows(self) -> None:
        """What training did to the rows of new tokens and to all others, and whether the model
        writes the tokens."""
        if self.rows_before is None:
            return
        tokens = self.prepared.new_tokens
        report, findings = rows_report(self.rows_before, self._rows(), tokens)
        counts = written_tokens(self.loaded, self.contract, self.prepared.verify_rows, tokens)
        findings += written_findings(counts)
        report["written"] = [vars(count) for count in counts]
        write_json(self.run.file("new_tokens.json"), report)
        for finding in findings:
            self._found(finding)
        if any(finding.level == "error" for finding in findings):
            raise SaveError(
                "rows of other tokens were trained; the artifact was not written",
                where=str(self.run.file("new_tokens.json")),
                code="other-rows-moved",
            )

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
        named = ", ".join(self.prepared.rows[row] for row in rows[:4])
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        error.where = f"{named}{more}; all of them in {path}"
        self.run.append("findings.jsonl", error.finding.as_dict())


def _replace_folder(folder: Path, fresh: Path) -> None:
    """Give a folder's name to another one; what had it (of a run that died before its manifest)
    goes last."""
    old = folder.with_name(f".{folder.name}.partial-1")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class Stop:
    """Which signal asked a run to stop, if one did."""

    number: int | None = None


class _BrokenOff(BaseException):
    """An evaluation was: the run is asked to stop."""


@contextlib.contextmanager
def interruptible(trainer: SFTTrainer, group: Group) -> Iterator[Stop]:
    """A signal ends the run after its step, or in the middle of an evaluation, which changes
    nothing and is repeated when the run goes on; a second Ctrl-C ends it at once. Of several
    processes none may leave an evaluation alone."""
    stop = Stop()

    def ask(number: int) -> None:
        stop.number = number
        trainer.stop_requested = True
        if trainer.evaluating and group.size == 1:
            raise _BrokenOff

    with told(ask):
        yield stop
