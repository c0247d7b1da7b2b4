"""One model a family, two layers each, with what the family does differently switched on."""

from __future__ import annotations

from typing import Any

from tiny_models import tiny_model

WINDOW = 6

# Families that pack.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
}

# Those that every promise of exactness is held to.
SIX = ("llama", "qwen2", "qwen3", "gemma", "phi3", "mistral")

# Further ones that pack: scaled logits, attention sinks, learned positions.
MORE: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.1},
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4},
}

# Families whose rows must not be packed, and what the probe sees.
APART: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "does not accept a packed sequence"),
    "mamba2": (
        {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
        "packed and unpacked",
    ),
    "llama4_text": (
        {"attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "a layer's mask does not match",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "packed and unpacked"),
}


def settings_of(kind: str) -> dict[str, Any]:
    return FAMILIES.get(kind) or MORE.get(kind) or (APART[kind][0] if kind in APART else {})


def family(kind: str) -> Any:
    return tiny_model(kind, **settings_of(kind))
