"""Quantised folders: transformers makes of them what it makes of the model, or there are none."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fresh_process import in_this_process  # noqa: F401  (a fixture)
from test_diagnose import needs_llama
from test_export import trained
from tiny_models import edit_json, write_model
from tiny_runs import command, sums, write_rows
from truetune.contract.contract import PromptContract
from truetune.diagnosis.measured import Stage
from truetune.errors import CheckFailed, UsageError
from truetune.exporting import quantise_worker, quantised
from truetune.exporting.gguf_proof import Apart
from truetune.exporting.quantised import QUANTS, write_quantised
from truetune.generate import replies
from truetune.model.draw import Sampling
from truetune.model.load import load_model
from truetune.model.quantise import LoadIn, dequantised, stored_bits
from truetune.run import export_quantised as room
from truetune.run.export_quantised import export_quantised
from truetune.run_dir import RunDir
from truetune.system.child import Reply
from truetune.verification.rows import read_rows


def missing(quant: str) -> bool:
    return importlib.util.find_spec(QUANTS[quant].kind) is None


def needs(quant: str) -> Any:
    """The type, where its package is installed."""
    why = f"the {QUANTS[quant].extra} extra is missing"
    return pytest.param(quant, marks=pytest.mark.skipif(missing(quant), reason=why))


needs_bitsandbytes = pytest.mark.skipif(missing("nf4"), reason="the bitsandbytes extra is missing")
needs_torchao = pytest.mark.skipif(missing("torchao-int8"), reason="the torchao extra is missing")
needs_gptq = pytest.mark.skipif(missing("gptq-w4a16"), reason="the llm-compressor extra is missing")
WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
# What healthy folders of these random models may cost: about 1.5 times what was measured.
USUAL = {4: 0.7, 8: 0.08}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The child that quantises, in this process: JSON is all it shares."""
    request.getfixturevalue("in_this_process")

    def ask(_: str, question: bytes) -> Reply:
        try:
            said = quantise_worker.answer(json.loads(question))
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        return Reply(json.dumps(said).encode(), 0, "")

    monkeypatch.setattr(quantised.child, "ask", ask)


def wide(folder: Path, kind: str = "llama", **more: Any) -> Path:
    return write_model(folder, kind, **WIDE, **more)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quant", [needs(quant) for quant in QUANTS])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "phi3", "mistral"])
