"""Recipes of other trainers: recognised by their keys, and translated key by key."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Pairs = Iterable[tuple[str, Any]]
# Columns of the translation, below the nine of an error's label; of them the keys'.
_WIDTH, _KEYS = 71, 34


@dataclass(frozen=True)
class Translation:
    """A foreign recipe in our words.

    Attributes:
        tool: whose it is.
        settings: ours, for a recipe.
        lines: (their key and value, what becomes of it), one each.
    """

    tool: str
    settings: dict[str, Any]
    lines: tuple[tuple[str, str], ...]

    def recipe(self) -> str:
        """As a YAML recipe."""
        import yaml

        text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True).rstrip()
        return text if self.settings.get("data") else f"{text}\ndata:  # a file, or a Hub id"

    def table(self) -> str:
        """Key by key, in lines that fit a terminal."""
        width = min(max((len(key) for key, _ in self.lines), default=0), _KEYS)
        indent = " " * (width + 6)
        lines = []
        for key, meaning in self.lines:
            first, *rest = textwrap.wrap(
                meaning, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
            ) or [""]
            if len(key) > width:
                lines += [key, f"{'':<{width}}  ->  {first}"]
            else:
                lines.append(f"{key:<{width}}  ->  {first}")
            lines += [indent + part for part in rest]
        return "\n".join(lines)


def translated(given: Mapping[str, Any]) -> Translation | None:
    """The recipe of another trainer in our words; None if it is none, or may be one of ours."""
    tool = next((t for t, marks in _MARKS.items() if any(m in given for m in marks)), None)
    if tool is None:
        return None
    settings: dict[str, Any] = {}
    lines = []
    for key, value in given.items():
        name = str(key)
        found = _TOOLS[tool].get(name) or _COMMON.get(name)
        shown = f"{name}: {_short(value)}"
        if found is None:
            lines.append((shown, _WITHOUT.get(name, "no counterpart")))
            continue
        pairs = {k: v for k, v in found(value) if v is not None} if value is not None else {}
        settings |= pairs
        ours = ", ".join(f"{k}: {_short(v)}" for k, v in pairs.items())
        lines.append((shown, ours or _WITHOUT.get(name, "the default")))
        lines += [
            (f"{name}[{number}]: {_short(more)}", _ONE_SET)
            for number, more in enumerate(_sets(name, value)[1:], start=1)
        ]
    if "micro_batch_size" in settings and "gradient_accumulation_steps" not in settings:
        # Theirs is 1; ours would cut the default batch into micro-batches of that size.
        settings["gradient_accumulation_steps"] = 1
        lines.append(("gradient_accumulation_steps: (1)", "gradient_accumulation_steps: 1"))
    steps = [settings.get(k) for k in ("micro_batch_size", "gradient_accumulation_steps")]
    if all(isinstance(n, int) for n in steps):
        # Theirs is by device, ours over all of them; one device is meant where nothing is said.
        settings.pop("batch_size", None)
    if isinstance(settings.get("max_steps"), int) and settings["max_steps"] > 0:
        settings.pop("epochs", None)
    else:
        settings.pop("max_steps", None)
    return Translation(tool, settings, tuple(lines))


_ONE_SET = "no counterpart: a run reads one file or folder; put all files into one folder"


def _sets(name: str, value: Any) -> list[Any]:
    """The data sets that a key names."""
    if name == "datasets" and isinstance(value, list):
        return [v.get("path") if isinstance(v, Mapping) else v for v in value]
    if name == "dataset" and isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value]


def _short(value: Any, most: int = 40) -> str:
    text = "" if value is None else str(value).replace("\n", " ")
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _to(name: str) -> Callable[[Any], Pairs]:
    return lambda value: [(name, value)]


def _yes(name: str) -> Callable[[Any], Pairs]:
    return lambda value: [(name, True)] if value is True else []


def _registered(value: Any) -> Any:
    """A path or a Hub id; None for a name of LLaMA-Factory's list of data sets."""
    return value if isinstance(value, str) and re.search(r"[/.]", value) else None


def _share_or_count(value: Any) -> Pairs:
    """Evaluations and checkpoints: a count of steps, or a share of them, which is ours too by
    default."""
    return [("eval_steps", int(value))] if isinstance(value, int | float) and value >= 1 else []


