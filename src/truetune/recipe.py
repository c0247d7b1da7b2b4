"""Settings of a run: what can be set, what was set, and where each value came from.

input   a YAML recipe and options of the command line (which win)
does    accepts Hugging Face spellings, checks names, types and contradictions, all at once
output  Recipe: frozen, typed, with the origin of every value

The fields of `Recipe` are the only list of settings: the command line and its help are made from
them. A value of None (or "auto") is derived later from model and data; `plan.py` says how.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truetune.errors import InputError, RecipeError

Origin = str


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
) -> Any:
    """A setting: its default, the group and text of its help, other spellings, its range."""
    meta = {
        "group": group,
        "help": help,
        "aliases": tuple(aliases),
        "shown": shown,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
    }
    return dataclasses.field(default=default, metadata=meta)


INPUT, PROMPT, METHOD, LENGTH, TRAIN, WATCH, RUN = (
    "Input",
    "Prompt and answer",
    "Method",
    "Length",
    "Training",
    "Watching",
    "Run",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a training run. See `docs/settings.md` or `truetune train --help`."""

    model: str | None = _option(
        None, INPUT, "A local folder or Hub id.", aliases=["model_name_or_path"]
    )
    data: str | None = _option(None, INPUT, "A file, folder or Hub dataset.", aliases=["dataset"])
    revision: str | None = _option(None, INPUT, "Revision of a model on the Hub.")
    split: str | None = _option(None, INPUT, "Split of a Hub dataset.", shown="train")
    schema: str = _option("auto", INPUT, "Shape of the rows, where it is not to be recognised.")
    columns: dict[str, str] | None = _option(
        None, INPUT, "Column names, e.g. prompt=question,completion=answer."
    )
    bad_rows: Literal["error", "drop"] = _option(
        "error", INPUT, "Rows that cannot be trained: stop, or drop and count them."
    )
    max_train_samples: int | None = _option(
        None, INPUT, "Read only the first rows.", minimum=1, shown="all"
    )
    eval_data: str | None = _option(
        None, INPUT, "Held-out rows of your own.", shown="5 % of the rows, at most 200"
    )
    eval_split: str | None = _option(None, INPUT, "Split of --eval-data, or of DATA.")

    chat_template: str | None = _option(
        None,
        PROMPT,
        "A .jinja file, or built-in: instruction-response, chatml-lite, user-assistant-think.",
        shown="the model's own",
    )
    stop: list[str] | None = _option(
        None, PROMPT, "Tokens that end an answer, beside the model's own.", shown="auto"
    )
    loss_on: Literal["assistant", "last", "all"] = _option(
        "assistant", PROMPT, "Which tokens are targets."
    )
    template_arg: dict[str, Any] | None = _option(
        None,
        PROMPT,
        "Argument of the template, e.g. enable_thinking=false; may be repeated.",
        aliases=["template_args", "template_kwargs", "chat_template_kwargs"],
        shown="the value under which the rows fit",
    )
    reasoning: Literal["auto", "inline", "empty", "drop"] = _option(
        "auto",
        PROMPT,
        "Reasoning of the rows: where the template takes it, between think markers, an opened "
        "block closed at once, or left out.",
    )
    think_markers: list[str] | None = _option(
        None,
        PROMPT,
        "Opening and closing marker for --reasoning inline.",
        shown="the template's own, or <think>,</think>",
    )
    history: Literal["as-data", "no-reasoning"] = _option(
        "as-data", PROMPT, "Whether earlier turns show the template their reasoning."
    )
    merge_system: bool = _option(
        False, PROMPT, "Put the system text in front of the first question."
    )
    content_specials: Literal["keep", "error"] = _option(
        "keep", PROMPT, "Rows whose text holds control tokens: told, or refused."
    )
    date: str | None = _option(
        None, PROMPT, "Today, for templates that write it (YYYY-MM-DD).", shown="the day of the run"
    )

    lora: bool = _option(False, METHOD, "Train a LoRA adapter instead of all weights.")
    lora_r: int = _option(16, METHOD, "Rank.", aliases=["lora_rank"], minimum=1)
    lora_alpha: float = _option(32, METHOD, "Scale; alpha / r multiplies the update.", above=0)
    lora_dropout: float = _option(0.05, METHOD, "Dropout before the adapter.", minimum=0, below=1)
    target_modules: list[str] | None = _option(
        None, METHOD, "Layers that get an adapter.", shown="all linear layers"
    )
    rslora: bool = _option(
        False, METHOD, "LoRA with the scale alpha / sqrt(r).", aliases=["use_rslora"]
    )
    dora: bool = _option(
        False, METHOD, "LoRA on direction, and each weight's magnitude.", aliases=["use_dora"]
    )
    qlora: bool = _option(
        False, METHOD, "LoRA on a base held in 4 bits (NF4).", aliases=["load_in_4bit"]
    )
    load_in_8bit: bool = _option(False, METHOD, "LoRA on a base held in 8 bits.")
    add_token: list[str] | None = _option(
        None,
        METHOD,
        "A token to add, whose row is trained in embedding and head; repeatable.",
        aliases=["add_tokens"],
    )
    full_fingerprint: bool = _option(
        False, METHOD, "Bind the adapter to every byte of its base, not to samples."
    )

    max_length: int | None = _option(
        None,
        LENGTH,
        "Longest row in tokens.",
        aliases=["max_seq_length", "max_seq_len", "cutoff_len"],
        shown="auto: the longest row, up to the model's context",
        minimum=2,
    )
    overlong: Literal["drop", "error", "truncate-prompt", "split-text"] = _option(
        "drop", LENGTH, "What happens to longer rows; plain text is always split."
    )
    max_dropped: float = _option(
        0.05,
        LENGTH,
        "Largest share of rows or supervised tokens to lose to length.",
        minimum=0,
        maximum=1,
    )

    epochs: float | None = _option(
        None,
        TRAIN,
        "Passes over the rows.",
        aliases=["num_train_epochs", "num_epochs"],
        shown="3 on a base model, 2 on an instruct model",
        above=0,
    )
    max_steps: int | None = _option(
        None, TRAIN, "Optimiser steps, instead of epochs.", minimum=1, shown="from epochs"
    )
    batch_size: int | None = _option(
        None,
        TRAIN,
        "Rows per optimiser step, over all devices.",
        aliases=["train_batch_size"],
        shown="16",
        minimum=1,
    )
    tokens_per_step: int | None = _option(
        None,
        TRAIN,
        "Instead of --batch-size: at most so many tokens of whole rows per optimiser step.",
        shown="not used",
        minimum=1,
    )
    micro_batch_size: int | None = _option(
        None,
        TRAIN,
        "Rows per forward pass.",
        aliases=["per_device_train_batch_size"],
        shown="the batch; without packing, by size of the logits",
        minimum=1,
    )
    micro_batch_tokens: int | None = _option(
        None,
        TRAIN,
        "Tokens per forward pass of packed rows; a longer row goes alone.",
        shown="1024 on CPU, else 16384, or what fits",
        minimum=1,
    )
    packing: bool = _option(
        True, TRAIN, "Rows without padding, shared beginnings once; --no-packing pads."
    )
    gradient_accumulation_steps: int | None = _option(
        None, TRAIN, "Forward passes per optimiser step.", minimum=1, shown="from the other two"
    )
    learning_rate: float | None = _option(
        None,
        TRAIN,
        "Peak learning rate.",
        aliases=["lr", "max_lr"],
        shown="LoRA 2e-4 base, 1e-4 instruct; full 2e-5 base, 1e-5 instruct, 3e-4 under 50 M",
        above=0,
    )
    warmup_ratio: float | None = _option(
        None, TRAIN, "Share of the steps to warm up.", shown="0.03", minimum=0, maximum=1
    )
    warmup_steps: int | None = _option(
        None, TRAIN, "Steps to warm up.", shown="from the ratio", minimum=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _option(
        "cosine", TRAIN, "How the rate falls after warm-up."
    )
    weight_decay: float = _option(0.0, TRAIN, "AdamW's decay, on matrices only.", minimum=0)
    max_grad_norm: float = _option(
        1.0, TRAIN, "Clip the gradient to this norm; 0 never.", aliases=["grad_clip"], minimum=0
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] = _option(
        "adamw", TRAIN, "Optimiser; the 8-bit ones are bitsandbytes'."
    )
    gradient_checkpointing: bool = _option(
        False, TRAIN, "Compute activations twice to keep fewer of them."
    )
    seed: int = _option(
        42,
        TRAIN,
        "Of row order, held-out split, adapter and dropout.",
        minimum=0,
        maximum=2**32 - 1,
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = _option("auto", TRAIN, "Where to compute.")
    dtype: Literal["auto", "bfloat16", "float32"] = _option(
        "auto", TRAIN, "Type to compute in; trained weights are float32 always."
    )

    eval_steps: int | None = _option(
        None, WATCH, "Steps between evaluations.", shown="10 per run", minimum=1
    )
    save_steps: int | None = _option(
        None, WATCH, "Steps between checkpoints.", shown="4 per run", minimum=1
    )
    save_total_limit: int = _option(2, WATCH, "Checkpoints to keep.", minimum=1)
    logging_steps: int = _option(1, WATCH, "Steps between lines of metrics.jsonl.", minimum=1)
    report_to: list[str] | None = _option(
        None, WATCH, "Trackers: tensorboard, wandb, mlflow, trackio.", shown="none"
    )

    output: str | None = _option(None, RUN, "Folder of the run.", aliases=["output_dir"])
    overwrite: bool = _option(
        False, RUN, "Replace a run in that folder.", aliases=["overwrite_output_dir"]
    )
    verify: bool = _option(
        True, RUN, "Have a fresh process open the result and compare it with what was trained."
    )
    no_check: bool = _option(False, RUN, "Train without the preflight; recorded in the run.")

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
_INPUTS = ("model", "data", "eval_data", "chat_template")


def settings() -> tuple[dataclasses.Field[Any], ...]:
    """The fields that are settings, in the order of the help."""
    return tuple(f for f in dataclasses.fields(Recipe) if f.name != "origins")


def setting_names() -> tuple[str, ...]:
    return tuple(field.name for field in settings())


def setting_types() -> dict[str, Any]:
    """name -> declared type."""
    return typing.get_type_hints(Recipe)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; of a run's recipe.yaml, what was set and not what was derived.

    Raises:
        InputError: it cannot be read or is not a mapping.
    """
    return {name: value for name, value, _ in _set_values(path)}


def recorded_recipe(path: Path) -> Recipe:
    """The recipe of a run, every value with the origin it had when the run was started.

    Raises:
        InputError, RecipeError: it was damaged or edited.
    """
    return make_recipe(
        *((origin or str(path), {name: value}) for name, value, origin in _set_values(path))
    )


def _set_values(path: Path) -> Iterator[tuple[str, Any, Origin]]:
    """(name, value, origin) of what was set; the origin is "" where the file has none."""
    for name, value in _read_yaml(path).items():
        if isinstance(value, dict) and set(value) == {"value", "origin"}:
            if not str(value["origin"]).startswith("default"):
                yield str(name), value["value"], str(value["origin"])
        else:
            yield str(name), value, ""


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    example = "write one setting a line, e.g. `learning_rate: 1e-4`"
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"cannot read the recipe: {reason}", where=str(path), fix="give a YAML file"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"the recipe is not valid YAML: {getattr(error, 'problem', error)}",
            where=f"{path}{line}",
            fix=f"mend that line; {example}",
        ) from error
    if not isinstance(loaded, dict):
        raise InputError("the recipe is not a list of settings", where=str(path), fix=example)
    return loaded


def make_recipe(*sources: tuple[Origin, Mapping[str, Any]]) -> Recipe:
    """A recipe from (origin, settings) pairs; later ones win.

    Raises:
        RecipeError: unknown names, wrong types, contradictions; all of them in one error.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    names = _spellings()
    for origin, given in sources:
        known = _named(origin, given, names, problems)
        for name in known:
            for other in _INSTEAD.get(name, ()):
                if other not in known:
                    values.pop(other, None)
        values |= known
        origins |= dict.fromkeys(known, origin)
    # "auto" leaves a value to be derived, as if nobody had set it.
    values = {name: value for name, value in values.items() if value != "auto" or name in _AUTO}
    origins = {name: origins[name] for name in values}
    _imply(values, origins)
    problems += _contradictions(values)
    recipe = _validated(values, origins, problems)
    if problems:
        raise RecipeError(
            problems[0] if len(problems) == 1 else f"{len(problems)} settings are wrong",
            where=", ".join(dict.fromkeys(origin for origin, given in sources if given)),
            why="" if len(problems) == 1 else "\n".join(problems),
            fix="`truetune train --help` lists every setting",
        )
    return recipe


# Settings for which "auto" is a value of its own.
_AUTO = ("device", "dtype", "schema", "reasoning")
# A source that sets one of these replaces what an earlier source said by the other.
_INSTEAD = {
    "epochs": ("max_steps",),
    "max_steps": ("epochs",),
    "batch_size": ("tokens_per_step",),
    "tokens_per_step": ("batch_size", "gradient_accumulation_steps"),
    "warmup_ratio": ("warmup_steps",),
    "warmup_steps": ("warmup_ratio",),
}
# Kinds of LoRA: setting one sets lora.
_KINDS_OF_LORA = ("rslora", "dora", "qlora", "load_in_8bit")
# Lists whose items may be separated by commas.
_LISTS = ("stop", "target_modules", "report_to", "think_markers")


def _named(
    origin: Origin, given: Mapping[str, Any], names: Mapping[str, str], problems: list[str]
) -> dict[str, Any]:
    """One source's settings under our names; adds what is wrong with them to `problems`."""
    known: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in given.items():
        name = names.get(spelling.lstrip("-").replace("-", "_"))
        if name is None:
            problems.append(_unknown(spelling, origin, names))
        elif value is not None:
            if name in known:
                problems.append(f"{spelled[name]} and {spelling} in {origin} are one setting")
            spelled[name] = spelling
            known[name] = _plain(name, value)
    return known


def _spellings() -> dict[str, str]:
    names = {field.name: field.name for field in settings()}
    names |= {alias: f.name for f in settings() for alias in f.metadata["aliases"]}
    return names


def _unknown(spelling: str, origin: str, names: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(spelling.replace("-", "_"), names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"unknown setting {spelling!r} in {origin}{hint}"


# transformers' names of optimisers that ours are.
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_bnb_8bit": "adamw_8bit"}


def _plain(name: str, value: Any) -> Any:
    """Texts of the command line as the lists and mappings that they stand for."""
    # An option of the command line that was given several times.
    if isinstance(value, tuple):
        value = ",".join(value) if name in (*_LISTS, "columns") else list(value)
    if name == "template_arg" and isinstance(value, str | list):
        return _arguments([value] if isinstance(value, str) else value)
    if name == "columns" and isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        if not pairs or not all(equals for _, equals, _ in pairs):
            return value
        return {key.strip(): column.strip() for key, _, column in pairs}
    if name == "add_token" and isinstance(value, str):
        return [value]
    if name in _LISTS and isinstance(value, str):
        if value in ("auto", "all-linear", "none"):
            return "auto"
        return [item.strip() for item in value.split(",") if item.strip()]
    if name == "date" and isinstance(value, datetime.date):
        return value.isoformat()  # YAML reads a date as one
    if name == "optim" and isinstance(value, str):
        return _OPTIMIZERS.get(value, value)
    return value


def _kinds_of_lora(values: Mapping[str, Any]) -> list[str]:
    return [name for name in _KINDS_OF_LORA if str(values.get(name)).lower() == "true"]


def _imply(values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Fill in what another setting says."""
    kinds = _kinds_of_lora(values)
    if kinds and "lora" not in values:
        values["lora"], origins["lora"] = True, f"by {kinds[0]} ({origins[kinds[0]]})"


def _arguments(texts: Sequence[str]) -> Any:
    """name=value pairs; a value that is JSON is what it says, others are text."""
    found = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not equals or not name.strip():
            return text  # no mapping: `_validated` says what one looks like
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Settings that cannot hold together. `_validated` judges each on its own."""
    problems = []
    batch, micro, accumulation = (
        _whole(values.get(name))
        for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    )
    if batch and micro and accumulation and batch != micro * accumulation:
        problems.append(
            f"batch_size {batch} is not micro_batch_size {micro} x gradient_accumulation_steps "
            f"{accumulation} = {micro * accumulation}: leave one of them out"
        )
    elif batch and micro and micro > batch:
        problems.append(f"micro_batch_size {micro} is more than batch_size {batch}")
    elif batch and accumulation and not micro and batch % accumulation:
        problems.append(
            f"batch_size {batch} cannot be cut into {accumulation} equal forward passes "
            "(gradient_accumulation_steps)"
        )
    tokens, at_once = (_whole(values.get(n)) for n in ("tokens_per_step", "micro_batch_tokens"))
    for other in ("batch_size", "gradient_accumulation_steps"):
        if tokens and other in values:
            problems.append(
                f"tokens_per_step and {other} both say how large a step is: leave one of them out"
            )
    if tokens and at_once and at_once > tokens:
        problems.append(f"micro_batch_tokens {at_once} is more than tokens_per_step {tokens}")
    for one, other in (("epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
        if one in values and other in values:
            problems.append(f"{one} and {other} both say how long: leave one of them out")
    kinds = _kinds_of_lora(values)
    if kinds and str(values.get("lora")).lower() == "false":
        problems.append(f"{kinds[0]} is a kind of LoRA, and lora is false: leave one of them out")
    if {"qlora", "load_in_8bit"} <= set(kinds):
        problems.append("qlora holds the base in 4 bits, load_in_8bit in 8: leave one of them out")
    markers = values.get("think_markers")
    if markers is not None and (not isinstance(markers, list) or len(markers) != 2):
        problems.append("think_markers are two: opening and closing, e.g. <think>,</think>")
    if (date := values.get("date")) is not None and not _is_date(date):
        problems.append(f"date must be YYYY-MM-DD, not {date!r}")
    return problems


def _is_date(value: Any) -> bool:
    try:
        datetime.date.fromisoformat(str(value))
    except ValueError:
        return False
    return True


def _whole(value: Any) -> int | None:
    """A count as the command line or YAML gives it; None where it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _validated(
    values: Mapping[str, Any], origins: Mapping[str, Origin], problems: list[str]
) -> Recipe:
    """The recipe, types and ranges checked; adds what is wrong to `problems`."""
    import pydantic

    right: dict[str, Any] = {}
    for name, declared in setting_types().items():
        if name not in values:
            continue
        value = values[name]
        try:
            # pydantic would take `yes` of YAML for the number 1.
            if isinstance(value, bool) and declared is not bool:
                raise ValueError
            right[name] = pydantic.TypeAdapter(declared).validate_python(value)
        except ValueError:
            problems.append(f"{name} must be {_described(declared)}, not {value!r}")
    for field in settings():
        problems += _out_of_range(field.name, right.get(field.name), field.metadata)
    return Recipe(**right, origins=dict(origins)) if not problems else Recipe()


def _described(declared: Any) -> str:
    """A type in words."""
    kinds = [kind for kind in typing.get_args(declared) or (declared,) if kind is not type(None)]
    if typing.get_origin(declared) is Literal:
        return f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts",
        dict[str, str]: "pairs such as prompt=question",
        dict[str, Any]: "pairs such as enable_thinking=false",
    }
    return words[kinds[0]]


def _out_of_range(name: str, value: Any, meta: Mapping[str, Any]) -> list[str]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return []
    if not math.isfinite(value):
        return [f"{name} must be a finite number, not {value}"]
    limits = (
        (meta["minimum"], "at least", lambda least: value >= least),
        (meta["maximum"], "at most", lambda most: value <= most),
        (meta["above"], "above", lambda limit: value > limit),
        (meta["below"], "below", lambda limit: value < limit),
    )
    return [
        f"{name} must be {words} {limit:,}, not {value:,}"
        for limit, words, holds in limits
        if limit is not None and not holds(limit)
    ]