def test_a_quantised_folder_is_the_model(tmp_path: Path, kind: str, quant: str) -> None:
    source = wide(tmp_path / "model", kind)
    data = write_rows(tmp_path / "rows.jsonl", sums(40)) if QUANTS[quant].calibrated else None
    out = tmp_path / "out"
    made = export_quantised(str(source), out, quant=quant, data=str(data) if data else None)
    bits = stored_bits(load_model(out, device="cpu", purpose="inference").transformers_model.config)
    assert bits == (4 if quant in ("nf4", "gptq-w4a16") else 8)
    assert 1e-3 < made.apart.relative < USUAL[bits]
    assert made.written.matrices == (8 if kind == "phi3" else 14)
    assert made.written.num_bytes < 0.8 * made.written.plain_bytes
    assert made.prompts == 50
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert proof["holds"]
    assert set(proof["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"proof.json"}
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@needs_bitsandbytes
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_matrices_that_are_held_transposed(tmp_path: Path, quant: str) -> None:
    """GPT-2's inputs are the rows of its matrices, and bitsandbytes makes linear layers of them."""
    from safetensors.torch import load_file, save_file

    size = {"n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4}
    source = write_model(tmp_path / "model", "gpt2", hidden_size=128, **size)
    made = export_quantised(str(source), tmp_path / "out", quant=quant)
    assert made.written.matrices == 8
    whole = load_model(source, device="cpu", purpose="inference").model.state_dict()
    load_in: LoadIn = "4bit" if quant == "nf4" else "8bit"
    held = load_model(source, device="cpu", purpose="inference", load_in=load_in).model
    for name, value in dequantised(held, "").state_dict().items():
        assert value.shape == whole[name].shape
        assert (value.float() - whole[name]).norm() < 0.2 * whole[name].norm().clamp(min=1e-3)
    # One input of a layer, and one output.
    for place in ((3, slice(None)), (slice(None), 3)):
        wrong = tmp_path / "wrong"
        shutil.copytree(source, wrong, dirs_exist_ok=True)
        tensors = load_file(source / "model.safetensors")
        tensors["transformer.h.1.mlp.c_fc.weight"][place] *= 1.25
        save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
        write_quantised(wrong, tmp_path / "made", quant)
        told = command("diagnose", source, "--quantised", tmp_path / "made")
        assert told.code == 1
        assert "h.1.mlp.c_fc.weight" in told.out
        shutil.rmtree(tmp_path / "made")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quant", [needs(quant) for quant in QUANTS])
def test_the_embedded_base(tmp_path: Path, quant: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(40)) if QUANTS[quant].calibrated else None
    made = export_quantised("embedded", tmp_path / "out", quant=quant, data=str(data or "") or None)
    assert made.findings == ()
    assert made.apart.greedy > 0.95


@pytest.mark.parametrize(
    ("greedy", "same", "replies", "known", "level"),
    [
        (0.737, 0.0, 12, True, "warning"),
        (0.737, 0.0, 12, False, "warning"),
        (0.97, 0.25, 12, True, "note"),  # long replies, which one token changes
        (1.0, 2 / 12, 12, False, None),  # the embedded base, which was never trained to answer
        (0.993, 11 / 12, 12, True, None),
        (0.737, 0.5, 12, True, None),
        (0.737, 0.0, 3, True, None),
    ],
)
def test_most_replies_that_change_are_told(
    greedy: float, same: float, replies: int, known: bool, level: str | None
) -> None:
    apart = Apart(0.03, 0.2, 0.1, 0.5, greedy, 148)
    numbers: dict[str, Any] = {"replies": replies, "same_replies": same}
    if known:
        numbers["match"] = {"share": 0.5, "low": 0.2, "high": 0.8, "of": replies}
    stage = Stage("quantised", "", apart, numbers=numbers)
    found = room._loss(stage, usual=0.3)
    assert [finding.level for finding in found] == ([level] if level else [])
    if found:
        assert found[0].code == "quantised-replies-differ"
        assert f"{round((1 - same) * replies)} of {replies} replies" in found[0].what


@needs_bitsandbytes
@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_is_merged_quantised_and_opened_by_every_verb(tmp_path: Path) -> None:
    """With the child process that quantises."""
    trained(tmp_path, **WIDE)
    out = tmp_path / "out"
    told = command("export", tmp_path / "adapter", "--to", "merged", "--quant", "int8", "-o", out)
    assert told.code == 0, told.err
    assert "14 matrices quantised" in told.out
    assert f"vllm serve {out}" in told.out
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"]
    assert (out / "chat_template.jinja").is_file()
    assert not (out / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]

    told = command("diagnose", tmp_path / "adapter", "--quantised", out)
    assert told.code == 0, told.out + told.err
    loaded = load_model(out, device="cpu", purpose="inference")
    contract = PromptContract.load(loaded.tokenizer)
    whole = load_model(tmp_path / "adapter", device="cpu", purpose="inference")
    assert contract.stop_ids == PromptContract.load(whole.tokenizer).stop_ids
    asked = [[{"role": "user", "content": "1+1?"}]]
    (answer,) = replies(loaded, contract, asked, Sampling(max_new_tokens=4))
    assert answer.ids
    rows = write_rows(tmp_path / "rows.jsonl", sums(4))
    told = command("eval", out, "--data", rows, "--device", "cpu", "--json")
    assert told.code == 0, told.err


@needs_bitsandbytes
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("onto", ["auto", "original"])
def test_an_adapter_of_a_rounded_base(tmp_path: Path, onto: Any) -> None:
    """On the original weights the merged model is another one, which the folder is held to."""
    trained(tmp_path, texts=[], load_in="4bit", **WIDE)
    made = export_quantised(str(tmp_path / "adapter"), tmp_path / "out", quant="int8", onto=onto)
    assert made.apart.relative < USUAL[8]
    assert made.prompts == 50


@needs_torchao
@pytest.mark.usefixtures("quick")
def test_for_vllm_an_adapter_is_merged_where_it_is_quantised(tmp_path: Path) -> None:
    trained(tmp_path, texts=[], **WIDE)
    told = command(
        *("export", tmp_path / "adapter", "--to", "sglang", "--quant", "torchao-int8"),
        *("-o", tmp_path / "out", "--json"),
    )
    assert told.code == 0, told.err
    facts = json.loads(told.out)
    assert facts["serve"] == f"python -m sglang.launch_server --model-path {tmp_path / 'out'}"
    assert facts["holds"]
    assert facts["matrices"] == 14
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def _scales(tensors: dict[str, Any]) -> None:
    names = [n for n in tensors if "layers.1.mlp.down_proj" in n]
    (name,) = [n for n in names if n.endswith(("SCB", "weight.absmax", "_scale"))]
    if tensors[name].is_floating_point():
        tensors[name] = tensors[name] * 1.25
    else:
        # NF4's scales are numbers of 8 bits into a table.
        tensors[name].fill_(0)


def _codes(tensors: dict[str, Any]) -> None:
    ends = ("down_proj.weight", "_qdata", "weight_packed")
    name = next(n for n in tensors if "layers.0.mlp.down_proj" in n and n.endswith(ends))
    tensors[name] = tensors[name].flip(0).contiguous()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quant", [needs(quant) for quant in QUANTS])
@pytest.mark.parametrize("damage", [_scales, _codes])
def test_a_damaged_folder_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, damage: Callable[[Any], None]
) -> None:
    """Scales of one layer changed, and codes of another, between writing and loading."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    def damaged(source: Path, folder: Path, quant: str, **more: Any) -> Any:
        made = write_quantised(source, folder, quant, **more)
        file = folder / "model.safetensors"
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, metadata=about)
        return made

    source = wide(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", sums(40))
    monkeypatch.setattr(room, "write_quantised", damaged)
    with pytest.raises(CheckFailed) as caught:
        export_quantised(
            str(source),
            tmp_path / "out",
            quant=quant,
            data=str(data) if QUANTS[quant].calibrated else None,
        )
    (finding,) = [f for f in caught.value.findings if f.level == "error"]
    assert "down_proj" in finding.why
    assert ".unverified" not in finding.where
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "rows.jsonl"]


@needs_torchao
@pytest.mark.usefixtures("quick")
def test_scales_moved_into_norms_are_no_damage(tmp_path: Path) -> None:
    """As AWQ and SmoothQuant do: the matrices are others, and the model is the same."""
    import torch
    from safetensors.torch import load_file, save_file

    source = wide(tmp_path / "model")
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    tensors = load_file(moved / "model.safetensors")
    scales = torch.exp(0.4 * torch.randn(128, generator=torch.Generator().manual_seed(0)))
    layer = "model.layers.0."
    tensors[f"{layer}input_layernorm.weight"] /= scales
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{layer}self_attn.{name}.weight"] *= scales
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    write_quantised(moved, tmp_path / "made", "torchao-int8")
    told = command("diagnose", source, "--quantised", tmp_path / "made")
    assert told.code == 0, told.out


@needs_torchao
@pytest.mark.usefixtures("quick")
def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    """gpt2's layers are of another class, which torchao leaves as they are."""
    write_model(tmp_path / "model", "gpt2", n_positions=256, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(UsageError, match="torchao cannot quantise") as caught:
        export_quantised(str(tmp_path / "model"), tmp_path / "out", quant="torchao-int8")
    assert caught.value.code == "quantised-failed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--quant", "nf5"), "quantised-type", "did you mean nf4?"),
        (("--quant", "awq"), "quantised-type", "needs a GPU"),
        (("--quant", "q8_0"), "quantised-type", "GGUF"),
        (("--to", "gguf", "--quant", "nf4"), "", "gguf"),
        (("--quant", "nf4", "--no-verify"), "export-what", "no effect with --quant"),
        (("--quant", "nf4", "--data", "rows.jsonl"), "export-what", "gptq-w4a16"),
        (("--data", "rows.jsonl"), "export-what", "--data has no effect"),
    ],
)
def test_what_is_refused_at_once(tmp_path: Path, words: Any, code: str, said: str) -> None:
    write_model(tmp_path / "model")
    to = () if "--to" in words else ("--to", "vllm")
    told = command("export", tmp_path / "model", *to, *words, "-o", tmp_path / "out")
    assert told.code == 2
    assert f"[{code}" in told.err
    assert said in told.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", QUANTS)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    write_model(tmp_path / "model")
    monkeypatch.setattr("truetune.exporting.quantised.importlib.util.find_spec", lambda _: None)
    told = command(
        "export", tmp_path / "model", "--to", "merged", "--quant", quant, "-o", tmp_path / "out"
    )
    assert told.code == 2
    assert "[extra-missing]" in told.err
    assert f"pip install 'truetune[{QUANTS[quant].extra}]'" in told.err


