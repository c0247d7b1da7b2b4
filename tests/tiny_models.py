"""Models of a few thousand weights with a byte-level tokenizer, made in the test session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
NUM_TOKENS = 256 + len(SPECIAL)


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """256 bytes and five special tokens; no merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(kind: str = "llama", **changes: Any) -> Any:
    """A 2-layer config; vocab_size leaves 3 spare rows."""
    from transformers import AutoConfig

    from truetune.model.architecture import has_grouped_products

    settings: dict[str, Any] = {
        "vocab_size": NUM_TOKENS + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **(settings | changes))
    if not has_grouped_products():
        config._experts_implementation = "eager"
    return config


def tiny_model(kind: str = "llama", **changes: Any) -> Any:
    """Random weights, large enough that greedy choices are clear."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6)
    return model


def write_model(
    folder: Path,
    kind: str = "llama",
    *,
    dtype: str = "float32",
    tokenizer: Any = None,
    generation: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A complete model folder."""
    import torch

    model = tiny_model(kind, **changes)
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    settings = {"eos_token_id": 257} if generation is None else generation
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
