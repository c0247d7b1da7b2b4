"""Learning rates and epochs by method, start and size, with where they come from."""

from __future__ import annotations

import math
from typing import Literal

Start = Literal["base", "instruct"]

# QLoRA practice for a base; gentler if there is something to forget, and on reasoning traces.
LORA = {"base": 2e-4, "instruct": 1e-4, "reasoning": 3e-5, "small": 3e-3}
FULL = {"base": 2e-5, "instruct": 1e-5, "small": 3e-4}
EPOCHS: dict[Start, float] = {"base": 3.0, "instruct": 2.0}
# Weights of a model that is trained from scratch in all but name: rates of large ones move it too
# little, and so do their few passes (measured on the embedded base, docs/log.md).
SMALL = 50_000_000
_SMALL_PASSES, _SMALL_STEPS, _SMALL_EPOCHS = 30, (300, 600), 75


def words(rate: float) -> str:
    """`2e-4`, as people write rates."""
    return f"{rate:.0e}".replace("e-0", "e-")


_LORA, _FULL = ({name: words(rate) for name, rate in rates.items()} for rates in (LORA, FULL))
# On the settings page, and where no plan says more.
SHOWN = (
    f"LoRA {_LORA['base']} base, {_LORA['instruct']} instruct, {_LORA['reasoning']} instruct with "
    f"reasoning traces; full {_FULL['base']} base, {_FULL['instruct']} instruct; below 50M "
    f"parameters, LoRA {_LORA['small']}, full {_FULL['small']}"
)
USUAL_RATES = (
    f"{_LORA['instruct']} for LoRA, {_FULL['instruct']} to {_FULL['base']} for all weights"
)


def usual_rate(
    lora: bool, num_parameters: int, start: Start, why: str, reasoning_share: float
) -> tuple[float, str]:
    """Peak learning rate and its source.

    Args:
        why: what the start was recognised by.
        reasoning_share: of the conversations, the share with reasoning.
    """
    if lora and num_parameters < SMALL:
        return LORA["small"], f"LoRA on {num_parameters:,} parameters; ten times the full rate"
    if lora:
        if start == "base":
            return LORA["base"], f"LoRA on a base model ({why}); the rate of QLoRA"
        if reasoning_share > 0.5:
            return LORA["reasoning"], f"LoRA on reasoning traces, instruct model ({why})"
        return LORA["instruct"], f"LoRA on an instruct model ({why}); gentler than on a base"
    if num_parameters < SMALL:
        return FULL["small"], f"all weights of a model of {num_parameters:,} parameters"
    if start == "base":
        return FULL["base"], f"all weights of a base model ({why}); the rate of Alpaca"
    return FULL["instruct"], f"all weights of an instruct model ({why})"


def usual_epochs(num_parameters: int, start: Start, why: str, steps: float) -> tuple[float, str]:
    """Passes over the rows, and why.

    Args:
        steps: of one pass; not a whole number where a step goes on in the next pass.
    """
    least, most = _SMALL_STEPS
    wanted = min(max(_SMALL_PASSES * steps, least), most)
    passes = min(math.ceil(wanted / steps), _SMALL_EPOCHS)
    if num_parameters < SMALL and passes > EPOCHS[start]:
        return float(passes), f"a model of {num_parameters:,} parameters needs many passes"
    return EPOCHS[start], f"{start}: {why}"


def what_follows(kind: str, num_parameters: int | None) -> str:
    """Return the defaults for a base, instruct or unknown model, in words."""
    if num_parameters is not None and num_parameters < SMALL:
        return (
            f"the same defaults for base and instruct models of this size: {_LORA['small']} for "
            f"LoRA, {_FULL['small']} for "
            "all weights, and many epochs"
        )
    if kind == "base":
        return (
            f"{_LORA['base']} for LoRA, {EPOCHS['base']:g} epochs; train the embeddings of its "
            "chat tokens, or use a template without new tokens"
        )
    if kind == "instruct":
        return (
            f"{_LORA['instruct']} for LoRA ({_LORA['reasoning']} on reasoning traces), "
            f"{EPOCHS['instruct']:g} epochs: it needs less training, and more would make it forget"
        )
    return "set --learning-rate and --epochs yourself"
