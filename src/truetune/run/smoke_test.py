"""The smoke test: the real model, a few real rows, two real steps, a dry save and a reload.

input   Prepared; the weights are loaded here and nothing is kept
does    predicts the rows, computes one step in two ways, takes two steps, saves to a temporary
        folder, reloads and compares
output  findings, and what was measured
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from truetune.checks.fit import undisturbed
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.engine.trainer import SFTTrainer
from truetune.errors import NonFiniteLoss, SaveError, UnfaithfulTemplate
from truetune.findings import Finding
from truetune.model.load import LoadedModel, load_model
from truetune.model.mode import evaluating
from truetune.model.save import save_model
from truetune.run.load_model import load_start
from truetune.run.prepare import Prepared
from truetune.run_dir import scratch
from truetune.system.lazy import torch

# Rows of its step, the shortest of the first hundred: it costs seconds.
_ROWS, _AMONG = 4, 100
# Packed rows in pieces against single padded rows: float32 stays within 1e-3 of the norm, bfloat16
# within 3 % (docs/log.md).
_SAME = {"float32": 1e-3, "bfloat16": 5e-2}
# A step that makes the loss of its own rows this much worse overshot.
_OVERSHOT = 1.1


def smoke_test(prepared: Prepared) -> tuple[list[Finding], dict[str, Any]]:
    """Run the smoke test.

    Returns:
        findings, and numbers: losses in nats per token, seconds, relative differences.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    began = time.perf_counter()
    loaded, findings = load_start(prepared, None)
    examples = sorted(prepared.examples[:_AMONG], key=lambda e: len(e.ids))[:_ROWS]
    numbers: dict[str, Any] = {
        "rows": len(examples),
        "load_seconds": time.perf_counter() - began,
        "trained_type": str(_trained(loaded.model)[0][1].dtype).removeprefix("torch."),
    }
    numbers["chat"] = chat_losses(loaded, prepared.contract)
    with _without_dropout(loaded.model):
        findings += _two_ways(loaded, prepared, examples, numbers)
        if any(finding.level == "error" for finding in findings):
            return findings, numbers
        findings += _one_step(loaded, prepared, examples, numbers)
        findings += _dry_save(loaded, prepared, examples, numbers)
        numbers["seconds_per_token"] = _pace(loaded, prepared, examples, numbers["step_seconds"])
    return findings, numbers


# Most seconds and tokens of the step that is timed.
_TIMED_SECONDS, _TIMED_TOKENS = 10.0, 2048


def _pace(
    loaded: LoadedModel, prepared: Prepared, short: Sequence[SFTExample], seconds: float
) -> float:
    """Seconds a token of a step on the run's own rows, as many as a short step allows."""
    most = min(_TIMED_TOKENS, _TIMED_SECONDS / seconds * sum(len(e.ids) for e in short))
    rows: list[SFTExample] = []
    tokens = 0
    for example in prepared.examples:
        if rows and tokens + len(example.ids) > most:
            break
        rows.append(example)
        tokens += len(example.ids)
    trainer = _trainer(loaded, prepared, rows, max_lr=0.0)
    where = loaded.device.type
    began = undisturbed(where)
    trainer.train_step()
    return (undisturbed(where) - began) / tokens


# Short conversations that any model that was tuned to chat has seen the like of.
_CONVERSATIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is two plus two?", "Two plus two is four."),
    ("Name a colour.", "Blue is a colour."),
    ("Which is larger, the sun or the moon?", "The sun is larger than the moon."),
)


def chat_losses(loaded: LoadedModel, contract: PromptContract) -> dict[str, float]:
    """How well a model predicts conversations in its template, and the same in plain form.

    Returns:
        nats per token: of answers `templated` and `plain`, of the `stop` behind a templated answer,
        and of guessing (`vocabulary`); empty if the template takes no plain turns.
    """
    templated, stops, plain = [], [], []
    for asked, said in _CONVERSATIONS:
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        try:
            (example,) = contract.encode(talk)
        except (UnfaithfulTemplate, ValueError):
            return {}
        losses = _token_losses(loaded.model, example.ids)
        on = [loss for loss, m in zip(losses, example.mask[1:], strict=True) if m]
        templated += on[:-1]
        stops.append(on[-1])
        prompt, whole = contract.tokens.encode([f"{asked}\n", f"{asked}\n{said}"])
        plain += _token_losses(loaded.model, whole)[len(prompt) - 1 :]
    return {
        "templated": sum(templated) / len(templated),
        "stop": sum(stops) / len(stops),
        "plain": sum(plain) / len(plain),
        "vocabulary": math.log(loaded.model.get_input_embeddings().weight.shape[0]),
    }


def _token_losses(model: Any, ids: Sequence[int]) -> list[float]:
    """Cross-entropy in nats of each id but the first."""
    logits = _predicted(model, SFTExample(list(ids), [1] * len(ids)))[:-1]
    found = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return [float(loss) for loss in found]


