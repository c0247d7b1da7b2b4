"""`truetune check`: everything that can be known about a planned run or a finished model.

input   a recipe with model and data; or a model folder alone
does    the stages of `prepare`, none of which stops; what the lengths cost, whether the model is
        base or instruct, whether the run fits; with `smoke_test` also what two real steps show
output  Checkup: findings and a summary, for the terminal, --json and --html alike
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.checks import saved_model
from truetune.checks.fit import Fit, estimate
from truetune.checks.lengths import (
    RowLengths,
    encoded_lengths,
    length_report,
    limit_keeping,
)
from truetune.checks.registry import ask
from truetune.checks.saved_model.checkpoint import Checkpoint, gather
from truetune.contract.frame import Frame
from truetune.errors import BadRows, ModelError
from truetune.findings import LEVELS, Finding, merged, worst
from truetune.listener import Listener
from truetune.model.embeddings import judge_rows, read_tables
from truetune.model.lora import lora_target_findings
from truetune.model.source import locate
from truetune.model.start import StartVerdict, verdict
from truetune.model.tokenizer import locate_base, num_ids
from truetune.model.weights import weights_format
from truetune.model.whole import require_whole_folder
from truetune.recipe.plan import Plan
from truetune.recipe.rates import EPOCHS, usual_rate, what_follows, words
from truetune.recipe.settings import Recipe
from truetune.run.early import ask_early, ask_first_of_check
from truetune.run.load_model import advice
from truetune.run.prepare import Survey, survey
from truetune.run.smoke_test import smoke_test
from truetune.run_dir import opened


@dataclass(frozen=True)
class Checkup:
    """The result of a check.

    Attributes:
        findings: the most severe first.
        summary: plain values, by topic; topics that were not examined are missing.
    """

    findings: list[Finding]
    summary: dict[str, Any]

    def __repr__(self) -> str:
        """The findings, and the verdict below them."""
        counts = ", ".join(f"{n} {level}s" for level, n in self.counts().items() if n)
        lines = [line for finding in self.findings for line in finding.lines()]
        return "\n".join([*lines, f"{'ok' if self.ok else 'not ok'}: {counts or 'nothing found'}"])

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return worst(self.findings) != "error"

    def as_dict(self) -> dict[str, Any]:
        """Return the values that --json prints."""
        return {
            "ok": self.ok,
            "findings": [finding.as_dict() for finding in self.findings],
            "summary": {**self.summary, "counts": self.counts()},
        }

    def counts(self) -> dict[str, int]:
        """Return the number of findings of each level."""
        return {level: sum(f.level == level for f in self.findings) for level in LEVELS}


def check(recipe: Recipe, listener: Listener, *, smoke_test: bool = False) -> Checkup:
    """Check the planned run; without data, check a finished model or adapter.

    Raises:
        UsageError, InputError: options, data or model that cannot be used at all.
    """
    ask_first_of_check(recipe, smoke_test)
    if recipe.data:
        return check_run(recipe, listener, with_smoke_test=smoke_test)
    return check_model(recipe, listener)


def check_run(recipe: Recipe, listener: Listener, *, with_smoke_test: bool = False) -> Checkup:
    """Look at the run that `truetune train` would start.

    Args:
        with_smoke_test: load the model too, and take two real steps.

    Raises:
        UsageError, InputError: options, data or model that cannot be used at all.
    """
    ask_early(recipe)
    try:
        found = survey(recipe, listener)
    except BadRows as error:
        # No row is left, so only the rows can be reported.
        return Checkup(
            merged(error.findings), {"run": {"model": recipe.model, "data": recipe.data}}
        )
    rows = encoded_lengths(found.encoded, found.prepared.contract)
    listener.stage("estimating memory and time")
    fit = _fit(found, rows)
    summary = {
        "run": _run_summary(found),
        "contract": _contract_summary(found),
        **({"lengths": length_report(rows, *_limits(found))} if len(rows) else {}),
        "plan": fit.as_dict(),
    }
    reported = [*_weights(found), *found.prepared.findings, *fit.findings(), *_targets(recipe)]
    reported += advice(found.prepared, fit.trainable)
    if with_smoke_test and found.prepared.examples:
        listener.stage("taking two real steps")
        seen, numbers = smoke_test(found.prepared)
        reported += seen
        summary["rehearsal"] = numbers
        judged = _measured_verdict(found, numbers["chat"])
        parameters = found.prepared.model.num_parameters
        reported += start_differs(judged, found.prepared.plan, parameters)
        # Show one verdict: if the weights say nothing, that of the template is kept.
        summary["verdict"] = _verdict_summary(judged, parameters) | {
            "taken_for": found.prepared.plan.start
        }
        if "seconds_per_token" in numbers:
            timed = fit.timed(numbers["seconds_per_token"], _tokens(found))
            summary["plan"] = timed.as_dict()
    return Checkup(_ordered(reported), summary)


def _weights(found: Survey) -> list[Finding]:
    """What training would refuse before it reads a weight; a folder of small files may be checked
    without them."""
    plan = found.prepared.plan
    tokenizer = found.prepared.contract.tokenizer
    try:
        whole = require_whole_folder(
            str(plan.model), plan.revision, tokenizer=tokenizer, trainable=True
        )
    except ModelError as error:
        if error.code == "model-no-weights" and weights_format(Path(error.where)) is None:
            return []
        return [error.finding]
    return list(whole.findings) if whole else []


def _measured_verdict(found: Survey, losses: dict[str, float]) -> StartVerdict:
    """Base or instruct, by the model's own template and by what it predicts."""
    prepared = found.prepared
    plan, tokenizer = prepared.plan, prepared.contract.tokenizer
    frame = Frame.probe(tokenizer, stop_ids=prepared.model.served_eos_ids)
    files = locate(str(plan.model), plan.revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    tables = read_tables(base, frame.chat_ids).items()
    rows = {kind: judge_rows(t, frame.chat_ids, num_ids(tokenizer)) for kind, t in tables}
    return verdict(frame, rows, losses or None)


def _verdict_summary(judged: StartVerdict, num_parameters: int | None) -> dict[str, Any]:
    return {**judged.as_dict(), "means": what_follows(judged.kind, num_parameters)}


def start_differs(judged: StartVerdict, plan: Plan, num_parameters: int) -> Iterator[Finding]:
    """The plan goes by the template, before weights are read; these may tell another story."""
    kind = judged.kind
    if kind == "unknown" or kind == plan.start:
        return
    rate = usual_rate(plan.lora, num_parameters, kind, "", plan.reasoning_share)[0]
    # A learning rate that the user set, or that does not depend on base or instruct, stays right.
    derived = plan.origin("learning_rate").startswith("default") and rate != plan.learning_rate
    yield Finding(
        "start-differs",
        "warning" if derived else "note",
        f"the template suggests {_ARTICLE[plan.start]} model, but the weights are those of "
        f"{_ARTICLE[kind]} one",
        str(plan.model),
        why="; ".join(judged.reasons),
        fix=f"use --learning-rate {words(rate)} --epochs {EPOCHS[kind]:g}",
    )


_ARTICLE = {"base": "a base", "instruct": "an instruct"}


def _limits(found: Survey) -> tuple[int, int | None]:
    """Of the run, and of the model."""
    return found.prepared.plan.max_length, found.prepared.model.context_length


def _fit(found: Survey, rows: RowLengths) -> Fit:
    prepared = found.prepared
    longest = max(prepared.data["train"]["longest"], 2)
    return estimate(prepared.plan, tokens=_tokens(found), longest=longest, p99=limit_keeping(rows))


def _tokens(found: Survey) -> int:
    """That are trained on, over all epochs."""
    plan, train = found.prepared.plan, found.prepared.data["train"]
    per_example = train["tokens"] / max(train["examples"], 1)
    per_step = plan.tokens_per_step or per_example * (plan.batch_size or 1)
    return int(per_step * plan.max_steps)


def check_model(recipe: Recipe, listener: Listener) -> Checkup:
    """Look at a finished model or adapter, from any tool; of a run, at what it saved.

    Raises:
        ModelError: it is no model folder at all.
        UsageError: a run that has saved nothing yet.
    """
    assert recipe.model
    listener.stage("opening the model's files")
    found = gather(opened(recipe.model), recipe.revision, recipe.chat_template)
    judged = found.verdict
    summary: dict[str, Any] = {"model": _model_summary(found, recipe)}
    if judged is not None:
        parameters = found.facts.num_parameters if found.facts else None
        summary["verdict"] = _verdict_summary(judged, parameters)
    return Checkup(_ordered([*ask(saved_model, found)]), summary)


def _model_summary(found: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    facts, frame = found.facts, found.frame
    summary: dict[str, Any] = {"model": recipe.model, "folder": str(found.folder)}
    if facts is None or frame is None:
        return summary
    decode = frame.tokens.decode
    ends = frame.terminator
    return summary | {
        "kind": "adapter" if found.is_adapter else "model",
        "base": facts.base,
        "architecture": facts.architecture,
        "parameters": facts.num_parameters,
        "weights": facts.weights or "none here",
        "vocabulary": facts.tokenizer_length,
        "head_rows": facts.head_rows,
        "stop": [{"id": i, "token": decode([i])} for i in sorted(frame.served_stops)],
        "stop_from": found.served_from,
        "template_ends_with": None if ends is None else {"id": ends, "token": decode([ends])},
        "rows_judged": sorted(found.rows),
    }


def _targets(recipe: Recipe) -> list[Finding]:
    """Names of layers that LoRA was given and the model does not have."""
    if not (recipe.model and recipe.lora and recipe.target_modules):
        return []
    return lora_target_findings(str(recipe.model), recipe.target_modules, recipe.revision)


def _ordered(findings: list[Finding]) -> list[Finding]:
    """By level, and within a level by how many rows are concerned."""
    return sorted(merged(findings), key=lambda f: (LEVELS.index(f.level), -f.count))


def _run_summary(found: Survey) -> dict[str, Any]:
    prepared = found.prepared
    plan = prepared.plan
    codes = [row["code"] for row in prepared.data["dropped"]]
    # A run would not begin with them.
    refused = len(codes) - codes.count("rows-overlong") if plan.bad_rows == "error" else 0
    return {
        "model": plan.model,
        "data": plan.data,
        "schema": prepared.data["schema"],
        "rows_read": prepared.data["rows_read"],
        "train": prepared.data["train"],
        "held_out": prepared.data["held_out"],
        "dropped": len(codes) - refused,
        "refused": refused,
        "method": "lora" if plan.lora else "full",
        "start": plan.start,
        "max_length": plan.max_length,
        "batch_size": plan.batch_size,
        "tokens_per_step": plan.tokens_per_step,
        "epochs": plan.epochs,
        "max_steps": plan.max_steps,
        "learning_rate": plan.learning_rate,
    }


def _contract_summary(found: Survey) -> dict[str, Any]:
    contract = found.prepared.contract
    return {
        "template": contract.origin,
        "template_arguments": contract.template_kwargs,
        "stop": [{"id": i, "token": contract.tokens.decode([i])} for i in contract.stop_ids],
    }