def test_a_folder_whose_package_is_missing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "model")
    edit_json(Path(source) / "config.json", quantization_config={"quant_method": "torchao"})
    monkeypatch.setattr("truetune.model.quantise.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="quantised by torchao") as caught:
        load_model(source, device="cpu", purpose="inference")
    assert caught.value.fix == "pip install 'truetune[torchao]'"


@needs_bitsandbytes
def test_what_cannot_be_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "model")
    words = ("export", source, "--to", "merged", "--quant", "nf4", "-o", tmp_path / "out")
    monkeypatch.setattr(room, "available_bytes", lambda _: 1000)
    told = command(*words)
    assert told.code != 0
    assert "[model-too-large]" in told.err
    monkeypatch.undo()


@needs_bitsandbytes
@pytest.mark.parametrize(
    "to", [("merged", "--quant", "nf4"), pytest.param(("gguf",), marks=needs_llama), ("vllm",)]
)
def test_a_quantised_folder_is_not_quantised_again(tmp_path: Path, to: tuple[str, ...]) -> None:
    """It is copied as it is; nothing else can be made of it, which is said before it is opened."""
    source = wide(tmp_path / "model")
    write_quantised(source, tmp_path / "made", "nf4")
    told = command("export", tmp_path / "made", "--to", *to, "-o", tmp_path / "out")
    if to == ("vllm",):
        assert told.code == 0, told.err
        return
    assert told.code != 0
    assert "quantised already (bitsandbytes)" in told.err
    assert "export the run, or the unquantised model" in told.err
    assert "--lora" not in told.err
    assert not (tmp_path / "out").exists()


