"""All stages of a run, in order. Read this file first.

    what can be refused in the first second       early.py
    rows -> conversations -> held-out split       data/
    the model's config and tokenizer              model/
    template, stop set, arguments -> contract     contract/
    conversations -> examples, each proved        contract/
    examples -> length policy, plan, preflight    compute/, recipe/, checks/     (prepare.py)
    weights, adapter                              model/                         (load_model.py)
    the loop: batches and loss, optimizer steps   compute/, engine/              (job.py)
    and at evaluations vital signs, checkpoints   behaviour/                     (vital_signs.py)
    what it answers as served                     generate.py                    (answers.py)
    the artifact, read back                       model/                         (artifact.py)
    the same, by a fresh process                  verification/
    its page and model card                       reporting/                     (pages.py)
    the manifest, last                            run_dir.py

    an adapter -> merged model -> compared by a fresh process   exporting/, verification/

Nothing is written before the preflight has passed; the run directory is complete when its
manifest is there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from truetune.engine.checkpoint import Checkpoint, last_good
from truetune.engine.parallel import Group, joined
from truetune.errors import CheckFailed, OutputExists
from truetune.exporting.merged import Exported, write_merged
from truetune.findings import Finding
from truetune.listener import Listener
from truetune.model.merge import Onto
from truetune.recipe.settings import Recipe
from truetune.reporting.card import write_merged_card
from truetune.run.early import ask_early, require_settings
from truetune.run.job import Job
from truetune.run.load_model import load_start
from truetune.run.pages import write_ending
from truetune.run.prepare import prepare
from truetune.run.result import RunResult
from truetune.run.saved import Saved, saved_facts
from truetune.run.trackers import Trackers
from truetune.run.worker_rank import Follower
from truetune.run_dir import VERDICT, RunDir, claimed, named_at_last, opened, write_json
from truetune.system.lock import Owner
from truetune.system.signals import Stopped, number_of
from truetune.verification.artifact import run_of, verify, verify_merge
from truetune.verification.verdict import Verdict


def train(
    recipe: Recipe, listener: Listener | None = None, *, resume: Path | str | None = None
) -> RunResult:
    """Fine-tune a model; see the module's docstring for the stages.

    Args:
        recipe: with model, data and output; of the run itself when resuming.
        listener: receives the events of the run.
        resume: a run directory to continue from its last checkpoint.

    Raises:
        TruetuneError: any of `truetune.errors`; before the run directory is made unless the
            training itself fails.
    """
    listener = listener or Listener()
    with joined() as group, contextlib.ExitStack() as held:
        # Under torchrun all processes come this way, each with its share of every step; the first
        # one writes and tells.
        with group.together():
            if not resume:
                require_settings(recipe, "output")
            run, found = RunDir(resume or str(recipe.output)), []
            if group.leads:
                run, dead = held.enter_context(
                    claimed(run.path, overwrite=recipe.overwrite, resume=bool(resume))
                )
                found = [_taken_over(dead)] if dead else []
            job, checkpoint = _started(
                recipe, listener if group.leads else Listener(), group, run, found, bool(resume)
            )
        try:
            if isinstance(job, Follower):
                return _follow(job, checkpoint)
            return _lead(job, checkpoint)
        finally:
            job.trackers.finish()


def _started(
    recipe: Recipe,
    listener: Listener,
    group: Group,
    run: RunDir,
    found: list[Finding],
    resumed: bool,
) -> tuple[Job, Checkpoint | None]:
    """The run before its first step, and the checkpoint that it goes on from."""
    ask_early(recipe, with_weights=True)
    if not resumed and group.leads:
        _refuse_own_input(recipe, run)
    prepared = prepare(recipe, listener)
    # Each process has measured in which type it computes faster, beside the others.
    plan = prepared.plan
    first = group.first({"dtype": plan.dtype, "optim": plan.optim, "origins": plan.origins})
    prepared = replace(prepared, plan=replace(plan, **first))
    trackers = Trackers(recipe.report_to or [] if group.leads else [], run.path)
    if resumed and group.size == 1 and (facts := saved_facts(run, prepared)):
        return Saved(run, prepared, facts, listener, trackers, found), None
    checkpoint, damaged = last_good(run.checkpoints()) if resumed else (None, [])
    listener.stage("loading the weights")
    loaded, findings = load_start(prepared, checkpoint.folder if checkpoint else None)
    findings = [*found, *damaged, *findings]
    if not group.leads:
        return Follower(run, prepared, loaded, listener, trackers, findings, group), checkpoint
    if not resumed:
        run.make(overwrite=recipe.overwrite)
    job = Job(run, prepared, loaded, listener, trackers, findings, group)
    try:
        job.write_start()
    except BaseException:
        trackers.finish()
        if not resumed:
            run.discard()
        raise
    return job, checkpoint


def _lead(job: Job, checkpoint: Checkpoint | None) -> RunResult:
    try:
        return _led(job, checkpoint)
    except BaseException as error:
        # The page is written however the run ended.
        if not job.run.finished:
            for finding in write_ending(job.run, error):
                job.listener.finding(finding)
        raise


def _led(job: Job, checkpoint: Checkpoint | None) -> RunResult:
    job.restore(checkpoint)
    report = job.train_and_save()
    verdict = None
    try:
        if job.plan.verify:
            job.listener.stage("verifying in a fresh process")
            job.release()
            verdict = verify(str(job.run.path), device=job.plan.device)
        result = job.finish(report, verdict)
    except (KeyboardInterrupt, Stopped) as error:
        raise job.interrupted(
            f"stopped when {report.folder} was saved, and before it was verified",
            number_of(error),
        ) from None
    job.group.gather("finished")
    if verdict:
        _require_passed(verdict, "what was saved is not what was trained")
    return result


def _follow(job: Follower, checkpoint: Checkpoint | None) -> RunResult:
    job.restore(checkpoint)
    job.follow()
    job.release()
    job.group.gather("finished")
    artifact = job.run.artifact()
    assert artifact is not None
    return job.result(artifact)


def _refuse_own_input(recipe: Recipe, run: RunDir) -> None:
    """Refuse to replace a run that is the source of the new one."""
    folder = run.path.resolve()
    for name in ("model", "data", "eval_data", "keep_text"):
        value = getattr(recipe, name)
        if value and Path(value).expanduser().resolve().is_relative_to(folder):
            raise OutputExists(
                f"the {name.replace('_', ' ')} is in the output folder, which would be replaced",
                where=str(value),
                fix="choose another folder with --output",
                code="output-is-input",
            )


def _taken_over(dead: Owner) -> Finding:
    return Finding(
        "run-taken-over",
        "note",
        f"the process that last wrote this run ended without releasing it: {dead}",
        why="it was killed, or the machine crashed",
        fix="nothing to do: its lock is released, and its half-written files are removed",
    )


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes:
        folder: the exported model.
        exported: how it was made.
        verdict: what a fresh process found; None if it was not asked.
    """

    folder: Path
    exported: Exported
    verdict: Verdict | None

    def __repr__(self) -> str:
        verified = "" if self.verdict is None else f"; verified: {self.verdict.passed}"
        return f"{self.folder}: merged onto {self.exported.onto}{verified}"


