"""The first stage that differs is named, with its cause; healthy stages raise nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from test_export import trained
from tiny_models import edit_json, write_model
from tiny_runs import command, sums, write_rows
from truetune.contract.contract import PromptContract
from truetune.diagnosis import tensors
from truetune.diagnosis.diagnose import Diagnosis, diagnose
from truetune.diagnosis.rounding import (
    EIGHT_BIT_SHARE,
    FOUR_BIT_SHARE,
    is_in_blocks,
    is_rounded,
)
from truetune.diagnosis.work import Work
from truetune.errors import UsageError
from truetune.exporting.merged import write_merged
from truetune.exporting.quantised import write_quantised
from truetune.model.load import load_model
from truetune.model.lora import LoraSettings
from truetune.model.quantise import Blocks
from truetune.model.source import EMBEDDED_FOLDER
from truetune.run.export_gguf import export_gguf

needs_llama = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")),
    reason="the gguf extra is missing",
)

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the bitsandbytes extra is missing"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moved everything, and its merged folder."""
    folder = tmp_path_factory.mktemp("diagnose")
    trained(folder, "llama")
    write_merged(folder / "adapter", folder / "merged")
    return folder


@pytest.fixture(scope="module")
def gguf(place: Path) -> Path:
    return export_gguf(str(place / "adapter"), place / "gguf", quant="f32").path


def copy(place: Path, tmp_path: Path, change: Callable[[Path], None]) -> str:
    folder = tmp_path / "changed"
    shutil.copytree(place / "merged", folder)
    change(folder)
    return str(folder)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file({n: t.contiguous() for n, t in found.items()}, path, metadata={"format": "pt"})

    return edit


def errors(found: Diagnosis) -> list[str]:
    return [f"{f.what} {f.why}" for f in found.findings() if f.level == "error"]


def test_healthy_stages_raise_nothing(place: Path, tmp_path: Path) -> None:
    write_merged(place / "adapter", tmp_path / "bf16", dtype="bfloat16")
    for folder in (place / "merged", tmp_path / "bf16"):
        found = diagnose(str(place / "adapter"), merged=str(folder))
        assert [stage.name for stage in found.stages] == ["base", "adapter", "merged"]
        assert found.first is None
        assert found.findings() == []
    assert found.effect is not None
    assert found.effect.relative > 0.1


def test_a_merge_that_is_none(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def unmerge(found: dict[str, Any]) -> None:
        base = load_file(place / "base" / "model.safetensors")
        found.update({n: t for n, t in base.items() if found[n].shape == t.shape})

    found = diagnose(str(place / "adapter"), merged=copy(place, tmp_path, edited(unmerge)))
    assert found.first is not None
    assert found.first.name == "merged"
    assert "it was not merged" in errors(found)[0]


def _scaled(found: dict[str, Any]) -> None:
    found["model.layers.0.mlp.down_proj.weight"] *= 0.25


def _swapped(found: dict[str, Any]) -> None:
    one, other = (f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1))
    found[one], found[other] = found[other].clone(), found[one].clone()


def _stale(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))


def _template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>", "<|assistant|> "))


