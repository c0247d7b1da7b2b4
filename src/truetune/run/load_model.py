"""Load the model in the state in which training starts.

input   Prepared, a checkpoint where a run is resumed
does    loads the weights, in fewer bits where asked (and compares those with the original before
        anything is trained); makes room and first values for new tokens; puts the adapter on;
        adds what is known about runs like this one
output  LoadedModel and findings
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from truetune.compare import Measured, agreement, measure, rounding_finding
from truetune.compute.memory import available_bytes
from truetune.errors import ModelError
from truetune.findings import Finding, gib
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import (
    LoraSettings,
    add_lora,
    enable_gradient_checkpointing,
    trainable_share,
)
from truetune.model.new_tokens import make_room, start_full_rows
from truetune.model.placement import Choice, choose_device
from truetune.model.quantise import NAMES, LoadIn
from truetune.model.tokenizer import num_ids
from truetune.recipe.advice import RunOutline, advise
from truetune.recipe.plan import Plan
from truetune.recipe.settings import Recipe
from truetune.run.prepare import Prepared

# Rows on which a quantised base is compared with the original before training.
_ROUNDING_ROWS = 64


def load_start(prepared: Prepared, checkpoint: Path | None) -> tuple[LoadedModel, list[Finding]]:
    """The model for the training loop, and findings about it.

    Args:
        checkpoint: to continue from; None at the start of a run.

    Raises:
        ModelError, UsageError: as `load_model` and `add_lora`.
    """
    plan = prepared.plan
    source = str(checkpoint or plan.model)
    look = _bits(plan) != "as-trained" and not checkpoint and not plan.no_check
    original, findings = _measure_original(prepared) if look else (None, [])
    loaded = load_model(
        source,
        revision=None if checkpoint else plan.revision,
        device=plan.device,
        dtype=plan.dtype,
        purpose="lora" if plan.lora else "full",
        load_in=_bits(plan),
        full_fingerprint=plan.full_fingerprint,
        bf16_weights=plan.optim == "adamw_bf16",
        # New tokens are not known to the base.
        tokenizer=None if prepared.new_tokens else prepared.contract.tokenizer,
    )
    if original:
        rows = _rounding_rows(prepared)
        found = agreement(original, measure(loaded, rows, keep_logits=False))
        bits = NAMES[loaded.quantised] if loaded.quantised else ""
        findings.append(rounding_finding(found, bits, len(rows)))
    loaded = replace(loaded, choices=tuple(_explained(c, plan) for c in loaded.choices))
    # Use the contract's tokenizer, with which the rows were proved.
    loaded = replace(loaded, tokenizer=prepared.contract.tokenizer)
    if not checkpoint:
        loaded = _with_adapter(loaded, prepared)
    if plan.gradient_checkpointing:
        enable_gradient_checkpointing(loaded.model)
    if not checkpoint:
        findings += advice(prepared, trainable_share(loaded.model)[0])
    return loaded, [*loaded.findings, *findings]


def _explained(choice: Choice, plan: Plan) -> Choice:
    """The type that was measured to be faster was asked for by nobody."""
    origin = plan.origin("dtype")
    measured = choice.name == "dtype" and origin.startswith("measured")
    return replace(choice, reason=origin) if measured else choice


def advice(prepared: Prepared, num_trainable: int) -> list[Finding]:
    """What is known about runs like this one.

    Args:
        num_trainable: weights that are trained.
    """
    plan, examples = prepared.plan, prepared.examples
    return advise(
        RunOutline(
            num_parameters=prepared.model.num_parameters,
            num_rows=len(examples),
            num_supervised=sum(example.num_supervised for example in examples),
            reasoning_share=plan.reasoning_share,
            start=plan.start,
            lora=plan.lora,
            num_trainable=num_trainable,
            is_text=prepared.is_text,
        )
    )


def _rounding_rows(prepared: Prepared) -> list[tuple[list[int], list[int]]]:
    """Up to 64 training rows whose ids the base has."""
    known = prepared.model.head_rows
    rows = ((e.ids, e.mask) for e in prepared.examples if max(e.ids) < known)
    return list(itertools.islice(rows, _ROUNDING_ROWS))


def _measure_original(prepared: Prepared) -> tuple[Measured | None, list[Finding]]:
    """What the unquantised base says of some rows; it is gone again when this returns."""
    plan, rows = prepared.plan, _rounding_rows(prepared)
    try:
        _require_memory(prepared)
        loaded = load_model(
            str(plan.model),
            revision=plan.revision,
            device=plan.device,
            dtype=plan.dtype,
            purpose="inference",
        )
        return measure(loaded, rows, keep_logits=False), []
    except ModelError as error:
        if error.code != "model-too-large":
            raise
        note = Finding(
            "quantised-base-not-compared",
            "note",
            "the quantised base was not compared with the original",
            why=error.what,
            fix="on a larger machine, compare answers with `truetune chat RUN --compare base`",
        )
        return None, [note]


def _require_memory(prepared: Prepared) -> None:
    """Refuse to run out of memory: on a CPU that raises no exception, but ends the process."""
    device = choose_device(prepared.plan.device)[0]
    needed, free = 4 * prepared.model.num_parameters, available_bytes(device)
    if device.type == "cpu" and free and needed > free:
        raise ModelError(
            f"the unquantised base needs {gib(needed)} of memory, but only {gib(free)} is free",
            code="model-too-large",
        )


def _bits(recipe: Recipe) -> LoadIn:
    return "4bit" if recipe.qlora else "8bit" if recipe.load_in_8bit else "as-trained"


def _with_adapter(loaded: LoadedModel, prepared: Prepared) -> LoadedModel:
    """The model as training finds it: room and first values for new rows, a fresh adapter."""
    plan, new_tokens = prepared.plan, prepared.new_tokens
    if new_tokens:
        make_room(loaded.model, num_ids(loaded.tokenizer))
    if not plan.lora:
        start_full_rows(loaded.model, new_tokens)
    elif not loaded.is_adapter:
        settings = LoraSettings(
            plan.lora_r,
            plan.lora_alpha,
            plan.lora_dropout,
            plan.target_modules or "all-linear",
            rslora=plan.rslora,
            dora=plan.dora,
        )
        loaded = add_lora(loaded, settings, plan.seed, new_tokens=new_tokens)
    return loaded
