"""The way of a run, all stages in order. Read this page first.

    rows -> conversations -> held-out split       data/
    template, stop set, arguments -> contract     contract/
    conversations -> examples, each proved        contract/
    examples -> length policy, plan, preflight    compute/, plan.py, check/      (prepare.py)
    weights, adapter                              model/
    the loop, with metrics, samples, checkpoints  engine/, health/, generate.py
    the artifact, read back                       model/                         (job.py)
    the manifest, last                            run.py

Nothing is written before the preflight has passed; the run directory is complete when its
manifest is there.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from truetune.engine import read_facts
from truetune.environment import refuse_many_processes
from truetune.errors import (
    OutputExists,
    UsageError,
)
from truetune.findings import Finding
from truetune.integrations.trackers import Trackers
from truetune.job import Job, RunResult
from truetune.listener import Listener
from truetune.model import (
    LoadedModel,
    LoraSettings,
    add_lora,
    enable_gradient_checkpointing,
    load_model,
)
from truetune.prepare import Prepared, prepare, require_settings
from truetune.recipe import Recipe
from truetune.run import RunDir


def train(
    recipe: Recipe, listener: Listener | None = None, *, resume: Path | str | None = None
) -> RunResult:
    """Fine-tune a model; see the module's docstring for the stages.

    Args:
        recipe: with model, data and output; of the run itself when resuming.
        listener: is told what happens.
        resume: a run directory to continue from its last checkpoint.

    Raises:
        TruetuneError: any of `truetune.errors`; before the run directory is made unless the
            training itself fails.
    """
    listener = listener or Listener()
    refuse_many_processes()
    require_settings(recipe, *(() if resume else ("output",)))
    run = _resumed(resume) if resume else RunDir(str(recipe.output))
    if not resume:
        run.require_room(overwrite=recipe.overwrite)
        _refuse_own_input(recipe, run)
    prepared = prepare(recipe, listener)
    trackers = Trackers(recipe.report_to or [], run.path)

    checkpoint = run.checkpoints()[-1] if resume and run.checkpoints() else None
    if checkpoint:
        read_facts(checkpoint)
    listener.stage("weights")
    loaded, findings = _load(prepared, checkpoint)
    if not resume:
        run.make(overwrite=recipe.overwrite)
    job = Job(run, prepared, loaded, listener, trackers, findings)
    try:
        try:
            job.write_start()
        except Exception:
            if not resume:
                run.discard()
            raise
        job.restore(checkpoint)
        return job.run_to_end()
    finally:
        trackers.finish()


def _refuse_own_input(recipe: Recipe, run: RunDir) -> None:
    """A run that is replaced must not be what the new one is made from."""
    folder = run.path.resolve()
    for name in ("model", "data", "eval_data"):
        value = getattr(recipe, name)
        if value and Path(value).expanduser().resolve().is_relative_to(folder):
            raise OutputExists(
                f"the {name.replace('_', ' ')} is in the output folder, which would be replaced",
                where=str(value),
                fix="name another folder with --output",
                code="output-is-input",
            )


def _resumed(path: Path | str) -> RunDir:
    run = RunDir.open(path)
    if run.finished:
        raise UsageError(
            "the run is finished: there is nothing to resume",
            where=str(run.path),
            fix=f"truetune chat {shlex.quote(str(run.path))}",
            code="run-finished",
        )
    return run


def _load(prepared: Prepared, checkpoint: Path | None) -> tuple[LoadedModel, list[Finding]]:
    """Weights, with an adapter where one is trained; from a checkpoint when resuming."""
    recipe = prepared.plan.recipe
    source = str(checkpoint or recipe.model)
    loaded = load_model(
        source,
        revision=None if checkpoint else recipe.revision,
        device=recipe.device,
        dtype=recipe.dtype,
        purpose="lora" if recipe.lora else "full",
    )
    if recipe.lora and not loaded.is_adapter:
        targets = recipe.target_modules or "all-linear"
        settings = LoraSettings(recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout, targets)
        loaded = add_lora(loaded, settings, recipe.seed)
    # The contract's tokenizer is the one that the rows were proved with.
    loaded = replace(loaded, tokenizer=prepared.contract.tokenizer)
    if recipe.gradient_checkpointing:
        enable_gradient_checkpointing(loaded.model)
    return loaded, list(loaded.findings)


__all__ = ["RunResult", "train"]