def _rope(folder: Path) -> None:
    path = folder / "config.json"
    value = json.loads(path.read_text())
    value["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(value))


def _theta(folder: Path) -> None:
    """A change that predictions hardly show."""
    path = folder / "config.json"
    value = json.loads(path.read_text())
    value["rope_parameters"]["rope_theta"] *= 1.03
    path.write_text(json.dumps(value))


def _short(folder: Path) -> None:
    edit_json(folder / "config.json", max_position_embeddings=8)


def _activation(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_act="gelu")


def _one_percent(found: dict[str, Any]) -> None:
    found["model.layers.1.mlp.down_proj.weight"] *= 1.01


def _two_rows(found: dict[str, Any]) -> None:
    name = "model.embed_tokens.weight"
    found[name][[7, 8]] = found[name][[8, 7]]


def _nan(found: dict[str, Any]) -> None:
    found["model.embed_tokens.weight"][7] = float("nan")


def _truncated(folder: Path) -> None:
    """Fewer embeddings than the prompts' ids need."""

    def cut(found: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in found:
                found[name] = found[name][:60].clone()

    edited(cut)(folder)
    edit_json(folder / "config.json", vocab_size=60)


def _stops_on_text(folder: Path) -> None:
    path = folder / "generation_config.json"
    value = json.loads(path.read_text())
    own = value["eos_token_id"]
    value["eos_token_id"] = [*(own if isinstance(own, list) else [own]), 70]
    path.write_text(json.dumps(value))


def _two_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    words = value["model"]["vocab"]
    last = sorted(words, key=lambda text: words[text])[-2:]
    words[last[0]], words[last[1]] = words[last[1]], words[last[0]]
    path.write_text(json.dumps(value))


def _tokens(folder: Path) -> None:
    """The tokenizer of the base, which lacks what was added."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "base" / name, folder / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited(_scaled), "0.25 times what it should be"),
        (edited(_swapped), "contains the values of"),
        (_stale, "replies do not end on"),
        (_template, "the chat template is different"),
        (_rope, "config.json: rope_parameters"),
        (_tokens, "texts get different ids"),
        (_theta, "rope_parameters.rope_theta is 10300.0 instead of 10000.0"),
        (_short, "max_position_embeddings is 8 instead of"),
        (_activation, "hidden_act is 'gelu' instead of 'silu'"),
        (edited(_one_percent), "down_proj.weight is 1.01 times what it should be"),
        (edited(_two_rows), "embed_tokens.weight"),
        (edited(_nan), "numbers that are not finite"),
        (_truncated, "fewer than its tokenizer has ids"),
        (_stops_on_text, "which is not a stop token of training"),
        (_two_tokens, "tokens differ"),
    ],
)
def test_the_cause_is_named(
    place: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    found = diagnose(str(place / "adapter"), merged=copy(place, tmp_path, change))
    assert found.first is not None
    assert found.first.name == "merged"
    assert any(said in text for text in errors(found)), errors(found)


def test_settings_of_replies_are_told(place: Path, tmp_path: Path) -> None:
    def edit(**settings: Any) -> Callable[[Path], None]:
        return lambda folder: edit_json(folder / "generation_config.json", **settings)

    sampled = edit(do_sample=True, temperature=2.0, repetition_penalty=1.5, max_new_tokens=3)
    found = diagnose(str(place / "adapter"), merged=copy(place, tmp_path, sampled))
    assert [(f.code, f.level) for f in found.findings()] == [
        ("generation-settings-differ", "warning")
    ]
    told = found.findings()[0].what
    for said in ("temperature is 2.0 instead of 1.0", "repetition_penalty is 1.5 instead of 1.0"):
        assert said in told
    assert "max_new_tokens is 3 instead of None" in told
    # Of no effect where nothing is drawn, and values that are those of a file that says nothing.
    idle = edit(do_sample=False, temperature=0.6, top_p=0.9, max_length=20, num_beams=1)
    found = diagnose(str(place / "adapter"), merged=copy(place, tmp_path / "idle", idle))
    assert found.findings() == []


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3_text", "phi3"])
def test_healthy_twins_of_other_architectures(tmp_path: Path, kind: str) -> None:
    """Rounded, merged by peft in its own type, embeddings padded: none of that is a fault."""
    import torch

    tied = kind in ("qwen3", "gemma3_text")
    settings = LoraSettings(r=2, dropout=0.0, dora=kind == "qwen2", rslora=kind == "phi3")
    trained(tmp_path, kind, settings=settings, tie_word_embeddings=tied)
    write_merged(tmp_path / "adapter", tmp_path / "whole")
    write_merged(tmp_path / "adapter", tmp_path / "half", dtype="bfloat16")
    write_merged(tmp_path / "adapter", tmp_path / "f16", dtype="float16")
    # Another tool's merge: added in bfloat16, to rounded weights.
    loaded = load_model(tmp_path / "adapter", dtype="bfloat16", device="cpu", purpose="inference")
    model = loaded.model.merge_and_unload()
    assert next(model.parameters()).dtype == torch.bfloat16
    shutil.copytree(tmp_path / "half", tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "theirs")
    for name in ("whole", "half", "f16", "theirs"):
        found = diagnose(
            str(tmp_path / "adapter"), stages=["adapter", "merged"], merged=str(tmp_path / name)
        )
        assert errors(found) == [], name


@needs_llama
def test_a_gguf_file_is_a_stage(place: Path, gguf: Path, tmp_path: Path) -> None:
    found = diagnose(str(place / "adapter"), merged=str(place / "merged"), gguf=str(gguf))
    assert [stage.name for stage in found.stages] == ["base", "adapter", "merged", "gguf"]
    assert found.first is None
    assert found.stages[-1].numbers["same_replies"] == 1
    # The file of another model: of the base, under a tokenizer that lacks what was added.
    other = export_gguf(str(place / "base"), tmp_path / "other", quant="f32").path
    found = diagnose(str(place / "adapter"), merged=str(place / "merged"), gguf=str(other))
    assert found.first is not None
    assert found.first.name == "gguf"
    assert any("tokenizer.ggml.tokens" in text for text in errors(found))


@needs_llama
def test_a_file_alone_and_the_exit_code(place: Path, gguf: Path, tmp_path: Path) -> None:
    told = command("diagnose", gguf)
    assert told.code == 0, told.out + told.err
    assert "without its model" in told.out
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[:5000])
    told = command("diagnose", place / "adapter", "--gguf", damaged)
    assert told.code == 1
    assert "the first stage that differs: gguf" in told.out
    assert "Traceback" not in told.out + told.err
    told = command("diagnose", place / "adapter", "--merged", place / "base", "--json")
    assert told.code == 1
    assert json.loads(told.out)["parts_at"] == "merged"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run in float32 on rows with answers."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "base")
    data = write_rows(folder / "rows.jsonl", sums(110))
    told = command(
        *("train", folder / "base", data, "--lora", "-o", folder / "run", "--max-steps", 4),
        *("--batch-size", 4, "--dtype", "float32", "--learning-rate", "0.03"),
    )
    assert told.code == 0, told.err
    return folder / "run"


def test_a_run_is_held_to_what_it_wrote_down(run: Path, tmp_path: Path) -> None:
    found = diagnose(str(run))
    assert found.first is None, errors(found)
    assert found.rows > 10
    assert found.stages[-1].numbers["match"]["of"] > 3
    for name, file, change in (
        ("alpha", "adapter_config.json", {"lora_alpha": 4}),
        ("template", "chat_template.jinja", None),
    ):
        other = tmp_path / name
        shutil.copytree(run, other)
        path = other / "adapter" / file
        if change is None:
            path.write_text(path.read_text().replace("<|assistant|>", "<|assistant|> "))
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        found = diagnose(str(other))
        assert found.first is not None, name
        assert found.first.name == "adapter"


def test_rows_of_a_file_are_asked(run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "more.jsonl", sums(7))
    found = diagnose(str(run), data=str(data))
    wheres = [f.where for f in found.findings()]
    assert wheres == []
    assert found.rows >= 7


def test_an_adapter_without_effect_is_a_warning(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained(tmp_path, "llama", texts=[])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    zeros = {name: tensor * 0 for name, tensor in load_file(path).items()}
    save_file(zeros, path, metadata={"format": "pt"})
    found = diagnose(str(tmp_path / "adapter"))
    assert [f.code for f in found.findings()] == ["adapter-without-effect"]
    assert found.first is None


def test_a_missing_run_is_no_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub id has the same form; the folder of runs is here."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = command("diagnose", "runs/frist")
    assert told.code != 0
    assert "no such model folder: runs/frist" in told.err
    assert "did you mean runs/first?" in told.err
    assert "Hub" not in told.err
    told = command("diagnose", "nobody/first")
    assert "nobody/first is neither a folder nor a reachable Hub model" in told.err


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with pytest.raises(UsageError, match="unknown stage"):
        diagnose(str(tmp_path / "model"), stages=["merge"])
    with pytest.raises(UsageError, match="there is no"):
        diagnose(str(tmp_path / "model"), merged=str(tmp_path / "no"))
    with pytest.raises(UsageError, match="there is no file"):
        diagnose(str(tmp_path / "no.gguf"))
    told = command("diagnose", tmp_path / "model", "--url", "x:1")
    assert (told.code, "[server-address]" in told.err) == (2, True)
    # Nothing listens there: an address is bad input, not a stage that differs.
    told = command("diagnose", tmp_path / "model", "--url", "http://127.0.0.1:9")
    assert (told.code, "[server-unreachable]" in told.err) == (2, True)
    for stage in ("merged", "quantised", "gguf", "url", "base", "adapter"):
        with pytest.raises(UsageError) as raised:
            diagnose(str(tmp_path / "model"), stages=["model", stage])
        assert raised.value.code == "stage-without-file", stage
    with pytest.raises(UsageError, match="is a folder"):
        diagnose(str(tmp_path / "model"), gguf=str(tmp_path / "model"))
    (tmp_path / "a.gguf").touch()
    for arguments in (
        {"merged": str(tmp_path / "a.gguf")},
        {"quantised": str(tmp_path / "a.gguf")},
    ):
        with pytest.raises(UsageError, match="is a file"):
            diagnose(str(tmp_path / "model"), **arguments)
    with pytest.raises(UsageError, match="nothing can be compared with it"):
        diagnose(str(tmp_path / "a.gguf"), merged=str(tmp_path / "model"))
    edit_json(
        tmp_path / "model" / "config.json",
        quantization={"group_size": 64, "bits": 4},
        quantization_config={"group_size": 64, "bits": 4},
    )
    with pytest.raises(UsageError, match="folder for MLX"):
        diagnose(str(tmp_path / "model"), quantised=str(tmp_path / "model"))


@needs_llama
def test_a_gguf_file_is_compared_exactly(place: Path, tmp_path: Path) -> None:
    """Faults below what a type costs; and files of other converters, which are no faults."""
    import dataclasses

    import torch

    from truetune.diagnosis.alone import gguf_alone
    from truetune.exporting.gguf_file import write_file
    from truetune.exporting.gguf_ids import choose_pre_tokenizer
    from truetune.exporting.gguf_shape import Shape, shape_of
    from truetune.exporting.gguf_vocabulary import Vocabulary, vocabulary_of
    from truetune.model.merge import merge_adapter

    source = str(place / "adapter")
    loaded = merge_adapter(source).loaded
    model, contract = loaded.transformers_model, PromptContract.load(loaded.tokenizer)
    shape = shape_of(model)
    vocabulary, _ = vocabulary_of(contract, model.get_input_embeddings().weight.shape[0])
    vocabulary, _ = choose_pre_tokenizer(vocabulary, contract, tmp_path)
    own = {name: value.clone() for name, value in model.state_dict().items()}

    def told(
        quant: str,
        *,
        shape: Shape = shape,
        vocabulary: Vocabulary = vocabulary,
        change: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> list[str]:
        tensors = {name: value.clone() for name, value in own.items()}
        change(tensors)
        model.load_state_dict(tensors)
        path = tmp_path / "file.gguf"
        path.unlink(missing_ok=True)
        write_file(path, model, shape, vocabulary, quant, "any")
        found = diagnose(source, stages=["adapter", "gguf"], gguf=str(path))
        return errors(found)

    def swapped(one: str, other: str) -> Callable[[dict[str, Any]], None]:
        def change(found: dict[str, Any]) -> None:
            found[one], found[other] = found[other], found[one]

        return change

    def bfloat16(found: dict[str, Any]) -> None:
        found.update({name: value.bfloat16().float() for name, value in found.items()})

    layer = "model.layers.1."
    with torch.no_grad():
        for name in ("input_layernorm", "post_attention_layernorm"):
            key = f"{layer}{name}.weight"
            own[key] += 0.01 * torch.randn(
                own[key].shape, generator=torch.Generator().manual_seed(1)
            )
    # The model that was written is not the adapter's any more: its norms differ by a hundredth.
    assert any("layernorm" in t or "_norm" in t for t in told("q8_0"))
    own.update({n: v.clone() for n, v in merge_adapter(source).loaded.model.state_dict().items()})
    for quant in ("f16", "bf16", "q8_0", "q4_0"):
        assert told(quant) == [], quant
        assert told(quant, change=bfloat16) == [], quant

    values = tuple((n, v * 1.03 if n == "rope_freq_base" else v) for n, v in shape.values)
    (said,) = told("q8_0", shape=dataclasses.replace(shape, values=values))
    assert "rope.freq_base is 10300.0 instead of 10000.0" in said
    (said,) = told("f16", change=_one_percent)
    assert "blk.1.ffn_down.weight is 1.01 times what it should be" in said
    (said,) = told(
        "q8_0", change=swapped(f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight")
    )
    assert "blk.1.ffn_gate.weight contains the values of blk.1.ffn_up.weight" in said
    tokens = list(vocabulary.tokens)
    tokens[-4], tokens[-5] = tokens[-5], tokens[-4]
    exchanged = dataclasses.replace(vocabulary, tokens=tuple(tokens))
    assert any(
        "tokenizer.ggml.tokens has entries that differ (2)" in t
        for t in told("f32", vocabulary=exchanged)
    )
    ends = dataclasses.replace(vocabulary, special={**vocabulary.special, "eom": 70})
    assert any("not a stop token of training" in t for t in told("f32", vocabulary=ends))

    def nan(found: dict[str, Any]) -> None:
        found[f"{layer}mlp.down_proj.weight"][:] = float("nan")

    assert any("not finite" in t for t in told("f32", change=nan))
    stage = gguf_alone(tmp_path / "file.gguf", lambda _: None)
    assert any("1 of" in f.what and "not finite" in f.what for f in stage.findings)
    told("f16", vocabulary=dataclasses.replace(vocabulary, template={}))
    stage = gguf_alone(tmp_path / "file.gguf", lambda _: None)
    assert [f.what for f in stage.findings if "end" in f.what] == []
    assert any("no chat template" in f.what for f in stage.findings)


def test_tensors_within_their_rounding_are_equal() -> None:
    import torch

    wanted = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    half = wanted.to(torch.bfloat16).float()
    assert tensors.explain([("a", wanted)], lambda _: (half, "BF16")) == ""
    assert "1 of 1" in tensors.explain([("a", wanted)], lambda _: (half, "F32"))
    assert "is 3 times" in tensors.explain([("a", wanted)], lambda _: (3 * wanted, "F32"))
    assert "missing" in tensors.explain([("a", wanted)], lambda _: None)
    assert "shape" in tensors.explain([("a", wanted)], lambda _: (wanted[:4], "F32"))
    base = torch.zeros_like(wanted)
    twice = tensors.explain([("a", wanted)], lambda _: (2 * wanted, "F32"), lambda _: (base, "F32"))
    assert "twice" in twice


@needs_bitsandbytes
def test_a_folder_of_fewer_bits_is_a_stage(tmp_path: Path) -> None:
    """A model in 4 bits, as bitsandbytes saves it; then with the scales of one matrix damaged."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = write_model(tmp_path / "model", hidden_size=128, head_dim=32, intermediate_size=256)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map="cpu")
    healthy = tmp_path / "healthy"
    shutil.copytree(source, healthy)
    (healthy / "model.safetensors").unlink()
    model.save_pretrained(healthy)
    told = command("diagnose", source, "--quantised", healthy, "--json")
    assert told.code == 0, told.out + told.err
    found = json.loads(told.out)
    assert [stage["stage"] for stage in found["stages"]] == ["model", "quantised"]
    assert 0.001 < found["stages"][-1]["predictions"]["relative"] < 1

    damaged = tmp_path / "damaged"
    shutil.copytree(healthy, damaged)
    tensors = load_file(damaged / "model.safetensors")
    scales = [name for name in tensors if name.endswith("down_proj.weight.absmax")]
    assert scales
    for name in scales:
        tensors[name] = tensors[name] * 0.1
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for folder, said in (
        (damaged, "times what it should be"),
        (stopless(healthy), "not end on"),
    ):
        told = command("diagnose", source, "--quantised", folder)
        assert told.code == 1
        assert "the first stage that differs: quantised" in told.out
        assert said in told.out


def _norm(tensors: dict[str, Any]) -> None:
    """By 2 %, which predictions hardly show."""
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.02


def _matrix(tensors: dict[str, Any]) -> None:
    ends = ("0.mlp.up_proj.weight.absmax", "0.mlp.up_proj.SCB")
    (name,) = (n for n in tensors if n.endswith(ends))
    tensors[name] = tensors[name] // 2 if name.endswith("absmax") else tensors[name] * 1.5


def _some_rows(tensors: dict[str, Any]) -> None:
    """12 rows of 256 as zeros: bitsandbytes' level 7 of 16, two numbers in a byte."""
    codes = tensors["model.layers.1.mlp.up_proj.weight"]
    codes.view(256, -1)[20:32] = 0 if codes.shape[0] == 256 else 0x77


def _embedding_row(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][260] = 0


@needs_bitsandbytes
@pytest.mark.parametrize("nested", [True, False])
def test_nearest_rounding_stays_in_its_blocks(nested: bool) -> None:
    """Normal, heavy-tailed and uneven matrices and those of a trained model; not with a row lost
    or a quarter too large."""
    import bitsandbytes.functional as library
    import torch
    from safetensors.torch import load_file

    drawn = torch.Generator().manual_seed(0)
    matrices = []
    for shape in ((64, 64), (256, 128), (128, 256), (512, 192), (384, 100)):
        normal = torch.randn(shape, generator=drawn)
        others = torch.randn((3, *shape), generator=drawn).square().mean(dim=0).sqrt()
        uneven = torch.randn((shape[0], 1), generator=drawn).exp()
        matrices += [normal, normal / others, normal * uneven]
    stored = load_file(EMBEDDED_FOLDER / "model.safetensors")
    matrices += [value.float() for value in stored.values() if value.ndim == 2][:8]
    four = Blocks(64, 256 if nested else 0), FOUR_BIT_SHARE
    eight = Blocks(), EIGHT_BIT_SHARE
    for wanted in matrices:
        codes, state = library.quantize_4bit(
            wanted.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        low = library.dequantize_4bit(codes, state).float()
        step = wanted.bfloat16().float().abs().amax(dim=1, keepdim=True) / 127
        high = (wanted.bfloat16().float() / step).round() * step
        for value, (how, share) in ((low, four), (high, eight)):
            assert is_in_blocks(value, wanted, how, share)
            assert is_in_blocks(value.T, wanted.T, replace(how, turned=True), share)
            row = int(wanted.norm(dim=1).argmax())
            for factor in (0.0, 1.25):
                damaged = value.clone()
                damaged[row] *= factor
                assert not is_in_blocks(damaged, wanted, how, share)


@needs_bitsandbytes
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_damage_below_what_rounding_costs_is_named(tmp_path: Path, quant: str) -> None:
    """Of tensors that are not quantised, and of rows of those that are."""
    source = write_model(tmp_path / "model", hidden_size=128, head_dim=32, intermediate_size=256)
    healthy = tmp_path / "healthy"
    write_quantised(source, healthy, quant)
    with pytest.MonkeyPatch.context() as patched:
        work = Work(str(source), None, [], lambda _: None)
        # Reloading the plain model for each folder takes most of the time.
        patched.setattr("truetune.diagnosis.diagnose.Work", lambda *_: work)
        assert diagnose(str(source), quantised=str(healthy)).findings() == []
        for number, (damages, said) in enumerate(
            (
                ((_norm,), ("model.norm.weight is 1.02 times",)),
                ((_norm, _matrix), ("model.norm.weight is 1.02", "layers.0.mlp.up_proj.weight")),
                ((_some_rows,), ("12 of 256 rows of model.layers.1.mlp.up_proj.weight are zero",)),
                ((_embedding_row,), ("1 of 264 rows of model.embed_tokens.weight are zero",)),
            )
        ):
            folder = tmp_path / str(number)
            shutil.copytree(healthy, folder)
            edited(lambda tensors, them=damages: [damage(tensors) for damage in them])(folder)
            (text,) = errors(diagnose(str(source), quantised=str(folder)))
            assert all(words in text for words in said), text
            assert "too few bits" not in text


def stopless(folder: Path) -> Path:
    """A copy whose generation_config is another model's."""
    other = folder.with_name("stopless")
    shutil.copytree(folder, other)
    _stale(other)
    return other


def _grid(bits: int, block: int) -> Callable[[Any], Any]:
    """Rounds a matrix to whole steps of its largest number, in blocks of a row."""

    def rounded(value: Any) -> Any:
        shown = value.float().reshape(-1, block or value.shape[-1])
        step = shown.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return ((shown / step).round() * step).reshape(value.shape)

    return rounded


def _all_matrices(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def changed(found: dict[str, Any]) -> None:
        found.update({n: change(t) if t.ndim == 2 else t for n, t in found.items()})

    return changed


def _fp8(value: Any) -> Any:
    import torch

    scale = value.abs().max() / 448
    return (value / scale).to(torch.float8_e4m3fn).float() * scale


def _trained_on(value: Any) -> Any:
    """A low-rank update."""
    import torch

    drawn = torch.Generator().manual_seed(3)
    one = torch.randn(value.shape[0], 4, generator=drawn)
    other = torch.randn(4, value.shape[1], generator=drawn)
    return value + 0.01 * float(value.std()) * one @ other


def test_rounded_matrices_are_told_from_other_training() -> None:
    import torch

    drawn = torch.Generator().manual_seed(0)
    own = {f"layers.{n}.weight": torch.randn(96, 128, generator=drawn) for n in range(6)}
    own |= {f"layers.{n}.norm": torch.rand(128, generator=drawn) for n in range(2)}

    def told(change: Callable[[Any], Any], kind: str = "BF16") -> str:
        def found(name: str) -> Any:
            value = own[name]
            value = change(value) if value.ndim == 2 else value
            return (value.bfloat16().float() if kind == "BF16" else value), kind

        wanted = ((name, value) for name, value in own.items())
        return tensors.explain(
            wanted, found, same=lambda _, v, kind, w: is_rounded(v, w, kind, merged=False)
        )

    for bits, block, said in ((8, 0, "8 bits"), (4, 32, "4 bits"), (6, 64, "6 bits")):
        text = told(_grid(bits, block))
        assert f"6 of 8 tensors are the model's, rounded to about {said}" in text, (bits, text)
        assert "another model" not in text
    assert "stored again as BF16" in told(_grid(8, 0))
    assert "rounded to about" in told(_fp8)
    # What is no rounding: an update of low rank, steps of one size, noise, and other matrices.
    steps = 0.02 * torch.randn(96, 128, generator=drawn).sign()
    noise = 0.02 * torch.randn(96, 128, generator=drawn)
    for change in (
        _trained_on,
        lambda value: value + steps,
        lambda value: value + noise,
        lambda value: value.flip(0),
    ):
        assert "another model, or was trained differently: 6 of 8" in told(change)


def test_a_table_that_lost_a_row_is_not_called_rounded() -> None:
    """Of an adapter that was left out, with the embedding of its new token."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    base = {f"layers.{n}.weight": torch.randn(96, 128, generator=drawn) for n in range(4)}
    base["embedding"] = torch.randn(512, 128, generator=drawn)
    own = {name: _trained_on(value) for name, value in base.items()}
    own["embedding"] = base["embedding"].clone()
    own["embedding"][400] += torch.rand(128, generator=drawn) - 0.5
    for held in (base, {**own, "embedding": base["embedding"]}):
        text = tensors.explain(
            ((name, value) for name, value in own.items()),
            lambda name, held=held: (held[name], "F32"),
            # The base's own table has fewer rows, and says nothing.
            lambda name: None if name == "embedding" else (base[name], "F32"),
        )
        assert "rounded" not in text
    assert "1 of 512 rows of embedding contain different numbers, first row 400" in text


def test_a_folder_of_rounded_weights_is_called_rounded(place: Path, tmp_path: Path) -> None:
    """Of a whole model, as it was saved in bfloat16."""
    source = write_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    edited(_all_matrices(_grid(8, 0)))(folder)
    found = diagnose(str(source), merged=str(folder))
    assert found.first is not None
    assert "rounded to about 8 bits" in errors(found)[0]
    assert "another model" not in errors(found)[0]


@needs_llama
def test_a_gguf_file_that_was_quantised_twice(tmp_path: Path) -> None:
    """q8_0 of what q4_0 left: what the file's own type costs is less."""
    source = write_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    folder = tmp_path / "four"
    shutil.copytree(source, folder)
    edited(_all_matrices(_grid(4, 32)))(folder)
    made = export_gguf(str(folder), tmp_path / "out", quant="q8_0")
    found = diagnose(str(source), gguf=str(made.path), stages=["model", "gguf"])
    assert any("rounded to about 4 bits and stored again as Q8_0" in t for t in errors(found))


def test_what_no_stage_can_be_is_said_before_the_model_is_loaded(
    run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("truetune.diagnosis.diagnose.Work", loaded)
    (tmp_path / "junk.gguf").write_text("not a gguf file")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text("{}")
    source = str(place / "adapter")
    asked: list[tuple[dict[str, str], str, str]] = [
        ({"gguf": str(tmp_path / "junk.gguf")}, "not-gguf", "first bytes are b'not '"),
        ({"gguf": str(tmp_path / "empty.gguf")}, "not-gguf", "it is empty"),
        ({"merged": str(tmp_path / "bare")}, "stage-kind", "no config.json"),
        ({"quantised": str(tmp_path / "weightless")}, "stage-kind", "no weights"),
        ({"merged": source}, "stage-kind", "it is an adapter"),
        ({"merged": str(run)}, "stage-kind", "it is an adapter"),
        ({"base": str(tmp_path / "nope")}, "adapter-no-base", "the path does not exist"),
    ]
    for arguments, code, why in asked:
        with pytest.raises(UsageError) as raised:
            diagnose(source, **arguments)  # type: ignore[arg-type]
        assert raised.value.code == code, arguments
        assert why in raised.value.why, arguments
        assert raised.value.where.startswith("--")
        assert raised.value.fix
    told = command("diagnose", tmp_path / "junk.gguf")
    assert (told.code, "[not-gguf]" in told.err) == (2, True)
    told = command("serve", tmp_path / "junk.gguf", "--port", 0)
    assert (told.code, "[not-gguf]" in told.err, "memory" in told.err) == (2, True, False)
