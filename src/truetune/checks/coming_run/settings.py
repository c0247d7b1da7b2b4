"""Find settings of a run that are likely mistakes: learning rate, warm-up, unread stop tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from truetune.checks.registry import check
from truetune.findings import Finding

if TYPE_CHECKING:
    from truetune.checks.preflight import Preflight


@check()
def adapter_stop_unread(facts: Preflight) -> Iterator[Finding]:
    """The trained stop token is in the base's generation_config: no loader reads an adapter's."""
    ids = list(facts.contract.stop_ids)
    if facts.lora and not facts.is_text and not set(ids) <= set(facts.base_stop_ids):
        yield Finding(
            code="adapter-stop-unread",
            level="warning",
            what="the trained stop token is not one of the base's stop tokens, and an adapter "
            "cannot change those",
            why="transformers and peft read only the base's generation_config",
            fix=f"serve with stop_token_ids={ids} (vLLM) or generate(eos_token_id={ids}); "
            "`truetune chat` already does",
        )


@check()
def learning_rate_range(facts: Preflight) -> Iterator[Finding]:
    """The learning rate is less than ten times above or below the usual value."""
    ratio = facts.learning_rate / facts.suggested_rate
    if 0.1 < ratio < 10 * (1 - 1e-9):
        return
    times = f"{ratio:.0f} times" if ratio > 1 else f"1/{1 / ratio:.0f} of"
    yield Finding(
        code="learning-rate-unusual",
        level="warning",
        what=f"the learning rate {facts.learning_rate:g} is {times} the usual "
        f"{facts.suggested_rate:g} for this method, model and rows",
        why="full fine-tuning and LoRA need learning rates that differ by about a factor of ten",
        fix=f"use --learning-rate {facts.suggested_rate:g}",
    )


@check()
def warmup_within_run(facts: Preflight) -> Iterator[Finding]:
    """The warm-up ends before the run does."""
    if facts.warmup_steps >= facts.max_steps > 1:
        yield Finding(
            code="warmup-too-long",
            level="warning",
            what=f"the warm-up of {facts.warmup_steps} steps is as long as the run of "
            f"{facts.max_steps}",
            why="the learning rate reaches its peak only at the end, or never",
            fix="use --warmup-ratio 0.03",
        )
