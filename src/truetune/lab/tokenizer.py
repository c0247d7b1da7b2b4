"""The lab's tokenizer: a byte-level BPE of 2,032 entries, trained on the corpus.

input   texts
does    learns merges under Qwen2's published pre-tokenizer (each digit its own token), with the
        special tokens first and all 256 bytes in the alphabet: any Unicode text round-trips
output  a folder that `AutoTokenizer.from_pretrained` opens, with the same ids as the raw file

No normaliser and no post-processor: nothing is added or rewritten behind the user's back. No chat
template either: the shipped model is a base model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

VOCAB_ENTRIES = 2032
"""Entries of the tokenizer. The model's head has 2,048 rows: 16 are spare, for new tokens."""

MODEL_MAX_LENGTH = 1024

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
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
"""In id order, from 0."""

_VISIBLE = ("<think>", "</think>")
"""Atomic like the others but kept by `skip_special_tokens=True`, as Qwen3 has it: servers split the
reasoning off by these strings."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], out: str | Path) -> Path:
    """Train on the texts and write the folder; returns it."""
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

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads(tokenizer.to_str())
    for entry in spec["added_tokens"]:
        entry["special"] = entry["content"] not in _VISIBLE
    _write_json(folder / "tokenizer.json", spec)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": PAD,
            "bos_token": None,
            "unk_token": None,
            "model_max_length": MODEL_MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    )
    return folder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
