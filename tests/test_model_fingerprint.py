"""An adapter opens on the base it was trained on, and on nothing that only looks like it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_models import edit_json, tiny_tokenizer, write_model
from truetune.contract.contract import PromptContract
from truetune.errors import ModelError
from truetune.model import fingerprint as module
from truetune.model.fingerprint import FINGERPRINT, read_fingerprint
from truetune.model.load import load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.save import save_model


def train_on(base: Path, folder: Path, **settings: Any) -> Path:
    loaded = load_model(base, purpose="lora", device="cpu", **settings)
    loaded = add_lora(loaded, LoraSettings(r=2), seed=0)
    save_model(loaded, PromptContract.load(loaded.tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bound")
    write_model(folder / "base", tie_word_embeddings=True)
    train_on(folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture
def adapter(made: Path, base: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def refused(adapter: Path, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(adapter, device="cpu", purpose="inference", **settings)
    return caught.value


def opens(adapter: Path, **settings: Any) -> None:
    load_model(adapter, device="cpu", purpose="inference", **settings)


def resave(base: Path, **options: Any) -> None:
    """The same weights, written anew by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, **options)


def change_weight(base: Path, name: str, byte: int) -> None:
    """Flip one bit of one weight in the file."""
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (start + byte if byte >= 0 else end + byte)] ^= 1
    path.write_bytes(data)


def test_the_base_itself(adapter: Path) -> None:
    opens(adapter)


def test_a_renamed_folder_is_the_same_base(adapter: Path, base: Path) -> None:
    moved = base.rename(base.with_name("elsewhere"))
    assert refused(adapter).code == "adapter-no-base"
    opens(adapter, base=moved)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(moved))
    opens(adapter)


def test_resharding_is_no_other_base(adapter: Path, base: Path) -> None:
    resave(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    opens(adapter)


def test_a_tied_head_stored_twice_is_no_other_base(adapter: Path, base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    opens(adapter)
    # A head of its own is one.
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight: absent then" in refused(adapter).why
    # It is counted on both sides: never more weights differ than there are.
    others = {name: tensor * 1.01 + 1e-3 for name, tensor in tensors.items()}
    save_file(others, base / "model.safetensors", metadata={"format": "pt"})
    assert f"{len(others)} of {len(others)} weights differ" in refused(adapter).what


@pytest.mark.parametrize("byte", [0, -1])
def test_one_changed_bit_at_the_ends_of_a_weight(adapter: Path, base: Path, byte: int) -> None:
    change_weight(base, "model.layers.1.mlp.up_proj.weight", byte)
    error = refused(adapter)
    assert (error.code, error.exit_code) == ("adapter-wrong-base", 2)
    assert "1 of 20 weights differ" in error.what
    then, now = error.why.splitlines()[2].split(" then, ")
    assert then.startswith("model.layers.1.mlp.up_proj.weight: float32 [48, 32] ")
    assert now.startswith("float32 [48, 32] ")
    assert then.split()[-1] != now.split()[3]
    assert str(base) in error.why


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "gemma"])
def test_a_sibling_of_every_family(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", kind, tie_word_embeddings=True)
    adapter = train_on(base, tmp_path / "adapter")
    opens(adapter)
    tensors = {n: t * 1.01 + 1e-3 for n, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    error = refused(adapter)
    assert error.code == "adapter-wrong-base"
    assert f"{len(tensors)} of {len(tensors)} weights differ" in error.what
    assert error.fix.endswith("base_model_name_or_path in adapter_config.json")


def test_a_sibling_of_equal_shapes(adapter: Path, base: Path) -> None:
    """Every weight a little further on, as after fine-tuning in bfloat16's resolution."""
    from safetensors.torch import load_file, save_file

    tensors = {n: t * 1.01 for n, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "20 of 20 weights differ" in refused(adapter).what


def test_the_same_weights_in_another_type(adapter: Path, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    error = refused(adapter)
    assert "float32 [264, 32]" in error.why
    assert "bfloat16 [264, 32]" in error.why


def test_another_tokenizer_beside_the_adapter(adapter: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    error = refused(adapter)
    assert error.code == "adapter-wrong-tokenizer"
    assert "has 262 ids, but the adapter was trained with 261" in error.what


def test_an_adapter_whose_tokenizer_was_removed_opens_on_an_equal_one(adapter: Path) -> None:
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    opens(adapter)


def test_a_config_that_computes_something_else(adapter: Path, base: Path) -> None:
    edit_json(base / "config.json", rms_norm_eps=0.1)
    error = refused(adapter)
    assert error.code == "adapter-wrong-config"
    assert error.why == "rms_norm_eps: 1e-06 then, 0.1 now"


def test_a_config_that_only_generates_otherwise(adapter: Path, base: Path) -> None:
    edit_json(base / "config.json", eos_token_id=3, use_cache=False, transformers_version="9")
    opens(adapter)


def from_hub(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local cache with one model in two revisions of equal weights."""
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision=None, **_: str(tmp_path / "cache" / (revision or "a" * 40)),
    )
    for revision in ("a" * 40, "b" * 40):
        shutil.copytree(base, tmp_path / "cache" / revision)


def test_a_changed_revision(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_hub(tmp_path, base, monkeypatch)
    loaded = load_model("someone/tiny", purpose="lora", device="cpu")
    assert loaded.base_revision == "a" * 40
    loaded = add_lora(loaded, LoraSettings(r=2), seed=0)
    adapter = tmp_path / "hub-adapter"
    save_model(loaded, PromptContract.load(loaded.tokenizer), adapter)
    opens(adapter)
    edit_json(adapter / "adapter_config.json", revision="b" * 40)
    error = refused(adapter)
    assert error.code == "adapter-wrong-revision"
    assert "b" * 40 in error.what
    assert "a" * 40 in error.what
    # A copy of the model in a folder has no revision: its weights decide.
    opens(adapter, base=base)


def test_full_hashes_on_request_see_what_samples_do_not(base: Path, tmp_path: Path) -> None:
    sampled = train_on(base, tmp_path / "sampled")
    full = train_on(base, tmp_path / "full", full_fingerprint=True)
    found = read_fingerprint(full)
    assert found is not None
    assert found.is_full
    # Between two samples of a table of 33,792 bytes.
    change_weight(base, "model.embed_tokens.weight", 64 + 100)
    opens(sampled)
    assert "1 of 20" in refused(full, full_fingerprint=True).what


def test_only_sampled_bytes_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(file: Any, facts: Any) -> str:
        class Counting:
            def seek(self, place: int) -> None:
                file.seek(place)

            def read(self, size: int) -> bytes:
                read.append(size)
                return bytes(file.read(size))

        return str(sample(Counting(), facts))

    sample = module._sample
    monkeypatch.setattr(module, "_sample", counted)
    load_model(base, purpose="lora", device="cpu")
    assert len(read) > 20
    assert max(read) <= 2048
    assert sum(read) <= 20 * 2048 < (base / "model.safetensors").stat().st_size


def test_adapters_of_other_tools_open_as_before(adapter: Path, base: Path) -> None:
    (adapter / FINGERPRINT).unlink()
    change_weight(base, "model.norm.weight", 0)
    opens(adapter)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"tensors": None}, {"tensors": {"x": [1]}}, {"quantised": "3bit"}],
)
def test_a_damaged_fingerprint(adapter: Path, change: dict[str, Any]) -> None:
    value = json.loads((adapter / FINGERPRINT).read_text())
    (adapter / FINGERPRINT).write_text(json.dumps(value | change))
    assert refused(adapter).code == "adapter-fingerprint-unreadable"
