"""Facts of a model, without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_models import edit_json, tiny_model, tiny_tokenizer, write_model
from truetune.errors import ModelError
from truetune.model.architecture import require_ids
from truetune.model.inspect import describe

SHARED = Path(__file__).parents[2] / "shared" / "models"


def test_facts_of_a_tiny_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "qwen2", dtype="bfloat16")
    facts = describe(folder)
    assert facts.architecture == "Qwen2ForCausalLM"
    assert facts.num_parameters == sum(p.numel() for p in tiny_model("qwen2").parameters())
    assert (facts.num_layers, facts.hidden_size, facts.context_length) == (2, 32, 256)
    # The class of this family brings <|endoftext|> along.
    assert (facts.tokenizer_length, facts.head_rows, facts.spare_rows) == (262, 264, 2)
    assert not facts.tied
    assert facts.dtype == "bfloat16"
    assert facts.has_chat_template
    assert (facts.config_eos_ids, facts.generation_eos_ids) == ((257,), (257,))
    assert (facts.tokenizer_eos_id, facts.pad_id, facts.bos_id) == (257, 256, None)
    assert facts.lora_targets == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2
    )
    assert facts.weights == "safetensors"
    assert facts.num_weight_bytes == (folder / "model.safetensors").stat().st_size
    json.dumps(facts.as_dict())


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    facts = describe(write_model(tmp_path / "m", tie_word_embeddings=True))
    assert facts.tied
    untied = describe(write_model(tmp_path / "n"))
    assert untied.num_parameters - facts.num_parameters == 264 * 32


def test_weights_of_other_formats_and_none(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tokenizer=tiny_tokenizer(template=None))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert describe(folder).weights == "pickle"
    (folder / "pytorch_model.bin").rename(folder / "m.gguf")
    assert describe(folder).weights == "gguf"
    (folder / "m.gguf").unlink()
    facts = describe(folder)
    assert (facts.weights, facts.num_weight_bytes, facts.dtype) == (None, 0, "float32")
    assert not facts.has_chat_template


def test_stop_ids_that_disagree_are_both_told(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", generation={"eos_token_id": [256, 257]})
    edit_json(folder / "config.json", eos_token_id=258)
    facts = describe(folder)
    assert (facts.config_eos_ids, facts.generation_eos_ids) == ((258,), (256, 257))
    (folder / "generation_config.json").unlink()
    assert describe(folder).generation_eos_ids == ()


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        describe(folder)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers and configs are not here")
def test_facts_of_a_published_model_without_its_weights() -> None:
    facts = describe(SHARED / "qwen2.5-0.5b-instruct")
    assert facts.num_parameters == 494_032_768
    assert (facts.num_layers, facts.context_length, facts.tied) == (24, 32_768, True)
    assert (facts.tokenizer_length, facts.head_rows, facts.spare_rows) == (151_665, 151_936, 271)
    assert facts.generation_eos_ids == (151_645, 151_643)
    assert (facts.dtype, facts.weights) == ("bfloat16", None)
    assert sum(facts.lora_targets.values()) == 7 * 24


def test_a_list_of_stop_tokens_has_a_measure() -> None:
    assert require_ids(list(range(1024)), "eos_token_id", "config.json") == tuple(range(1024))
    with pytest.raises(ModelError, match="lists 1,000,000 token ids") as caught:
        require_ids([1] * 10**6, "eos_token_id", "config.json")
    assert caught.value.code == "model-config-hostile"
