"""GGUF files: llama.cpp makes of them what transformers makes of the model, or there is none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from test_export import trained
from tiny_models import TEMPLATE, edit_json, write_model
from tiny_runs import command
from truetune.errors import CheckFailed, UsageError
from truetune.model.lora import LoraSettings
from truetune.run.export_gguf import export_adapter, export_gguf

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")),
    reason="the gguf extra is missing",
)
SHARED = Path(__file__).parents[2] / "shared" / "models"
# What each architecture does differently, switched on; rows of 32 numbers fill a block.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": 48,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 7.0,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 48,
        "query_pre_attn_scalar": 8,
    },
    "phi3": {"pad_token_id": 0},
}


def facts(folder: Path) -> Any:
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_what_transformers_computes(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "model", kind, **KINDS[kind])
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f32")
    assert made.path == tmp_path / "out" / "model-f32.gguf"
    assert made.proof.apart is not None
    # llama.cpp looks up GELU in a table of half-precision numbers.
    assert made.proof.apart.logprob < (2e-3 if kind.startswith("gemma") else 1e-4)
    assert made.proof.apart.greedy == 1
    assert facts(tmp_path / "out")["holds"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model-f32.gguf", "proof.json"]


def test_an_adapter_is_merged_quantised_and_told(tmp_path: Path) -> None:
    trained(tmp_path, "llama")
    told = command(
        "export", tmp_path / "adapter", "--to", "gguf", "--quant", "q8_0", "-o", tmp_path / "out"
    )
    assert told.code == 0, told.err
    assert "verified with llama.cpp" in told.out
    assert "llama-server -m" in told.out
    found = facts(tmp_path / "out")
    assert found["proved_in_float32"]
    assert found["predictions"]["relative"] < 0.1


@pytest.mark.parametrize("quant", ["f16", "bf16", "q6_k", "q5_k_m", "q4_k_m", "q4_0"])
def test_every_kind_of_type_is_read_back(tmp_path: Path, quant: str) -> None:
    import gguf
    import numpy as np

    write_model(tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64)
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant=quant)
    tensors = {t.name: t for t in gguf.GGUFReader(made.path).tensors}
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, own in (
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        held = tensors[name]
        back = gguf.quants.dequantize(held.data, held.tensor_type)
        wanted = weights[own].numpy()
        error = np.abs(back - wanted).mean() / np.abs(wanted).mean()
        assert error < {"f16": 1e-3, "bf16": 4e-3, "q6_k": 0.02}.get(quant, 0.1), name


def test_a_file_that_differs_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.exporting import gguf_shape

    write_model(tmp_path / "model")
    monkeypatch.setattr(gguf_shape, "_interleaved", lambda value, heads: value)
    with pytest.raises(CheckFailed) as caught:
        export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f32")
    assert [f.code for f in caught.value.findings] == ["gguf-numbers-differ"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_the_pre_tokenizer_is_chosen_by_ids(tmp_path: Path) -> None:
    """A tokenizer that no table of hashes knows."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from truetune.servers.scripts import TEXTS

    for pattern, names in (
        (r"\p{N}{1,3}", {"llama-bpe", "smaug-bpe"}),
        (r"\p{N}", {"qwen2"}),
    ):
        backend = Tokenizer(models.BPE())
        regex = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + pattern + r"|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
            show_progress=False,
        )
        backend.train_from_iterator([*TEXTS] * 3, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
        tokenizer.chat_template = TEMPLATE
        folder = tmp_path / sorted(names)[0]
        write_model(
            folder, tokenizer=tokenizer, vocab_size=len(tokenizer), generation={"eos_token_id": 1}
        )
        made = export_gguf(str(folder), tmp_path / f"out-{folder.name}", quant="f32")
        assert made.pre_tokenizer in names


@pytest.mark.parametrize("name", ["llama-3.2-1b-instruct", "phi-3.5-mini-instruct", "qwen3-0.6b"])
def test_published_tokenizers_are_proved(tmp_path: Path, name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("published tokenizers are not here (../shared)")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    rows = json.loads((SHARED / name / "config.json").read_text())["vocab_size"]
    ends = json.loads((SHARED / name / "generation_config.json").read_text())["eos_token_id"]
    write_model(
        tmp_path / "model", tokenizer=tokenizer, vocab_size=rows, tie_word_embeddings=True,
        generation={"eos_token_id": ends}, hidden_size=32,
    )  # fmt: skip
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f32")
    assert made.proof.holds


def test_what_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    out = tmp_path / "out"
    for words, code in (
        (("--to", "gguf", "--quant", "q9"), "gguf-quant"),
        (("--to", "ggfu"), "export-what"),
        (("--to", "gguf", "--merge"), "export-what"),
        (("--to", "gguf", "--no-verify"), "export-what"),
        (("--to", "gguf", "--dtype", "float16"), "export-what"),
    ):
        told = command("export", tmp_path / "model", "-o", out, *words)
        assert told.code == 2
        assert f"[{code}]" in told.err
    told = command("export", tmp_path / "model", "-o", tmp_path / "x.gguf", "--to", "gguf")
    assert "[export-folder]" in told.err
    write_model(tmp_path / "other", "granite")
    with pytest.raises(UsageError, match="granite"):
        export_gguf(str(tmp_path / "other"), out)
    assert not out.exists()


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(weights, path, metadata={"format": "pt"})
    told = command("export", tmp_path / "model", "-o", tmp_path / "out", "--to", "gguf")
    assert told.code == 1
    assert "[gguf-overflow]" in told.err
    assert not (tmp_path / "out").exists()


def test_rope_scalings_reach_llama_cpp(tmp_path: Path) -> None:
    for name, kind, rope in (
        ("llama3", "llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        ("linear", "qwen2", {"rope_type": "linear", "factor": 4.0}),
        ("yarn", "qwen3", {"rope_type": "yarn", "factor": 4.0,
                           "original_max_position_embeddings": 64}),
    ):  # fmt: skip
        folder = tmp_path / name
        write_model(folder, kind, rope_parameters={"rope_theta": 1000.0, **rope})
        made = export_gguf(str(folder), tmp_path / f"{name}-out", quant="f32")
        assert made.proof.apart is not None
        assert made.proof.apart.relative < 5e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_an_adapter_is_added_by_llama_cpp(tmp_path: Path, kind: str) -> None:
    """Query and key of llama are turned, phi3's are one matrix; peft is what it is held to."""
    settings = LoraSettings(r=4, alpha=12, dropout=0.0, rslora=kind == "qwen3")
    changes = {"pad_token_id": 0} if kind == "phi3" else {}
    trained(tmp_path, kind, texts=[], settings=settings, **changes)
    made = export_adapter(str(tmp_path / "adapter"), tmp_path / "out", quant="f32")
    assert made.proof.apart is not None
    assert made.proof.apart.relative < 5e-5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter-f32.gguf",
        "chat_template.jinja",
        "proof.json",
    ]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_an_adapter_that_differs_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truetune.exporting import gguf_adapter

    trained(tmp_path, "llama", texts=[])
    monkeypatch.setattr(gguf_adapter, "as_rotated", lambda name, value, *_: value)
    with pytest.raises(CheckFailed, match="does not match the adapter"):
        export_adapter(str(tmp_path / "adapter"), tmp_path / "out", quant="f32")
    assert not (tmp_path / "out").exists()


def test_adapters_that_llama_cpp_cannot_add_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "rows")
    trained(tmp_path / "dora", texts=[], settings=LoraSettings(r=2, dropout=0.0, dora=True))
    for folder, words, said in (
        ("rows/adapter", (), "embeddings of new tokens"),
        ("dora/adapter", (), "magnitudes"),
        ("dora/adapter", ("--quant", "q8_0"), "cannot be written as q8_0"),
        ("rows/base", (), "no adapter"),
    ):
        told = command(
            "export", tmp_path / folder, "--to", "gguf", "--adapter", "-o", tmp_path / "out", *words
        )
        assert told.code == 2
        assert said in told.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_says_where_the_base_does_not_stop(tmp_path: Path) -> None:
    """The stop tokens are those of the base's file: the adapter's own generation_config is read by
    nobody."""
    trained(tmp_path, "llama", texts=[])
    for name, ends, codes in (("same", 257, []), ("other", 3, ["gguf-adapter-stops"])):
        edit_json(tmp_path / "base" / "generation_config.json", eos_token_id=ends)
        made = export_adapter(str(tmp_path / "adapter"), tmp_path / name, quant="f16")
        assert [f.code for f in made.findings if f.level == "warning"] == codes
    told = command(
        "export", tmp_path / "adapter", "--to", "gguf", "--adapter", "-o", tmp_path / "told"
    )
    assert "--lora" in told.out
    assert "gguf-adapter-stops" in told.out + told.err