def test_gptq_is_calibrated_on_rows_as_they_are_trained(tmp_path: Path) -> None:
    """Every id of every row, prompts and answers; of a run without `--data`, its own."""
    source = str(write_model(tmp_path / "model"))
    data = write_rows(tmp_path / "rows.jsonl", sums(300))
    found = room._calibration(source, source, str(data), None, room.Listener())
    contract = PromptContract.load(load_model(source, device="cpu").tokenizer)
    (first,) = contract.encode(_turns(sums(1)[0]))
    assert found.rows[0] == tuple(first.ids)
    assert (len(found.rows), found.available) == (256, 300)
    with pytest.raises(UsageError, match="there are none") as caught:
        room._calibration(source, source, None, None, room.Listener())
    assert "--data" in caught.value.fix

    told = command(
        *("train", source, data, "-o", tmp_path / "run", "--lora", "--max-steps", "1"),
        *("--device", "cpu", "--no-check"),
    )
    assert told.code == 0, told.err
    run = str(tmp_path / "run")
    held = room._calibration(run, run, None, None, room.Listener())
    kept_out = {
        tuple(ids) for row in read_rows(RunDir.open(run)) for ids, _ in row.examples if row.held_out
    }
    assert kept_out
    trained_rows = {tuple(e.ids) for one in sums(300) for e in contract.encode(_turns(one))}
    assert set(held.rows) <= trained_rows
    assert 256 <= held.available < 300
    assert not kept_out & set(held.rows)
    data.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        room._calibration(run, run, None, None, room.Listener())


def _turns(row: dict[str, str]) -> list[dict[str, str]]:
    words = (("user", row["prompt"]), ("assistant", row["completion"]))
    return [{"role": role, "content": content} for role, content in words]


_GROUPS = {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}}
_CLASS = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2}}


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "compressed-tensors", "config_groups": _GROUPS}, 4),
        ({"quant_method": "torchao", "quant_type": _CLASS}, 8),
        ({"quant_method": "fp8"}, None),
        (None, None),
    ],
)
def test_bits_are_read_from_the_config(config: Any, bits: int | None) -> None:
    class Config:
        quantization_config = config

    assert stored_bits(Config()) == bits
