"""Settings of a run: what can be set, and where each value came from.

output  `Recipe`: frozen, typed, with the origin of every value; `settings`, the list of its fields

The fields of `Recipe` are the only list of settings: the command line and its help are made from
them. A value of None (or "auto") is derived later from model and data; `plan.py` says how.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truetune.recipe.rates import SHOWN

Origin = str


INPUT, PROMPT, METHOD, LENGTH, TRAIN, WATCH, RUN = (
    "Input",
    "Prompt and answer",
    "Method",
    "Length",
    "Training",
    "Monitoring",
    "Run",
)


def _option(
    default: Any,
    group: str,
    help: str,
    *,
    aliases: Sequence[str] = (),
    shown: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    resumed: bool = True,
) -> Any:
    """A setting: its default, the group and text of its help, other spellings, its range, and
    whether a resumed run must have the same (of the groups that decide about the weights)."""
    meta = {
        "group": group,
        "help": help,
        "aliases": tuple(aliases),
        "shown": shown,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "resumed": resumed and group in (METHOD, LENGTH, TRAIN),
    }
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a training run. See `docs/settings.md` or `truetune train --help`."""

    model: str | None = _option(
        None, INPUT, "A local folder, a Hub id, or embedded.", aliases=["model_name_or_path"]
    )
    data: str | None = _option(None, INPUT, "A file, folder or Hub dataset.", aliases=["dataset"])
    revision: str | None = _option(None, INPUT, "Revision of a model on the Hub.")
    split: str | None = _option(
        None, INPUT, "Split of a Hub dataset or of a data folder.", shown="train"
    )
    schema: str = _option("auto", INPUT, "Schema of the rows; detected automatically by default.")
    columns: dict[str, str] | None = _option(
        None, INPUT, "Column names, e.g. prompt=question,completion=answer."
    )
    bad_rows: Literal["error", "drop"] = _option(
        "error",
        INPUT,
        "What to do with rows that cannot be trained on: stop, or drop and count them.",
    )
    max_train_samples: int | None = _option(
        None, INPUT, "Read only the first rows, up to this number.", minimum=1, shown="all"
    )
    eval_data: str | None = _option(
        None,
        INPUT,
        "Your own held-out rows.",
        shown="5 % of the rows, at most 200; none if there are fewer than 100 rows",
    )
    eval_split: str | None = _option(None, INPUT, "Held-out split of --eval-data, or of DATA.")

    chat_template: str | None = _option(
        None,
        PROMPT,
        "A .jinja file, or built-in: instruction-response, chatml-lite, user-assistant-think.",
        shown="the model's own",
    )
    stop: list[str] | None = _option(
        None,
        PROMPT,
        "Tokens that end an answer, besides the model's own; separated by commas, or repeated.",
    )
    loss_on: Literal["assistant", "last", "all"] = _option(
        "assistant", PROMPT, "Which tokens count in the loss."
    )
    template_arg: dict[str, Any] | None = _option(
        None,
        PROMPT,
        "Argument for the template, e.g. enable_thinking=false; may be repeated.",
        aliases=["template_args", "template_kwargs", "chat_template_kwargs"],
        shown="the value that renders the rows unchanged",
    )
    reasoning: Literal["auto", "inline", "empty", "drop"] = _option(
        "auto",
        PROMPT,
        "What to do with the rows' reasoning: pass it to the template, write it between think "
        "markers, close an opened think block immediately, or omit it.",
    )
    think_markers: list[str] | None = _option(
        None,
        PROMPT,
        "Opening and closing markers for --reasoning inline.",
        shown="the template's own, or <think>,</think>",
    )
    history: Literal["as-data", "no-reasoning"] = _option(
        "as-data", PROMPT, "Whether the template receives the reasoning of earlier turns."
    )
    merge_system: bool = _option(
        False, PROMPT, "Prepend the system message to the first user message."
    )
    template_words: Literal["refuse", "keep"] = _option(
        "refuse",
        PROMPT,
        "What to do with answers to which the template adds words: refuse them, or train on the "
        "words and report them.",
    )
    content_specials: Literal["keep", "error"] = _option(
        "keep",
        PROMPT,
        "What to do with rows whose text contains control tokens: report them, or refuse them.",
    )
    date: str | None = _option(
        None,
        PROMPT,
        "Date for templates that write today's date (YYYY-MM-DD).",
        shown="the day of the run",
    )

    lora: bool = _option(False, METHOD, "Train a LoRA adapter instead of all weights.")
    lora_r: int = _option(16, METHOD, "LoRA rank.", aliases=["lora_rank"], minimum=1)
    lora_alpha: float = _option(
        32, METHOD, "LoRA alpha: the update is scaled by alpha / r.", above=0
    )
    lora_dropout: float = _option(0.05, METHOD, "LoRA dropout.", minimum=0, below=1)
    target_modules: list[str] | None = _option(
        None,
        METHOD,
        "Layers that get an adapter; separated by commas, or repeated.",
        shown="all linear layers",
    )
    rslora: bool = _option(
        False, METHOD, "LoRA with the scale alpha / sqrt(r).", aliases=["use_rslora"]
    )
    dora: bool = _option(
        False,
        METHOD,
        "LoRA that also trains the magnitude of each weight (DoRA).",
        aliases=["use_dora"],
    )
    qlora: bool = _option(
        False, METHOD, "LoRA on a base model in 4 bits (NF4).", aliases=["load_in_4bit"]
    )
    load_in_8bit: bool = _option(False, METHOD, "LoRA on a base model in 8 bits.")
    add_token: list[str] | None = _option(
        None,
        METHOD,
        "A token to add; its input and output embeddings are trained. May be repeated.",
        aliases=["add_tokens"],
    )
    full_fingerprint: bool = _option(
        False, METHOD, "Fingerprint every byte of the adapter's base model instead of samples."
    )

    max_length: int | None = _option(
        None,
        LENGTH,
        "Maximum length of an example, in tokens.",
        aliases=["max_seq_length", "max_seq_len", "cutoff_len"],
        shown="auto, the longest example up to the model's context",
        minimum=2,
    )
    overlong: Literal["drop", "error", "truncate-prompt", "split-text"] = _option(
        "drop",
        LENGTH,
        "What to do with conversations longer than --max-length: drop them, stop with an error, or "
        "cut the beginning of their prompts. Plain text is always split; split-text is another "
        "name for drop.",
    )
    max_dropped: float = _option(
        0.05,
        LENGTH,
        "Largest share of examples or supervised tokens that may be lost to the length limit.",
        minimum=0,
        maximum=1,
    )

    epochs: float | None = _option(
        None,
        TRAIN,
        "Passes over the training data.",
        aliases=["num_train_epochs", "num_epochs"],
        shown="3 for a base model, 2 for an instruct model; below 50M parameters, up to 75 (300 "
        "to 600 steps)",
        above=0,
    )
    max_steps: int | None = _option(
        None, TRAIN, "Number of optimizer steps, instead of epochs.", minimum=1, shown="from epochs"
    )
    batch_size: int | None = _option(
        None,
        TRAIN,
        "Examples per optimizer step, across all devices.",
        aliases=["train_batch_size"],
        shown="16",
        minimum=1,
    )
    tokens_per_step: int | None = _option(
        None,
        TRAIN,
        "Maximum number of tokens per optimizer step, in whole examples; replaces --batch-size.",
        shown="not used",
        minimum=1,
    )
    micro_batch_size: int | None = _option(
        None,
        TRAIN,
        "Examples per forward pass.",
        aliases=["per_device_train_batch_size"],
        shown="the whole batch; without packing, limited by the size of the logits",
        minimum=1,
    )
    micro_batch_tokens: int | None = _option(
        None,
        TRAIN,
        "Tokens per forward pass of packed examples; a longer example gets a pass of its own.",
        shown="1024 on CPU, 16384 elsewhere, or fewer if memory is short",
        minimum=1,
    )
    packing: bool = _option(
        True,
        TRAIN,
        "Pack examples without padding and compute shared prefixes once; --no-packing pads.",
    )
    gradient_accumulation_steps: int | None = _option(
        None,
        TRAIN,
        "Forward passes per optimizer step.",
        minimum=1,
        shown="batch_size divided by micro_batch_size",
    )
    learning_rate: float | None = _option(
        None,
        TRAIN,
        "Peak learning rate.",
        aliases=["lr", "max_lr"],
        shown=SHOWN,
        above=0,
    )
    any_learning_rate: bool = _option(
        False, TRAIN, "Accept a learning rate above 0.1 (above 10 with sgd)."
    )
    warmup_ratio: float | None = _option(
        None, TRAIN, "Share of the steps used for warm-up.", shown="0.03", minimum=0, maximum=1
    )
    warmup_steps: int | None = _option(
        None, TRAIN, "Number of warm-up steps.", shown="from the ratio", minimum=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _option(
        "cosine", TRAIN, "Learning-rate schedule after warm-up."
    )
    weight_decay: float = _option(0.0, TRAIN, "Weight decay of AdamW, on matrices only.", minimum=0)
    max_grad_norm: float = _option(
        1.0,
        TRAIN,
        "Clip the gradient to this norm; 0 turns clipping off.",
        aliases=["grad_clip"],
        minimum=0,
    )
    optim: Literal["adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit", "sgd"] = _option(
        "adamw",
        TRAIN,
        "Optimizer. adamw_bf16 keeps weights in bfloat16 and stores their rounding errors; it is "
        "the default if all weights of a bfloat16 model are trained on CUDA. The 8-bit optimizers "
        "need bitsandbytes.",
    )
    gradient_checkpointing: bool = _option(
        False,
        TRAIN,
        "Recompute activations to save memory; enabled automatically if the longest example would "
        "not fit.",
    )
    seed: int = _option(
        42,
        TRAIN,
        "Random seed for the order of examples, the held-out split, the adapter and dropout.",
        minimum=0,
        maximum=2**32 - 1,
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = _option(
        "auto", TRAIN, "Device to train on.", resumed=False
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _option(
        "auto",
        TRAIN,
        "Compute dtype. Trained weights are kept in float32, except with adamw_bf16.",
    )

    eval_steps: int | None = _option(
        None,
        WATCH,
        "Steps between evaluations. If unset, replies are measured as often as 3 % of the "
        "training time allows; if set, at every evaluation, but at no more than ten.",
        shown="10 evaluations per run",
        minimum=1,
    )
    save_steps: int | None = _option(
        None, WATCH, "Steps between checkpoints.", shown="4 checkpoints per run", minimum=1
    )
    save_total_limit: int = _option(2, WATCH, "Checkpoints to keep.", minimum=1)
    logging_steps: int = _option(1, WATCH, "Steps between lines of metrics.jsonl.", minimum=1)
    patience: int | None = _option(
        None,
        WATCH,
        "Stop after this many evaluations without a lower held-out loss, and save the step with "
        "the lowest loss among those with healthy replies.",
        shown="run all steps and save the last one",
        minimum=1,
    )
    keep_text: str | None = _option(
        None,
        WATCH,
        "Text that the model must not forget, as a text file or rows; only its loss is measured.",
        shown="text that the model writes before the first step",
    )
    on_collapse: Literal["stop", "rewind", "continue"] = _option(
        "stop",
        WATCH,
        "What to do when a run collapses: stop, go back once to the last healthy checkpoint and "
        "halve the learning rate, or continue and report it.",
    )
    report_to: list[str] | None = _option(
        None,
        WATCH,
        "Trackers, separated by commas: trackio, tensorboard, wandb, mlflow.",
        shown="none",
    )

    output: str | None = _option(None, RUN, "Folder for the run.", aliases=["output_dir"])
    overwrite: bool = _option(
        False, RUN, "Replace an existing run in that folder.", aliases=["overwrite_output_dir"]
    )
    verify: bool = _option(
        True, RUN, "Open the result in a fresh process and compare it with what was trained."
    )
    no_check: bool = _option(
        False, RUN, "Train without the checks; the run records that they were skipped."
    )

    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict, repr=False)

    def origin(self, name: str) -> Origin:
        """Where a value came from."""
        return self.origins.get(name, "default")

    def given(self, name: str) -> bool:
        """Whether somebody set it; what was derived is a default."""
        return not self.origin(name).startswith("default")

    @property
    def method(self) -> str:
        """What is trained, in words."""
        if not self.lora:
            return "all weights"
        name = "DoRA" if self.dora else "LoRA"
        name = f"rank-stabilised {name}" if self.rslora else name
        bits = 4 * self.qlora or 8 * self.load_in_8bit
        return f"{name} on a base in {bits} bits" if bits else name

    def identity(self) -> dict[str, Any]:
        """The settings that must be equal for a checkpoint to be continued exactly."""
        return {f.name: getattr(self, f.name) for f in settings() if f.metadata["resumed"]}

    def rows(self) -> dict[str, dict[str, Any]]:
        """name -> {value, origin}, as recipe.yaml holds it and `read_recipe` takes it back.

        Local files are absolute: a run is resumed and compared from any folder.
        """
        return {
            name: {"value": self._located(name), "origin": self.origin(name)}
            for name in setting_names()
        }

    def _located(self, name: str) -> Any:
        value = getattr(self, name)
        if name in _INPUTS and value and Path(value).expanduser().exists():
            return str(Path(value).expanduser().absolute())
        return value


# Settings that may name something on this machine.
_INPUTS = ("model", "data", "eval_data", "chat_template", "keep_text")


def settings() -> tuple[dataclasses.Field[Any], ...]:
    """The fields that are settings, in the order of the help."""
    return tuple(f for f in dataclasses.fields(Recipe) if f.name != "origins")


def setting_names() -> tuple[str, ...]:
    return tuple(field.name for field in settings())


def setting_types() -> dict[str, Any]:
    """name -> declared type."""
    return typing.get_type_hints(Recipe)
