"""The checks of a run that need no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from truetune.contract import PromptContract, SFTExample
from truetune.findings import Finding


@dataclass(frozen=True)
class Preflight:
    """What the checks look at: plain values of the coming run.

    Attributes:
        examples: what will be trained, in order; `rows` says where each came from.
        is_text: plain text: no turn, so no answer that could end.
        loss_on: which tokens were meant to be targets.
        head_rows: rows of embedding and head.
        base_stop_ids: on which a server of the base model ends an answer.
        lora: whether an adapter is trained.
        learning_rate, suggested_rate: what is set, and the default for this case.
        max_steps, warmup_steps: optimiser steps.
    """

    contract: PromptContract
    examples: Sequence[SFTExample]
    rows: Sequence[str]
    is_text: bool
    loss_on: str
    head_rows: int
    base_stop_ids: Sequence[int]
    lora: bool
    learning_rate: float
    suggested_rate: float
    max_steps: int
    warmup_steps: int


def preflight(facts: Preflight) -> list[Finding]:
    """All findings, in the order of the checks."""
    return [finding for check in CHECKS for finding in check(facts)]


def _places(rows: Sequence[str], bad: Sequence[int]) -> tuple[str, int]:
    return (rows[bad[0]], len(bad)) if bad else ("", 0)


def stop_supervised(facts: Preflight) -> Iterator[Finding]:
    """Each example's last supervised token is a stop: otherwise the model never learns to end."""
    if facts.is_text:
        return
    stops = set(facts.contract.stop_ids)
    bad = []
    for index, (ids, mask) in enumerate(facts.examples):
        last = max((i for i, supervised in enumerate(mask) if supervised), default=None)
        # With a loss on everything, the template's own text may follow the stop.
        followed = last is not None and not any(
            mask[i] and ids[i] in stops for i in range(len(ids))
        )
        ends_wrong = last is not None and facts.loss_on != "all" and ids[last] not in stops
        if last is None or followed or ends_wrong:
            bad.append(index)
    where, count = _places(facts.rows, bad)
    if bad:
        yield Finding(
            code="stop-not-supervised",
            level="error",
            what="the token that ends an answer is no target",
            where=where,
            count=count,
            why="the answer was cut, or the mask leaves its end out: the model would never stop",
            fix="raise --max-length, or leave those rows out with --overlong drop",
        )


def nothing_supervised(facts: Preflight) -> Iterator[Finding]:
    """Examples without a target cost compute and teach nothing."""
    bad = [i for i, example in enumerate(facts.examples) if example.num_supervised == 0]
    where, count = _places(facts.rows, bad)
    if bad:
        yield Finding(
            code="nothing-supervised",
            level="error",
            what="no token of the example is a target",
            where=where,
            count=count,
            fix="leave those rows out",
        )


def ids_beyond_head(facts: Preflight) -> Iterator[Finding]:
    """An id that the embedding has no row for fails on the GPU with an unreadable message."""
    bad = [i for i, e in enumerate(facts.examples) if max(e.ids, default=0) >= facts.head_rows]
    where, count = _places(facts.rows, bad)
    if bad:
        largest = max(max(facts.examples[i].ids) for i in bad)
        yield Finding(
            code="id-beyond-head",
            level="error",
            what=f"token id {largest} is beyond the model's {facts.head_rows} embedding rows",
            where=where,
            count=count,
            why="the tokenizer has tokens that the model was never given rows for",
            fix="use the tokenizer that belongs to the model",
        )


def adapter_stop_unread(facts: Preflight) -> Iterator[Finding]:
    """peft and transformers read the base's generation_config, never an adapter's."""
    ids = list(facts.contract.stop_ids)
    if facts.lora and not facts.is_text and not set(ids) <= set(facts.base_stop_ids):
        yield Finding(
            code="adapter-stop-unread",
            level="warning",
            what="the trained stop token is not in the base's stop set, and an adapter cannot "
            "change that set",
            why="transformers and peft read the generation_config of the base only",
            fix=f"serve with stop_token_ids={ids} (vLLM) or generate(eos_token_id={ids}); "
            "`truetune chat` does",
        )


def learning_rate_range(facts: Preflight) -> Iterator[Finding]:
    """Ten times off the usual value in either direction is seldom meant."""
    ratio = facts.learning_rate / facts.suggested_rate
    if 0.1 < ratio < 10 * (1 - 1e-9):
        return
    side = "above" if ratio > 1 else "below"
    yield Finding(
        code="learning-rate-unusual",
        level="warning",
        what=f"the learning rate {facts.learning_rate:g} is {max(ratio, 1 / ratio):.0f}x {side} "
        f"the usual {facts.suggested_rate:g} for this method and model",
        why="full fine-tuning and LoRA want rates a factor of ten apart",
        fix=f"--learning-rate {facts.suggested_rate:g}",
    )


def warmup_within_run(facts: Preflight) -> Iterator[Finding]:
    """A warm-up that never ends keeps the rate below what was set."""
    if facts.warmup_steps >= facts.max_steps > 1:
        yield Finding(
            code="warmup-too-long",
            level="warning",
            what=f"the warm-up of {facts.warmup_steps} steps is as long as the run of "
            f"{facts.max_steps}",
            why="the learning rate that was set is reached at the end or never",
            fix="--warmup-ratio 0.03",
        )


CHECKS: tuple[Callable[[Preflight], Iterator[Finding]], ...] = (
    nothing_supervised,
    stop_supervised,
    ids_beyond_head,
    adapter_stop_unread,
    learning_rate_range,
    warmup_within_run,
)
