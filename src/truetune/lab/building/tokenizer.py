"""The lab's tokenizer: texts -> a folder that `AutoTokenizer.from_pretrained` opens.

A byte-level BPE under Qwen2's published pre-tokenizer, with all 256 bytes in the alphabet: any
Unicode text round-trips. Nothing is added or rewritten: no normaliser, no post-processor, and no
chat template, for the shipped model is a base model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from truetune.run_dir import write_json

# The model's head has 2,048 rows: 16 are spare, for new tokens.
VOCAB_ENTRIES = 2032

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

# In id order, from 0.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    PAD,
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|system|>",
    "<think>",
    "</think>",
    *(f"<|reserved_{i}|>" for i in range(8)),
)

# Atomic like the others but kept by `skip_special_tokens=True`, as Qwen3 has it: servers split the
# reasoning off by these strings.
_VISIBLE = ("<think>", "</think>")

# Each digit is a token.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train on the texts and write the folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_ENTRIES,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_ENTRIES:
        raise ValueError(
            f"the texts gave {tokenizer.get_vocab_size()} tokenizer entries, not {VOCAB_ENTRIES}: "
            "too few distinct words; pass more documents"
        )
    spec = json.loads(tokenizer.to_str())
    for entry in spec["added_tokens"]:
        entry["special"] = entry["content"] not in _VISIBLE
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", spec)
    write_json(folder / "tokenizer_config.json", settings)
