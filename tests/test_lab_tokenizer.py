"""The lab's tokenizer: fixed ids, every byte, the same ids through AutoTokenizer."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.lab import base_path
from truetune.lab.building.prose import documents
from truetune.lab.building.tokenizer import SPECIAL_TOKENS, VOCAB_ENTRIES, train_tokenizer
from truetune.lab.world import World


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def raw():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(base_path() / "tokenizer.json"))


def test_entries_and_reserved_ids(tokenizer):
    assert len(tokenizer) == VOCAB_ENTRIES == 2032
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(16))
    assert SPECIAL_TOKENS[:8] == (
        "<|endoftext|>",
        "<|pad|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<|system|>",
        "<think>",
        "</think>",
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer.chat_template is None
    assert tokenizer.model_max_length == 1024


_TEXT = st.text() | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "a", "12", "é", "e\u0301", "🙂", "The river"])
).map("".join)


@settings(max_examples=200)
@given(text=_TEXT)
def test_any_text_round_trips_with_the_ids_of_the_raw_file(tokenizer, raw, text):
    ids = tokenizer.encode(text)
    assert ids == raw.encode(text).ids
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("2026")) == 4


def test_think_markers_survive_skipping_special_tokens(tokenizer):
    ids = tokenizer.encode("<think>a</think>b<|end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>b"


def test_training_is_deterministic_and_made_the_shipped_file(tmp_path):
    from truetune.lab.building.pretrain import TOKENIZER_DOCUMENTS

    texts = (document.text for document in documents(World.generate(7), "train", plain=True))
    train_tokenizer(islice(texts, TOKENIZER_DOCUMENTS), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (base_path() / name).read_text()


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass more documents"):
        train_tokenizer(["a short text"], tmp_path / "never")
    assert not (tmp_path / "never").exists()
