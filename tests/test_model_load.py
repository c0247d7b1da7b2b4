"""Loading: what is given back, and every way a model folder can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import edit_json, tiny_model, tiny_tokenizer, write_model
from truetune.errors import ModelError, UsageError
from truetune.model import architecture
from truetune.model.load import load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.placement import choose_device, place
from truetune.model.save import save_model
from truetune.model.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("load") / "llama", dtype="bfloat16")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from truetune.contract.contract import PromptContract

    loaded = add_lora(load_model(llama, purpose="lora"), LoraSettings(r=2), seed=1)
    folder = tmp_path_factory.mktemp("load") / "adapter"
    save_model(loaded, PromptContract.load(loaded.tokenizer), folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hub cache and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_import_is_light() -> None:
    code = (
        "import sys, truetune.model, truetune.generate;"
        "heavy = {'torch', 'transformers', 'peft', 'tokenizers'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_full_training_has_float32_weights(llama: Path) -> None:
    import torch

    loaded = load_model(llama, device="cpu")
    assert loaded.base_dtype == "bfloat16"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert loaded.compute_dtype is None
    assert not loaded.is_adapter
    assert loaded.base == str(llama.resolve())
    assert loaded.findings == ()
    assert [c.name for c in loaded.choices] == ["device", "dtype", "parameter dtype"]
    assert all(c.reason for c in loaded.choices)
    assert loaded.tokenizer.encode("<|user|>a") == [258, loaded.tokenizer.encode("a")[0]]


def test_lora_base_is_frozen_in_the_compute_type(llama: Path) -> None:
    import torch

    loaded = load_model(llama, purpose="lora", dtype="bf16", device="cpu")
    assert loaded.compute_dtype == torch.bfloat16
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    # What `model.to(bfloat16)` would spoil.
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_inference_is_float32_on_cpu_and_frozen(llama: Path) -> None:
    import torch

    loaded = load_model(llama, purpose="inference", device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.compute_dtype is None
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training


def test_weights_are_those_of_the_file(llama: Path) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(llama / "model.safetensors")
    state = load_model(llama).model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name].float()) for name in stored)


@pytest.mark.parametrize(
    ("purpose", "base", "has_bf16", "parameters", "compute"),
    [
        ("full", "bfloat16", True, "float32", "bfloat16"),
        ("full", "bfloat16", False, "float32", None),
        ("lora", "float32", True, "bfloat16", "bfloat16"),
        ("lora", "bfloat16", False, "float32", None),
        ("inference", "bfloat16", True, "bfloat16", None),
        ("inference", "bfloat16", False, "float32", None),
        ("inference", "float16", True, "float16", None),
        ("inference", "float32", True, "float32", None),
        ("inference", "float8_e4m3fn", True, "bfloat16", None),
    ],
)
def test_placement_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    purpose: Any,
    base: str,
    has_bf16: bool,
    parameters: str,
    compute: str | None,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    placed = place("auto", "auto", purpose, base)
    assert str(placed.device) == "cuda:0"
    assert placed.parameters == getattr(torch, parameters)
    assert placed.compute == (getattr(torch, compute) if compute else None)
    assert "Test GPU" in placed.choices[0].reason


def test_experts_are_computed_one_by_one_where_torch_has_no_product_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    source = write_model(tmp_path / "m", "qwen3_moe", **experts)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        at_once = load_model(source, purpose="inference", device="cpu").model(ids).logits
    monkeypatch.setattr(architecture, "has_grouped_products", lambda: False)
    for name in ("grouped_mm", "_grouped_mm"):
        for module in (torch.nn.functional, torch):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _not_implemented)
    one_by_one = load_model(source, purpose="inference", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(one_by_one(ids).logits, at_once)


def _not_implemented(*_: Any, **__: Any) -> None:
    raise NotImplementedError("Could not run with arguments from the 'CPU' backend")


def test_unknown_device_and_dtype_are_usage_errors(llama: Path) -> None:
    with pytest.raises(UsageError, match="is not available"):
        choose_device("cuda:99")
    with pytest.raises(UsageError, match="unknown device"):
        choose_device("gpu")
    with pytest.raises(UsageError, match="unknown dtype"):
        load_model(llama, dtype="int3")
    with pytest.raises(UsageError, match="float16"):
        load_model(llama, dtype="fp16", purpose="lora")


# Each takes a complete model folder and breaks it.
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_model_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def invalid_config(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size="wide")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model":')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


def misnamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def cut_in_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:50])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope" + b"\0" * 64)


def shards_missing(folder: Path) -> None:
    no_weights(folder)
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def encoder(folder: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))


def classifier(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])


def vision(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def audio(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')


def multimodal(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gemma3"}')


def remote_code(folder: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_json(folder / "config.json", model_type="own_model", auto_map=auto_map)


def unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama99")


def wrong_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=64)


def quantised(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    save_file(load_file(path) | scale, path, metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (no_config, "model-no-config", "no config.json"),
        (broken_config, "model-config-unreadable", "config.json"),
        (list_config, "model-config-unreadable", "not contain a JSON object"),
        (no_model_type, "model-unknown-type", "no model_type"),
        (invalid_config, "model-config-unreadable", "not a valid llama config"),
        (no_tokenizer, "model-no-tokenizer", "copy tokenizer.json"),
        (broken_tokenizer, "model-tokenizer-unreadable", "cannot be opened"),
        (no_weights, "model-no-weights", "model.safetensors is missing"),
        (pickled, "model-pickle", "can run arbitrary code"),
        (gguf, "model-no-weights", "GGUF"),
        (misnamed, "model-no-weights", "must be called model.safetensors"),
        (truncated, "model-weights-damaged", "describes"),
        (cut_in_header, "model-weights-damaged", "header is cut off"),
        (empty_weights, "model-weights-damaged", "header is cut off"),
        (garbage_header, "model-weights-damaged", "header is not readable"),
        (shards_missing, "model-shards-missing", "2 of 2 weight files are missing"),
        (empty_index, "model-config-unreadable", "lists no weights"),
        (encoder_decoder, "model-not-causal", "encoder-decoder"),
        (encoder, "model-not-causal", "encoder"),
        (classifier, "model-not-causal", "LlamaForSequenceClassification"),
        (vision, "model-not-causal", "vit is not a causal"),
        (audio, "model-not-causal", "wav2vec2 is not a causal"),
        (multimodal, "model-not-causal", "images or sound"),
        (remote_code, "model-remote-code", "does not run code that comes with weights"),
        (unknown_type, "model-unknown-type", "llama99"),
        (wrong_shape, "model-shape-mismatch", "config.json says [32, 64]"),
        (quantised, "model-quantised", "cannot be trained in full"),
    ],
)
def test_a_broken_folder_is_told_before_weights_are_read(
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    code: str,
    says: str,
) -> None:
    from transformers import AutoModelForCausalLM

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    damage(copy)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(ModelError) as caught:
        load_model(copy)
    error = caught.value
    assert (error.code, error.exit_code) == (code, 2)
    assert says in str(error)
    assert error.where
    assert error.fix


def test_a_single_missing_shard_is_named(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(folder)
    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name) as caught:
        load_model(folder)
    assert caught.value.code == "model-shards-missing"


def test_weights_that_would_be_random_are_an_error(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(copy)
    assert caught.value.code == "model-weights-missing"


def test_a_missing_head_is_an_error_only_where_it_is_untied(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="tie_word_embeddings") as caught:
        load_model(copy)
    assert caught.value.code == "model-weights-missing"
    edit_json(copy / "config.json", tie_word_embeddings=True)
    model = load_model(copy).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_the_model_has_no_place_for_are_told(copy: Path) -> None:
    edit_json(copy / "config.json", num_hidden_layers=1)
    (finding,) = load_model(copy).findings
    assert (finding.code, finding.level, finding.count) == ("weights-unused", "warning", 9)
    assert "fewer layers" in finding.why


def test_ids_beyond_the_model_are_told(copy: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(5)])
    tokenizer.save_pretrained(copy)
    (finding,) = load_model(copy).findings
    assert (finding.code, finding.count) == ("tokenizer-beyond-model", 2)


def test_a_revision_of_a_folder_is_told(llama: Path) -> None:
    (finding,) = load_model(llama, revision="main").findings
    assert finding.code == "revision-unused"


def test_paths_that_lead_nowhere(llama: Path, offline: Path) -> None:
    with pytest.raises(ModelError, match=rf"did you mean {llama}\?") as caught:
        load_model(llama.with_name("lama"))
    assert caught.value.code == "model-not-found"
    with pytest.raises(ModelError, match="check the path"):
        load_model("./no/such/folder")
    with pytest.raises(ModelError, match=f"pass the folder: {llama}") as caught:
        load_model(llama / "model.safetensors")
    assert caught.value.code == "model-is-file"
    with pytest.raises(ModelError, match="offline") as caught:
        load_model("nobody/nothing")
    assert caught.value.code == "model-offline"
    assert caught.value.exit_code == 2
    with pytest.raises(ModelError, match=r"did you mean embedded\?"):
        load_model("embeded")


def test_a_name_without_slash_may_be_a_misspelt_folder(
    llama: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    with pytest.raises(ModelError, match=r"did you mean llama\?"):
        load_tokenizer("llamma")


def test_a_run_folder_leads_to_its_model(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "run" / "model")
    with pytest.raises(ModelError, match="run/model"):
        load_model(tmp_path / "run")


def test_a_cached_hub_model_is_loaded_offline(llama: Path, offline: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline / "models--someone--tiny"
    shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = load_model("someone/tiny", revision="main")
    assert (loaded.source, loaded.revision) == ("someone/tiny", commit)
    assert (loaded.base, loaded.base_revision) == ("someone/tiny", commit)
    assert loaded.findings == ()
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="local cache") as caught:
        load_model("someone/tiny")
    assert caught.value.code == "model-no-weights"


def test_tokenizer_alone(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 261
    assert "assistant" in tokenizer.chat_template


def test_adapter_loads_on_its_base(llama: Path, adapter: Path) -> None:
    import torch

    for purpose in ("full", "lora"):
        loaded = load_model(adapter, purpose=purpose, dtype="bf16", device="cpu")
        assert loaded.is_adapter
        assert (loaded.source, loaded.base) == (str(adapter), str(llama.resolve()))
        assert loaded.base_dtype == "bfloat16"
        trained = [p for p in loaded.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        assert all("lora_" in n for n, p in loaded.model.named_parameters() if p.requires_grad)
        frozen = {p.dtype for p in loaded.model.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16}
    frozen_model = load_model(adapter, purpose="inference").model
    assert not any(p.requires_grad for p in frozen_model.parameters())


def test_adapter_brings_its_own_tokenizer_or_takes_the_base_s(
    adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / "chat_template.jinja").write_text("own {{ messages }}")
    assert load_model(folder).tokenizer.chat_template == "own {{ messages }}"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert "assistant" in load_model(folder).tokenizer.chat_template


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"base_model_name_or_path": None}, "adapter-no-base", "does not say"),
        ({"base_model_name_or_path": "/gone/model"}, "adapter-no-base", "not found: /gone/model"),
        ({"base_model_name_or_path": "some/one"}, "adapter-no-base", "offline"),
        ({"peft_type": "PROMPT_TUNING"}, "adapter-type", "PROMPT_TUNING"),
    ],
)
def test_adapter_configs_that_lead_nowhere(
    adapter: Path, tmp_path: Path, offline: Path, change: dict[str, Any], code: str, says: str
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", **change)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert says in str(caught.value)
    assert "adapter_config.json" in caught.value.where


def test_adapter_on_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match="itself an adapter"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"vocab_size": 200}],
    ids=lambda change: "-".join(change),
)
def test_adapter_on_another_base_is_refused(
    adapter: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    base = write_model(tmp_path / "other", **changes)
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert caught.value.code == "adapter-wrong-base"


def test_adapter_with_pickled_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickles") as caught:
        load_model(folder)
    assert caught.value.code == "model-pickle"


def test_adapter_with_whole_tables_is_not_trained_on(adapter: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(264, 32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(folder, purpose="lora")
    assert caught.value.code == "adapter-tables"
    model = load_model(folder, purpose="inference").model
    assert not model.get_input_embeddings().weight.any()


def test_loading_leaves_nothing_on_the_screen(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(copy / "config.json", num_hidden_layers=1)
    load_model(copy)
    assert capfd.readouterr() == ("", "")