def _trainer(
    loaded: LoadedModel, prepared: Prepared, examples: Sequence[SFTExample], **changes: Any
) -> SFTTrainer:
    """The run's loop on a few rows; all of them are one step."""
    plan = prepared.plan
    few: dict[str, Any] = {
        "batch_size": len(examples),
        "tokens_per_step": None,
        "micro_batch_size": min(plan.micro_batch_size or len(examples), len(examples)),
        "epochs": None,
        "max_steps": 2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
    }
    return SFTTrainer.of_plan(
        loaded.model,
        plan,
        examples=examples,
        pad_id=prepared.contract.pad_id,
        autocast_dtype=loaded.compute_dtype,
        **(few | changes),
    )


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Two ways of one step draw other dropout: it is off for the comparison.

    Attention keeps its rate as a number of its own, which it hands to a kernel.
    """
    found = [
        (module, name, rate)
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and rate and (name == "p" or "drop" in name)
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in found:
            setattr(module, name, rate)


def _two_ways(
    loaded: LoadedModel,
    prepared: Prepared,
    examples: Sequence[SFTExample],
    numbers: dict[str, Any],
) -> list[Finding]:
    """The step as the run takes it, and row by row on the reference path; weights stay."""
    before = [p.detach().clone() for _, p in _trained(loaded.model)]
    try:
        own = _trainer(loaded, prepared, examples, max_lr=0.0, weight_decay=0.0).train_step()
        plain = _trainer(
            loaded,
            prepared,
            examples,
            max_lr=0.0,
            weight_decay=0.0,
            packing=False,
            micro_batch_size=1,
        ).train_step()
    except NonFiniteLoss as error:
        return [
            Finding(
                "rehearsal-not-finite",
                "error",
                f"the first step gives {error.what}",
                error.where,
                why="float16 overflows, or a damaged weight file holds NaN",
                fix="try --dtype float32; if it still fails, fetch the weights again",
            )
        ]
    with torch.no_grad():
        for (_, p), value in zip(_trained(loaded.model), before, strict=True):
            p.copy_(value)
    loss = abs(own["loss"] - plain["loss"]) / max(abs(plain["loss"]), 1e-9)
    grad = abs(own["grad_norm"] - plain["grad_norm"]) / max(plain["grad_norm"], 1e-9)
    numbers |= {"loss": plain["loss"], "grad_norm": plain["grad_norm"]}
    numbers |= {"loss_difference": loss, "gradient_difference": grad}
    computed = str(loaded.compute_dtype or torch.float32).removeprefix("torch.")
    if max(loss, grad) <= _SAME.get(computed, 5e-2):
        return []
    return [
        Finding(
            "step-not-equal",
            "error",
            f"the training step differs from the same examples computed one by one: loss by "
            f"{100 * loss:.2g} %, gradient norm by {100 * grad:.2g} %",
            why="packed rows attend to each other, or the loss is averaged per forward pass "
            "instead of over the step",
            fix="use --no-packing",
        )
    ]


def _one_step(
    loaded: LoadedModel,
    prepared: Prepared,
    examples: Sequence[SFTExample],
    numbers: dict[str, Any],
) -> Iterator[Finding]:
    """One step at the peak rate: what moved, and whether the rows got better."""
    before = {name: p.detach().clone() for name, p in _trained(loaded.model)}
    frozen = {
        name: float(p.detach().double().sum())
        for name, p in loaded.model.named_parameters()
        if not p.requires_grad
    }
    trainer = _trainer(loaded, prepared, examples)
    first = trainer.train_step()["loss"]
    began = time.perf_counter()
    # The second step starts from what the first one left, so its loss judges the first.
    second = trainer.train_step()["loss"]
    numbers |= {"loss_after_a_step": second, "step_seconds": time.perf_counter() - began}
    still = [
        name
        for name, p in _trained(loaded.model)
        if bool((p.detach() == before[name]).all()) and "lora_A" not in name
    ]
    numbers |= {"trained_tensors": len(before), "unmoved_tensors": len(still)}
    if still:
        yield Finding(
            "weights-unmoved",
            "error" if len(still) == len(before) else "warning",
            f"{len(still):,} of {len(before):,} trained tensors did not move in two steps",
            still[0],
            len(still),
            why="no gradient reaches them, or the update is too small for their dtype (below "
            "half a unit in the last place)",
            fix="check which parameters are frozen, or train in float32",
        )
    moved = [
        name
        for name, p in loaded.model.named_parameters()
        if name in frozen and float(p.detach().double().sum()) != frozen[name]
    ]
    if moved:
        yield Finding(
            "frozen-moved",
            "error",
            f"{len(moved):,} frozen tensors changed",
            moved[0],
            len(moved),
            why="they share memory with a trained tensor",
            fix="please report this: it is a bug in truetune",
        )
    if not math.isfinite(second) or second > _OVERSHOT * max(first, 1e-3) + 0.05:
        yield Finding(
            "step-overshoots",
            "warning",
            f"one step at {prepared.plan.learning_rate:g} increases the loss on its own rows: "
            f"from {first:.3f} to {second:.3f}",
            why="the learning rate is too high for these weights",
            fix=f"use --learning-rate {prepared.plan.learning_rate / 10:g}",
        )


def _dry_save(
    loaded: LoadedModel,
    prepared: Prepared,
    examples: Sequence[SFTExample],
    numbers: dict[str, Any],
) -> Iterator[Finding]:
    """Save what the step left, open it again, and compare what both predict."""
    with scratch() as folder:
        target = folder / "dry"
        try:
            save_model(loaded, prepared.contract, target)
            again = load_model(target, device=str(loaded.device), purpose="inference")
        except SaveError as error:
            yield error.finding
            return
        ours, theirs = _predicted(loaded.model, examples[0]), _predicted(again.model, examples[0])
    apart = float((ours - theirs).abs().max())
    numbers["reload_difference"] = apart
    if apart > 0.05 * max(float(ours.abs().max()), 1.0):
        yield Finding(
            "reload-differs",
            "error",
            "the saved model's predictions differ from the trained one's: logits differ by "
            f"{apart:.2g}",
            why="weights were left out, or a tied embedding was untied when it was saved",
            fix="report it with the model's name: every tensor was read back after saving",
        )


def _predicted(model: Any, example: SFTExample) -> torch.Tensor:
    device = next(model.parameters()).device
    with evaluating(model):
        ids_BT = torch.tensor([example.ids], device=device)
        logits_TV: torch.Tensor = model(input_ids=ids_BT).logits[0].float().cpu()
    return logits_TV