def _saves(value: Any) -> Pairs:
    return [("save_steps", int(value))] if isinstance(value, int | float) and value >= 1 else []


def _compute(name: str) -> Callable[[Any], Pairs]:
    return lambda value: [("dtype", name)] if value in (True, "auto") else []


def _adapter(value: Any) -> Pairs:
    kind = str(value).lower()
    return [("qlora", True)] if kind == "qlora" else [("lora", True)] if kind == "lora" else []


def _axolotl_data(value: Any) -> Pairs:
    """The first data set; the columns that it names."""
    first = value[0] if isinstance(value, list) and value else {}
    if not isinstance(first, Mapping):
        return
    yield "data", first.get("path")
    yield "split", first.get("split")
    kind = str(first.get("type") or "")
    schemas = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text"}
    yield "schema", schemas.get(kind)


def _axolotl_stop(value: Any) -> Pairs:
    stop = value.get("eos_token") if isinstance(value, Mapping) else None
    yield "stop", [stop] if stop else None


def _targets(value: Any) -> Pairs:
    names = value.split(",") if isinstance(value, str) else value
    yield "target_modules", None if names in (["all"], ["all-linear"]) else names


def _scheduler(value: Any) -> Pairs:
    name = str(value).lower()
    kinds = ("cosine", "linear", "constant")
    return [("lr_scheduler_type", next((k for k in kinds if name.startswith(k)), None))]


def _optimizer(value: Any) -> Pairs:
    name = str(value).lower()
    if "paged" in name and "8bit" in name:
        return [("optim", "paged_adamw_8bit")]
    if "8bit" in name:
        return [("optim", "adamw_8bit")]
    return [("optim", "sgd")] if name == "sgd" else [("optim", "adamw")] if "adam" in name else []


def _tracker(name: str) -> Callable[[Any], Pairs]:
    return lambda value: [("report_to", [name])] if value else []


def _trackers(value: Any) -> Pairs:
    names = [value] if isinstance(value, str) else list(value or [])
    known = [n for n in names if n in ("tensorboard", "wandb", "mlflow", "trackio")]
    return [("report_to", known)] if known else []


def _number(name: str) -> Callable[[Any], Pairs]:
    """YAML reads 2e-4 as a text."""

    def pairs(value: Any) -> Pairs:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return []
        return [(name, number)] if math.isfinite(number) else []

    return pairs


def _finetuning(value: Any) -> Pairs:
    return [("lora", True)] if value == "lora" else []


def _bits(value: Any) -> Pairs:
    return [("qlora", True)] if str(value) == "4" else [("load_in_8bit", True)]


def _only_train_on_prompt(value: Any) -> Pairs:
    return [("loss_on", "all")] if value is True else []


def _assistant_only(value: Any) -> Pairs:
    return [("loss_on", "assistant" if value else "all")]


