"""Saving: complete, equal to what was in memory, or nothing at all."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import edit_json, tiny_config, tiny_tokenizer, write_model
from truetune.contract.contract import PromptContract
from truetune.errors import OutputExists, SaveError, UsageError
from truetune.generate import Sampling, replies
from truetune.model import save
from truetune.model.generation_config import served_generation_config
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.save import save_model
from truetune.model.tokenizer import load_tokenizer
from truetune.verification.record import TEXTS, behaviour_of

SHARED = Path(__file__).parents[2] / "shared" / "models"
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20}
QUESTION = [{"role": "user", "content": "hi"}]


def contract_of(loaded: LoadedModel) -> PromptContract:
    return PromptContract.load(loaded.tokenizer)


def logits(model: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def disturb(model: Any) -> None:
    """What training does: every trainable weight moves."""
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("save") / "base", dtype="bfloat16")


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    loaded = load_model(folder, device="cpu")
    disturb(loaded.model)
    return loaded


@pytest.fixture
def with_lora(folder: Path) -> LoadedModel:
    loaded = add_lora(load_model(folder, purpose="lora", device="cpu"), LoraSettings(r=2), seed=0)
    disturb(loaded.model)
    return loaded


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_models_come_back_bit_for_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    import torch

    changes = EXPERTS if kind in ("qwen3_moe", "mixtral") else {}
    source = write_model(tmp_path / "base", kind, tie_word_embeddings=tied, **changes)
    loaded = load_model(source, device="cpu")
    disturb(loaded.model)
    report = save_model(loaded, contract_of(loaded), tmp_path / "out")
    assert (report.dtype, report.cast_error) == ("float32", None)
    again = load_model(tmp_path / "out", device="cpu")
    assert again.findings == ()
    assert again.base_dtype == "float32"
    state, found = loaded.model.state_dict(), again.model.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)
    assert torch.equal(logits(loaded.model), logits(again.model))
    head = again.model.get_output_embeddings().weight
    assert (head is again.model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_cast_is_stated_and_measured(tmp_path: Path, kind: str) -> None:
    import torch

    changes = EXPERTS if kind == "qwen3_moe" else {}
    loaded = load_model(write_model(tmp_path / "base", kind, **changes), device="cpu")
    report = save_model(loaded, contract_of(loaded), tmp_path / "out", dtype="bf16")
    worst = max(
        float((p - p.to(torch.bfloat16).float()).abs().max())
        for p in loaded.model.state_dict().values()
    )
    assert worst > 0
    assert (report.dtype, report.cast_error) == ("bfloat16", worst)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(tmp_path / "out", device="cpu")
    assert again.base_dtype == "bfloat16"
    # The model in memory is as before.
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.config.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_tied_head_is_saved_once(tmp_path: Path, kind: str, dtype: str | None) -> None:
    """As the library saves it: the model that came in and the one that goes out hold as much."""
    from safetensors import safe_open

    def names(folder: Path) -> set[str]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return set(file.keys())

    tied = write_model(tmp_path / "tied", kind, tie_word_embeddings=True)
    loaded = load_model(tied, device="cpu")
    save_model(loaded, contract_of(loaded), tmp_path / "out", dtype=dtype)
    assert names(tmp_path / "out") == names(tied)
    assert load_model(tmp_path / "out", device="cpu").findings == ()
    # A head of its own is a weight of its own, also where its numbers are the embedding's.
    apart = load_model(write_model(tmp_path / "apart", kind, tie_word_embeddings=False))
    embedding, head = apart.model.get_input_embeddings(), apart.model.get_output_embeddings()
    head.weight.data.copy_(embedding.weight.data)
    save_model(apart, contract_of(apart), tmp_path / "both", dtype=dtype)
    assert len(names(tmp_path / "both")) == len(names(tied)) + 1


# peft asks transformers for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapter_comes_back_bit_for_bit(
    with_lora: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    import torch

    report = save_model(with_lora, contract_of(with_lora), tmp_path / "out")
    assert report.dtype == "float32"
    names = {file.name for file in report.files}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json",
        "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    again = load_model(tmp_path / "out", device="cpu")
    assert torch.equal(logits(with_lora.model), logits(again.model))
    # And as anybody else opens it.
    from peft import AutoPeftModelForCausalLM

    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(with_lora.model), logits(opened))
    # The live configuration still belongs to training.
    assert not with_lora.model.active_peft_config.inference_mode


def test_adapter_of_a_hub_model_names_id_and_commit(with_lora: LoadedModel, tmp_path: Path) -> None:
    commit = "0" * 40
    from_hub = replace(with_lora, base="someone/tiny", base_revision=commit)
    save_model(from_hub, contract_of(with_lora), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", commit)


def test_trained_embeddings_are_saved_with_the_adapter(folder: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    settings = LoraSettings(r=2, target_modules=["q_proj", "embed_tokens"])
    loaded = add_lora(load_model(folder, purpose="lora"), settings, seed=0)
    disturb(loaded.model)
    save_model(loaded, contract_of(loaded), tmp_path / "out")
    with safe_open(tmp_path / "out/adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len(names) == 2 * 2 + 2
    assert not any(name.endswith("embed_tokens.weight") for name in names)


def test_weights_trained_outside_the_adapter_are_not_lost_silently(
    with_lora: LoadedModel, tmp_path: Path
) -> None:
    with_lora.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(SaveError, match="not part of the adapter") as caught:
        save_model(with_lora, contract_of(with_lora), tmp_path / "out")
    assert caught.value.code == "save-incomplete"
    assert list(tmp_path.iterdir()) == []


def test_report_lists_every_file_with_its_hash(loaded: LoadedModel, tmp_path: Path) -> None:
    report = save_model(loaded, contract_of(loaded), tmp_path / "deep" / "out")
    assert report.folder == tmp_path / "deep" / "out"
    assert [f.name for f in report.files] == sorted(p.name for p in report.folder.iterdir())
    for file in report.files:
        data = (report.folder / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [p.name for p in report.folder.parent.iterdir()] == ["out"]


def test_nothing_of_this_machine_is_in_a_full_artifact(
    loaded: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    save_model(loaded, contract_of(loaded), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(folder.parent).encode() not in path.read_bytes()
        assert b"is_local" not in path.read_bytes()


def test_an_existing_folder_is_left_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        save_model(loaded, contract_of(loaded), tmp_path / "out")
    with pytest.raises(UsageError):
        save_model(loaded, contract_of(loaded), tmp_path / "new", dtype="int4")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("own_exception", [True, False])
def test_a_full_disk_leaves_nothing(
    loaded: LoadedModel,
    with_lora: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: bool,
    own_exception: bool,
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(tensors: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        if own_exception:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    chosen = with_lora if adapter else loaded
    before = logits(chosen.model)
    settings = chosen.transformers_model.generation_config
    with pytest.raises(SaveError, match="No space left") as caught:
        save_model(chosen, contract_of(chosen), tmp_path / "out")
    assert caught.value.exit_code == 1
    assert "the disk is full" in caught.value.why
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []
    assert (logits(chosen.model) == before).all()
    assert chosen.transformers_model.generation_config is settings


def test_an_interrupted_save_leaves_nothing(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("truetune.model.save.check_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(loaded, contract_of(loaded), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_weights_that_read_back_differently_are_an_error(
    loaded: LoadedModel,
    with_lora: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: bool,
    damage: str,
) -> None:
    import safetensors.torch

    write = safetensors.torch.save_file

    def faulty(tensors: dict[str, Any], path: Any, **kwargs: Any) -> None:
        name = sorted(tensors)[0]
        tensors = {k: v.clone() for k, v in tensors.items()}
        if damage == "bit":
            tensors[name].view(-1)[0] = -0.0
        else:
            del tensors[name]
        write(tensors, path, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", faulty)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", faulty)
    chosen = with_lora if adapter else loaded
    with pytest.raises(SaveError, match="differs from" if damage == "bit" else "missing") as caught:
        save_model(chosen, contract_of(chosen), tmp_path / "out")
    assert caught.value.code == "save-readback"
    assert list(tmp_path.iterdir()) == []


class Altered:
    """A contract with something else in one place."""

    def __init__(self, contract: PromptContract, **changes: Any) -> None:
        self.contract, self.changes = contract, changes

    def __getattr__(self, name: str) -> Any:
        return self.changes[name] if name in self.changes else getattr(self.contract, name)


def test_prompts_that_would_be_served_differently_are_an_error(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    contract = contract_of(loaded)
    template = contract.saved_template().replace("<|assistant|>'", "<|system|>'")
    wrong: Any = Altered(contract, saved_template=lambda: template + "x")
    with pytest.raises(SaveError, match="prompt ids that differ") as caught:
        save_model(loaded, wrong, tmp_path / "out")
    assert caught.value.code == "save-prompt-differs"
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_refuses_the_probes_does_not_cost_the_weights(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    )
    contract = PromptContract.load(loaded.tokenizer, chat_template=template, stop=[257])
    (finding,) = save_model(loaded, contract, tmp_path / "out").findings
    assert (finding.code, finding.level) == ("prompts-not-compared", "warning")
    assert "system first" in finding.why
    load_model(tmp_path / "out")


def test_stops_that_are_not_kept_are_an_error(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "truetune.model.save.served_generation_config",
        lambda model, stop_ids, tokenizer: served_generation_config(model, [260], tokenizer),
    )
    with pytest.raises(SaveError, match=r"stops on \[260\]"):
        save_model(loaded, contract_of(loaded), tmp_path / "out")


def test_template_arguments_and_stops_are_what_a_server_reads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
    )
    source = write_model(tmp_path / "base", generation={"eos_token_id": 256})
    loaded = load_model(source)
    contract = PromptContract.load(
        loaded.tokenizer, chat_template=template, template_kwargs={"enable_thinking": False}
    )
    assert contract.stop_ids == (256, 257)
    before = loaded.tokenizer.chat_template
    save_model(loaded, contract, tmp_path / "out")
    assert loaded.tokenizer.chat_template == before
    served = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=False
    )
    assert served == "<|user|>hi<|assistant|>"
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.pad_token_id) == ([256, 257], 256)


@pytest.mark.parametrize(
    ("own", "kept", "dropped"),
    [
        (SAMPLED, SAMPLED, ""),
        ({"temperature": 0.6, "top_p": 0.9, "max_length": 99}, {"max_length": 99}, "top_p 0.9"),
        ({"do_sample": False, "min_p": 0.1}, {"do_sample": False}, "min_p 0.1"),
        ({"length_penalty": 2.0, "max_length": 99}, {"max_length": 99}, "length_penalty 2.0"),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}, ""),
        ({"pad_token_id": -1}, {"pad_token_id": 256}, ""),
        ({"pad_token_id": 3}, {"pad_token_id": 3}, ""),
    ],
)
def test_flags_without_effect_are_dropped_and_named(
    tmp_path: Path, own: dict[str, Any], kept: dict[str, Any], dropped: str
) -> None:
    source = write_model(tmp_path / "base", generation={"eos_token_id": [256, 257], **own})
    loaded = load_model(source)
    contract = PromptContract.load(loaded.tokenizer, stop=[258])
    report = save_model(loaded, contract, tmp_path / "out")
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    saved.pop("transformers_version")
    saved.pop("_from_model_config", None)
    assert saved.pop("eos_token_id") == [256, 257, 258]
    assert saved == {"pad_token_id": 256} | kept
    assert [f.code for f in report.findings] == (["generation-flags-dropped"] if dropped else [])
    assert all(dropped in f.what and f.level == "note" for f in report.findings)


def test_a_config_that_cannot_be_saved_at_all_keeps_its_ids() -> None:
    from types import SimpleNamespace

    from transformers import GenerationConfig

    own = GenerationConfig(bos_token_id=1, eos_token_id=2)
    own.num_return_sequences = 3
    model = SimpleNamespace(generation_config=own)
    config, (note,) = served_generation_config(model, (2, 7), tiny_tokenizer())
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 7], 256)
    assert "num_return_sequences" in note.what
    assert own.eos_token_id == 2


def test_one_of_several_templates_is_saved_and_told(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(folder)
    default = loaded.tokenizer.chat_template
    loaded.tokenizer.chat_template = {"default": default, "tool_use": default, "rag": "other"}
    report = save_model(loaded, contract_of(loaded), tmp_path / "out")
    assert [f.code for f in report.findings] == ["templates-dropped"]
    assert "rag" in report.findings[0].what
    assert "tool_use" not in report.findings[0].what
    # A server takes the one for tools where tools are offered: both were trained.
    kept = load_model(tmp_path / "out").tokenizer.chat_template
    assert kept == {"default": default, "tool_use": default}
    loaded.tokenizer.chat_template = {"default": default, "tool_use": default}
    assert save_model(loaded, contract_of(loaded), tmp_path / "two").findings == ()


def test_a_sharded_model_is_read_back_whole(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    save = type(loaded.model).save_pretrained
    monkeypatch.setattr(
        type(loaded.model),
        "save_pretrained",
        lambda self, *a, **k: save(self, *a, **k, max_shard_size="60KB"),
    )
    report = save_model(loaded, contract_of(loaded), tmp_path / "out")
    assert sum(f.name.endswith(".safetensors") for f in report.files) > 2
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(loaded.model), logits(again.model))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers and configs are not here")
def test_a_published_tokenizer_around_a_small_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "base"
    shutil.copytree(SHARED / "qwen2.5-0.5b-instruct", source, copy_function=shutil.copyfile)
    source.chmod(0o755)
    small = tiny_config(
        "qwen2", vocab_size=151_936, hidden_size=64, eos_token_id=151_645, tie_word_embeddings=True
    )
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "weights")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tmp_path / "weights" / name, source / name)
    loaded = load_model(source, purpose="full")
    contract = PromptContract.load(loaded.tokenizer)
    report = save_model(loaded, contract, tmp_path / "full", dtype="bfloat16")
    assert report.findings == ()
    saved = json.loads((tmp_path / "full/generation_config.json").read_text())
    assert saved["eos_token_id"] == [151_645, 151_643]
    assert (saved["do_sample"], saved["repetition_penalty"], saved["top_k"]) == (True, 1.1, 20)
    with_lora = add_lora(loaded, LoraSettings(r=2), seed=0)
    save_model(with_lora, contract, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter", purpose="inference")
    sampling = Sampling(max_new_tokens=4)
    (reply,) = replies(again, PromptContract.load(again.tokenizer), [QUESTION], sampling)
    assert reply.prompt_tokens == 30


PUBLISHED = sorted(SHARED.glob("*/tokenizer.json"))


@pytest.mark.skipif(not PUBLISHED, reason="the published tokenizers are not here")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_tokenizer_is_saved_as_it_behaves(tmp_path: Path, path: Path) -> None:
    """Saved once and again: ids, decoded texts and special tokens are those it came with."""
    contract = PromptContract.load(
        load_tokenizer(path.parent), chat_template="instruction-response"
    )
    before, texts = behaviour_of(contract), [*TEXTS, *contract.tokenizer.all_special_tokens]
    before.pop("stop")  # it is generation_config's, which is not written here
    ids = [contract.tokenizer(text).input_ids for text in texts]
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        save._write_tokenizer(contract, tmp_path / name)
        reopened = PromptContract.load(load_tokenizer(tmp_path / name))
        now = behaviour_of(reopened)
        assert {key: now[key] for key in before} == before
        assert [reopened.tokenizer(text).input_ids for text in texts] == ids
        contract = reopened
    # What is written for a tokenizer that was written by us is the same to the byte.
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_config_edits_survive(folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "base"))
    edit_json(source / "config.json", eos_token_id=258, attention_dropout=0.25)
    loaded = load_model(source)
    save_model(loaded, contract_of(loaded), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["attention_dropout"]) == (258, 0.25)


def test_the_tiny_tokenizer_has_no_merges() -> None:
    assert len(tiny_tokenizer().encode("abc")) == 3
