"""The only place that loads or saves weights: model and tokenizer bound together."""

from truetune.model.architecture import context_length
from truetune.model.inspect import ModelFacts, describe, look_at, require_weights
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import (
    LoraSettings,
    add_lora,
    enable_gradient_checkpointing,
    lora_target_findings,
    trainable_share,
)
from truetune.model.merge import Merged, Onto, merge_adapter
from truetune.model.new_tokens import (
    NewToken,
    RowsBefore,
    add_tokens,
    make_room,
    require_room,
    rows_now,
    rows_report,
    start_full_rows,
)
from truetune.model.placement import Choice, Purpose, choose_device
from truetune.model.quantise import NAMES, LoadIn, Quantised
from truetune.model.readback import round_as_saved
from truetune.model.save import SavedFile, SaveReport, save_model
from truetune.model.tokenizer import load_tokenizer, num_ids

__all__ = [
    "NAMES",
    "Choice",
    "LoadIn",
    "LoadedModel",
    "LoraSettings",
    "Merged",
    "ModelFacts",
    "NewToken",
    "Onto",
    "Purpose",
    "Quantised",
    "RowsBefore",
    "SaveReport",
    "SavedFile",
    "add_lora",
    "add_tokens",
    "choose_device",
    "context_length",
    "describe",
    "enable_gradient_checkpointing",
    "load_model",
    "load_tokenizer",
    "look_at",
    "lora_target_findings",
    "make_room",
    "merge_adapter",
    "num_ids",
    "require_room",
    "require_weights",
    "round_as_saved",
    "rows_now",
    "rows_report",
    "save_model",
    "start_full_rows",
    "trainable_share",
]
