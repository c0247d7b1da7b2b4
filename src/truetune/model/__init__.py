"""The only place that loads or saves weights: model and tokenizer bound together."""

from truetune.model.architecture import context_length
from truetune.model.inspect import ModelFacts, describe, require_weights
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import (
    LoraSettings,
    add_lora,
    enable_gradient_checkpointing,
    trainable_share,
)
from truetune.model.placement import Choice, Purpose
from truetune.model.save import SavedFile, SaveReport, save_model
from truetune.model.tokenizer import load_tokenizer

__all__ = [
    "Choice",
    "LoadedModel",
    "LoraSettings",
    "ModelFacts",
    "Purpose",
    "SaveReport",
    "SavedFile",
    "add_lora",
    "context_length",
    "describe",
    "enable_gradient_checkpointing",
    "load_model",
    "load_tokenizer",
    "require_weights",
    "save_model",
    "trainable_share",
]
