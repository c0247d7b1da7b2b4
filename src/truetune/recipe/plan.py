"""The numbers of a run, derived from recipe, model and rows, each with its reason.

input   Recipe (what somebody set), facts of the model, lengths and counts of the rows
output  Plan: concrete numbers; the recipe completed with them and where they came from
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.compute.batch import TokenOrder, rows_of_epochs
from truetune.findings import counted
from truetune.model.inspect import ModelFacts
from truetune.model.placement import bf16_speedup, choose_device
from truetune.recipe.rates import Start, usual_epochs, usual_rate
from truetune.recipe.settings import Recipe, setting_names

_BATCH = 16
_TEXT_BLOCK = 1024
# Logits in float32, their gradient and one copy, per micro-batch.
_LOGIT_BYTES = 4 * 3
_LOGIT_BUDGET = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Plan(Recipe):
    """A recipe with every number filled in, and where each came from.

    Attributes:
        start: whether training starts from a base or an instruct model.
        reasoning_share: of the conversations, the share with reasoning.
        max_length: longest row in tokens.
        batch_size: rows per optimizer step; None if tokens are counted instead.
        micro_batch_size: rows per forward pass, at most; None leaves tokens to decide.
        learning_rate: the peak.
        epochs: passes over the rows; None if max_steps was set.
        max_steps, warmup_steps, eval_steps, save_steps: optimizer steps.
    """

    start: Start
    reasoning_share: float
    max_length: int
    learning_rate: float
    max_steps: int
    warmup_steps: int
    eval_steps: int
    save_steps: int


def plan_length(
    recipe: Recipe, *, longest: int, context: int | None, is_text: bool
) -> tuple[int, str]:
    """The longest row allowed, in tokens, and why."""
    if recipe.max_length is not None:
        return recipe.max_length, recipe.origin("max_length")
    if is_text:
        return min(context or _TEXT_BLOCK, _TEXT_BLOCK), "default: blocks of plain text"
    if context is not None and longest > context:
        return context, f"default: the model's context; the longest example has {longest:,} tokens"
    return max(longest, 2), "default: the longest example"


def make_plan(
    recipe: Recipe,
    *,
    model: ModelFacts,
    start: Start,
    start_reason: str,
    max_length: tuple[int, str],
    lengths: Sequence[int],
    reasoning_share: float,
) -> Plan:
    """Fill in what the recipe leaves open.

    Args:
        lengths: of the training examples, in tokens.
        reasoning_share: of the conversations, the share with reasoning.
    """
    filled: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def take(name: str, derive: Callable[[], tuple[Any, str]]) -> Any:
        if recipe.given(name):
            filled[name] = getattr(recipe, name)
        else:
            filled[name], reason = derive()
            reasons[name] = f"default: {reason}"
        return filled[name]

    filled["max_length"], reasons["max_length"] = max_length
    batch, micro = _sizes(recipe, max_length[0], model.head_rows, reasons)
    filled |= {"batch_size": batch, "micro_batch_size": micro}
    take(
        "learning_rate",
        lambda: usual_rate(recipe.lora, model.num_parameters, start, start_reason, reasoning_share),
    )
    epochs = None
    if not recipe.given("max_steps"):
        a_pass = _steps_of_a_pass(recipe, lengths, batch)
        epochs = take(
            "epochs", lambda: usual_epochs(model.num_parameters, start, start_reason, a_pass)
        )
    steps = take(
        "max_steps",
        lambda: (
            _num_steps(recipe, lengths, batch, epochs or 1),
            f"{epochs:g} epoch{'' if epochs == 1 else 's'} of {counted(len(lengths), 'example')}",
        ),
    )
    ratio = 0.03 if recipe.warmup_ratio is None else recipe.warmup_ratio
    take("warmup_steps", lambda: (math.ceil(ratio * steps), f"{ratio:g} of the steps"))
    take("eval_steps", lambda: (max(math.ceil(steps / 10), 1), "10 evaluations"))
    take("save_steps", lambda: (max(math.ceil(steps / 4), 1), "4 checkpoints"))
    if dtype := _compute_type(recipe, model):
        filled["dtype"], reasons["dtype"] = dtype
    if optim := _optimizer(recipe, model, filled.get("dtype", recipe.dtype)):
        filled["optim"], reasons["optim"] = optim
    return Plan(
        **{name: getattr(recipe, name) for name in setting_names()} | filled,
        origins={**recipe.origins, **reasons},
        start=start,
        reasoning_share=reasoning_share,
    )


# Smaller models are left out, because their runs could not be repeated: at width 64, bfloat16 is
# 0.95 to 1.01 times as fast as float32, so that the choice would change from one run to the next,
# and with it every number of a run of minutes. A type that is no more than this much slower is as
# fast, within what such a short measurement is worth.
_PROBED_PARAMETERS, _AS_FAST = 50_000_000, 0.9


def _compute_type(recipe: Recipe, model: ModelFacts) -> tuple[str, str] | None:
    """Type to compute in that was measured, and what was; None leaves the choice to the device. The
    origin is no default: a resumed run, and one from the same recipe, keep what was measured here.

    The type of the weights is kept where it is as fast; bfloat16 takes half of the memory. Where
    all weights are trained in float32, because bfloat16 would round a step of the optimizer away,
    copies of them take more memory, so that bfloat16 has to be faster."""
    if recipe.dtype != "auto" or model.dtype not in ("bfloat16", "float32"):
        return None
    if recipe.given("optim") and recipe.optim == "adamw_bf16":
        return None
    device = choose_device(recipe.device)[0]
    if model.num_parameters < _PROBED_PARAMETERS or device.type not in ("cpu", "cuda", "mps"):
        return None
    own_is_float32 = model.dtype == "float32"
    adapts = recipe.lora or model.base is not None
    # The frozen base would be rounded, and the adapter served on one that is not: with random lower
    # halves of its weights, the embedded base then chooses another token at 1 of 1,000 positions.
    # On CUDA float32 costs several times as much; and 4 bits round it anyway.
    if own_is_float32 and adapts and not recipe.qlora and device.type != "cuda":
        return None
    # Weights in two halves are not rounded again for each pass.
    trained = not adapts and (own_is_float32 or device.type != "cuda")
    times = bf16_speedup(model.hidden_size, device, trained=trained)
    faster = times > 1 / _AS_FAST
    keeps_bf16 = not trained and not own_is_float32
    chosen = "bfloat16" if faster or (times >= _AS_FAST and keeps_bf16) else "float32"
    compared = "slower than float32" if times else "not computed here, or wrongly"
    if faster:
        compared = f"{times:.1f} times as fast as float32"
    elif times >= _AS_FAST:
        compared = "as fast as float32"
    own = ", the dtype of the weights"
    said = f"bfloat16 is {compared}{own}" if own_is_float32 else f"bfloat16{own}, is {compared}"
    if times >= _AS_FAST and not faster and (trained or keeps_bf16):
        said += f", and takes {'more' if trained else 'half of the'} memory"
    kept = "; trained weights stay in float32" if trained and faster else ""
    return chosen, f"measured on this device: {said}{kept}"


def _optimizer(recipe: Recipe, model: ModelFacts, dtype: str) -> tuple[str, str] | None:
    """Another optimizer than the usual one, and why; None leaves it.

    Args:
        dtype: to compute in.
    """
    asked = recipe.given("optim") or dtype not in ("auto", "bfloat16")
    if asked or recipe.lora or model.base is not None or model.dtype != "bfloat16":
        return None
    if choose_device(recipe.device)[0].type != "cuda":
        return None
    return (
        "adamw_bf16",
        "default for all weights of a bfloat16 model on a GPU: as exact as adamw, with 14 bytes "
        "per weight instead of 18, and without casts in the forward pass",
    )


def _num_steps(recipe: Recipe, lengths: Sequence[int], batch: int | None, epochs: float) -> int:
    if batch is not None:
        return math.ceil(rows_of_epochs(len(lengths), epochs) / batch)
    assert recipe.tokens_per_step
    steps = TokenOrder(lengths, recipe.tokens_per_step, recipe.seed, epochs).num_steps
    assert steps is not None
    return steps


def _steps_of_a_pass(recipe: Recipe, lengths: Sequence[int], batch: int | None) -> float:
    """A fraction: of several passes none ends with a step, so that none is rounded up."""
    if batch is not None:
        return len(lengths) / batch
    assert recipe.tokens_per_step
    # A row that is longer than a step fills one.
    return sum(min(n, recipe.tokens_per_step) for n in lengths) / recipe.tokens_per_step


def _sizes(
    recipe: Recipe, max_length: int, head_rows: int, reasons: dict[str, str]
) -> tuple[int | None, int | None]:
    """Rows per step and per forward pass; contradictions were refused with the recipe."""
    if recipe.tokens_per_step:
        micro = recipe.micro_batch_size
        if micro is None and not recipe.packing:
            micro = _rows_of_logits(max_length, head_rows, reasons)
        return None, micro
    batch, micro = recipe.batch_size, recipe.micro_batch_size
    accumulation = recipe.gradient_accumulation_steps
    if batch is None and micro and accumulation:
        batch = micro * accumulation
        reasons["batch_size"] = (
            f"default: {counted(micro, 'example')} x {accumulation} forward passes"
        )
    if batch is None:
        parts = accumulation or 1
        batch = max(math.ceil(_BATCH / parts) * parts, micro or 0)
        cut = f", rounded up to a multiple of {parts}" if batch % _BATCH and accumulation else ""
        reasons["batch_size"] = f"default: {_BATCH} (QLoRA, Dettmers et al. 2023){cut}"
    if micro is None and accumulation:
        micro = batch // accumulation
        reasons["micro_batch_size"] = (
            f"default: {counted(batch, 'example')} in {accumulation} forward passes"
        )
    if micro is None and recipe.packing:
        micro = batch
        reasons["micro_batch_size"] = "default: the batch; tokens limit each forward pass"
    if micro is None:
        micro = min(batch, _rows_of_logits(max_length, head_rows, reasons))
    return batch, micro


def _rows_of_logits(max_length: int, head_rows: int, reasons: dict[str, str]) -> int:
    """Padded rows of which all logits are made at once."""
    reasons["micro_batch_size"] = (
        f"default: {head_rows:,} logits per token stay under 2 GiB at {max_length:,} tokens"
    )
    return max(_LOGIT_BUDGET // (max_length * head_rows * _LOGIT_BYTES), 1)


def suggested_rate(plan: Plan, model: ModelFacts) -> float:
    """The default learning rate for this method, model and start."""
    parameters, share = model.num_parameters, plan.reasoning_share
    return usual_rate(plan.lora, parameters, plan.start, "", share)[0]