_COMMON: dict[str, Callable[[Any], Pairs]] = {
    **{
        name: _to(name)
        for name in (
            "gradient_accumulation_steps", "max_grad_norm", "warmup_steps", "warmup_ratio", "seed",
            "max_steps", "logging_steps", "save_total_limit",
            "lora_alpha", "lora_dropout",
        )
    },
    "learning_rate": _number("learning_rate"),
    "weight_decay": _number("weight_decay"),
    "num_train_epochs": _to("epochs"),
    "num_epochs": _to("epochs"),
    "lora_r": _to("lora_r"),
    "output_dir": _to("output"),
    "overwrite_output_dir": _yes("overwrite"),
    # Axolotl has kinds of it.
    "gradient_checkpointing": lambda v: [("gradient_checkpointing", bool(v))],
    "per_device_train_batch_size": _to("micro_batch_size"),
    "lr_scheduler_type": _scheduler,
    "lr_scheduler": _scheduler,
    "optim": _optimizer,
    "optimizer": _optimizer,
    "bf16": _compute("bfloat16"),
    "eval_steps": _share_or_count,
    "save_steps": _saves,
    "report_to": _trackers,
    "load_in_4bit": _yes("qlora"),
    "load_in_8bit": _yes("load_in_8bit"),
    "use_dora": _yes("dora"),
    "use_rslora": _yes("rslora"),
    "packing": _to("packing"),
}  # fmt: skip
_TOOLS: dict[str, dict[str, Callable[[Any], Pairs]]] = {
    "Axolotl": {
        "base_model": _to("model"),
        "revision_of_model": _to("revision"),
        "datasets": _axolotl_data,
        "test_datasets": lambda v: [("eval_data", dict(_axolotl_data(v)).get("data"))],
        "adapter": _adapter,
        "sequence_len": _to("max_length"),
        "micro_batch_size": _to("micro_batch_size"),
        "lora_target_modules": _targets,
        "lora_target_linear": lambda v: [("target_modules", None)],
        "peft_use_dora": _yes("dora"),
        "peft_use_rslora": _yes("rslora"),
        "chat_template_jinja": _to("chat_template"),
        "special_tokens": _axolotl_stop,
        "tokens": _to("add_token"),
        "train_on_inputs": _only_train_on_prompt,
        "sample_packing": _to("packing"),
        "wandb_project": _tracker("wandb"),
        "use_tensorboard": _tracker("tensorboard"),
    },
    "LLaMA-Factory": {
        "model_name_or_path": _to("model"),
        "dataset": lambda v: [("data", _registered(_sets("dataset", v)[0]))],
        "eval_dataset": lambda v: [("eval_data", _registered(_sets("dataset", v)[0]))],
        "finetuning_type": _finetuning,
        "quantization_bit": _bits,
        "cutoff_len": _to("max_length"),
        "max_samples": _to("max_train_samples"),
        "lora_rank": _to("lora_r"),
        "lora_target": _targets,
        "train_on_prompt": _only_train_on_prompt,
        "mask_history": lambda v: [("loss_on", "last")] if v is True else [],
    },
    "TRL": {
        "model_name_or_path": _to("model"),
        "model_revision": _to("revision"),
        "dataset_name": _to("data"),
        "dataset_train_split": _to("split"),
        "dataset_test_split": _to("eval_split"),
        "use_peft": _yes("lora"),
        "lora_target_modules": _targets,
        "max_length": _to("max_length"),
        "max_seq_length": _to("max_length"),
        "chat_template_path": _to("chat_template"),
        "eos_token": lambda v: [("stop", [v])],
        "assistant_only_loss": _assistant_only,
        "torch_dtype": lambda v: [("dtype", v if v in ("bfloat16", "float32") else None)],
        "dtype": lambda v: [("dtype", v if v in ("bfloat16", "float32") else None)],
    },
}
# Keys that a recipe of the tool has and one of ours never.
_MARKS = {
    "Axolotl": ("base_model", "sequence_len", "datasets", "sample_packing", "adapter"),
    "LLaMA-Factory": ("finetuning_type", "stage", "quantization_bit", "template"),
    "TRL": ("dataset_name", "use_peft", "dataset_train_split", "assistant_only_loss"),
}
# Why a key is not needed.
_WITHOUT = {
    **dict.fromkeys(
        ("chat_template", "template"), "not needed: the model's own template is used as it is"
    ),
    **dict.fromkeys(
        (
            "flash_attention", "flash_attn", "xformers_attention", "sdp_attention",
            "attn_implementation",
        ),
        "not needed: an attention implementation is chosen and tested on the model",
    ),
    **dict.fromkeys(("val_set_size", "val_size"),
        "no counterpart: of 100 rows or more, 5 % (at most 200) are held out; --eval-data names "
        "others"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "per_device_eval_batch_size"),
        "not needed: held-out rows are evaluated every --eval-steps"),
    **dict.fromkeys(("pad_to_sequence_len", "group_by_length", "eval_sample_packing"),
        "not needed: nothing is padded"),
    **dict.fromkeys(("fp16", "tf32"), "no counterpart: float32 or bfloat16"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"),
        "no counterpart: torchrun starts several processes, each with all weights"),
    **dict.fromkeys(("do_train", "do_eval", "stage", "model_type", "tokenizer_type", "strict"),
        "not needed"),
    "load_in_4bit": "not used",
    "load_in_8bit": "not used",
    **dict.fromkeys(("dataset", "eval_dataset"),
        "no counterpart: a name in dataset_info.json; pass the file or Hub id that it stands for"),
    "dataset_dir": "no counterpart: pass the path of the data itself",
    "dataset_prepared_path": "not needed: rows are read again",
    "resume_from_checkpoint": "truetune train --resume RUN",
}  # fmt: skip
