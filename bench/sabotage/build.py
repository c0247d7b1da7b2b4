"""Trainers as people write them: TRL's SFTTrainer, transformers' Trainer, hand-made batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.sabotage.house import messages, scratch

# Rows of a case, unless it needs more.
ROWS = 24


@dataclass(frozen=True)
class Batches:
    """A loop of one's own: what it iterates over and what it knows."""

    loader: Any
    tokenizer: Any
    model: Any = None
    generation_config: Any = None
    evaluation: Any = None


@dataclass(frozen=True)
class Saved:
    """A folder that somebody saved."""

    folder: str


def dataset(rows: Sequence[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def trl(tokenizer: Any, model: Any, rows: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """TRL's SFTTrainer; what is no setting of SFTConfig goes to the trainer."""
    from trl import SFTConfig, SFTTrainer

    names = ("data_collator", "peft_config", "compute_loss_func", "eval_dataset", "optimizers")
    handed = {name: settings.pop(name) for name in names if name in settings}
    if "eval_dataset" in handed:
        handed["eval_dataset"] = dataset(handed["eval_dataset"])
    args = SFTConfig(
        output_dir=scratch("run"),
        **{**_QUIET, "gradient_checkpointing": False, **settings},
    )
    return SFTTrainer(
        model, args=args, train_dataset=dataset(rows), processing_class=tokenizer, **handed
    )


def hf(tokenizer: Any, model: Any, rows: Any, collator: Any, **settings: Any) -> Any:
    """transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    trainer = settings.pop("trainer", Trainer)
    names = ("compute_loss_func", "eval_dataset", "optimizers")
    handed = {name: settings.pop(name) for name in names if name in settings}
    args = TrainingArguments(output_dir=scratch("run"), **{**_QUIET, **settings})
    return trainer(
        model,
        args=args,
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
        **handed,
    )


_QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


def chat_ids(tokenizer: Any, messages: Any, **kwargs: Any) -> list[int]:
    """Ids of a conversation as the tokenizer's template writes it."""
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **kwargs))


def chats(n: int = ROWS, **kwargs: Any) -> list[dict[str, Any]]:
    """Rows of a `messages` column."""
    return [{"messages": messages(i, **kwargs)} for i in range(n)]


def answered(tokenizer: Any, talk: Any) -> tuple[list[int], int]:
    """(ids of a conversation, where its last answer begins)."""
    prompt = chat_ids(tokenizer, talk[:-1], add_generation_prompt=True)
    return chat_ids(tokenizer, talk), len(prompt)


def on_answer(tokenizer: Any, talk: Any) -> dict[str, list[int]]:
    """A row with labels on its last answer."""
    ids, start = answered(tokenizer, talk)
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def padded(
    tokenizer: Any, features: Sequence[dict[str, Any]], label_pad: int = -100
) -> dict[str, Any]:
    """A collator by hand: pads on the right by length."""
    import torch

    pad = tokenizer.pad_token_id
    longest = max(len(f["input_ids"]) for f in features)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for feature in features:
        ids = list(feature["input_ids"])
        labels = list(feature.get("labels", ids))
        gap = longest - len(ids)
        batch["input_ids"].append(ids + [pad] * gap)
        batch["attention_mask"].append([1] * len(ids) + [0] * gap)
        batch["labels"].append(labels + [label_pad] * gap)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings}
    )


def loader(features: Sequence[dict[str, Any]], collate: Any, batch_size: int = 4) -> Any:
    """A torch DataLoader over a list."""
    from torch.utils.data import DataLoader

    return DataLoader(list(features), batch_size=batch_size, collate_fn=collate)