def export(
    source: str,
    output: Path | str,
    *,
    base: str | None = None,
    onto: Onto = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    check: bool = True,
    listener: Listener | None = None,
) -> ExportResult:
    """Merge a run's adapter into its base, have a fresh process compare the two, and only then
    give the folder its name.

    Args:
        source: a run, or an adapter folder.
        output: must not exist.
        base: where the adapter's base is now; None takes its config's.
        onto: see `merge_adapter`.
        dtype: type of the written weights; None takes the base's on disk.
        device: where to merge and to compare.
        check: compare.

    Raises:
        TruetuneError: it cannot be merged, or the merged model is not the adapter's; nothing is
            left behind.
    """
    listener, folder = listener or Listener(), Path(output)
    adapter = opened(source)
    with named_at_last(folder) as unnamed:
        listener.stage("merging")
        made = write_merged(adapter, unnamed, base=base, onto=onto, dtype=dtype, device=device)
        for finding in made.findings:
            listener.finding(finding)
        verdict, run = None, run_of(source)
        if check:
            listener.stage("verifying in a fresh process")
            verdict = verify_merge(
                adapter,
                str(unnamed),
                base=base,
                load_in=made.load_in,
                dtype=made.report.dtype,
                run=run,
                device=device,
            )
            _require_passed(verdict, "the merged model does not match the adapter on its base")
            record = {**verdict.as_dict(), "artifact": str(folder)}
            record["files"] = {file.name: file.sha256 for file in made.report.files}
            write_json(unnamed / VERDICT, record)
        write_merged_card(run, Path(adapter), unnamed, folder, verdict.as_dict() if verdict else {})
    return ExportResult(folder, made, verdict)


def _require_passed(verdict: Verdict, what: str) -> None:
    if not verdict.passed:
        raise CheckFailed(what, verdict.findings())


__all__ = ["ExportResult", "RunResult", "export", "train"]
