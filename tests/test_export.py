"""Merging: the merged model is the adapter's, whole, in the base's type, or it is not there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fresh_process import in_this_process  # noqa: F401  (a fixture)
from refused_folders import REFUSED
from tiny_models import edit_json, tiny_tokenizer, write_model
from tiny_runs import command, sums, write_rows
from truetune.compare import agreement, measure
from truetune.contract import sandbox
from truetune.contract.contract import PromptContract
from truetune.errors import CheckFailed, ModelError, OutputExists, UsageError
from truetune.exporting.merged import write_merged
from truetune.listener import Listener
from truetune.model.architecture import head_is_tied
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.new_tokens import add_tokens, make_room
from truetune.model.save import save_model
from truetune.model.tokenizer import num_ids
from truetune.run.export_kind import require_export
from truetune.run.pipeline import export

KINDS = ["llama", "qwen2", "qwen3", "phi3", "gemma"]
THINK = ["<think>", "</think>"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the bitsandbytes extra is missing"
)


def trained(
    folder: Path,
    kind: str = "llama",
    *,
    texts: list[str] = THINK,
    settings: LoraSettings | None = None,
    load_in: Any = "as-trained",
    **changes: Any,
) -> LoadedModel:
    """An adapter in folder/adapter on folder/base, every weight of it moved."""
    import torch

    write_model(folder / "base", kind, **changes)
    loaded = load_model(folder / "base", purpose="lora", device="cpu", load_in=load_in)
    tokens, _ = add_tokens(loaded.tokenizer, texts)
    make_room(loaded.model, num_ids(loaded.tokenizer))
    settings = settings or LoraSettings(r=2, dropout=0.0)
    loaded = add_lora(loaded, settings, seed=0, new_tokens=tokens)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save_model(loaded, PromptContract.load(loaded.tokenizer), folder / "adapter")
    return loaded


ROWS = [(list(range(16)), [1] * 16), ([*range(5), 261, 262, *range(70, 80)], [1] * 17)]


def apart(one: LoadedModel, other: LoadedModel) -> Any:
    return agreement(measure(one, ROWS), measure(other, ROWS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_is_the_adapter_in_float32(tmp_path: Path, kind: str, tied: bool) -> None:
    import torch

    adapter = trained(tmp_path, kind, tie_word_embeddings=tied)
    made = write_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    assert (made.report.dtype, made.report.cast_error) == ("float32", None)
    assert head_is_tied(merged.transformers_model) is tied
    found = apart(adapter, merged)
    # float32: x @ W + x @ A @ B against x @ (W + A @ B).
    assert found.max_difference is not None
    assert found.max_difference < 2e-5 * max(found.spread or 0, 1)
    assert found.greedy == 1
    head, embedding = merged.model.get_output_embeddings(), merged.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    # Of the tables, the new rows moved and no other.
    base = load_model(tmp_path / "base", device="cpu", purpose="inference").model
    pairs = [(base.get_input_embeddings(), embedding), (base.get_output_embeddings(), head)]
    new = merged.tokenizer.convert_tokens_to_ids(THINK)
    old = [i for i in range(len(head.weight)) if i not in new]
    for before, after in pairs:
        assert torch.equal(before.weight[old], after.weight[old])
        assert (before.weight[new] != after.weight[new]).any(dim=1).all()


# Mean difference in units of the spread: a weight is rounded by 2**-9 of itself in bfloat16, by
# 2**-12 in float16.
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.03), ("float16", 0.004)])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapter_within_the_rounding(
    tmp_path: Path, kind: str, dtype: str, most: float
) -> None:
    import torch

    adapter = trained(tmp_path, kind, dtype=dtype, tie_word_embeddings=True)
    made = write_merged(tmp_path / "adapter", tmp_path / "merged")
    assert made.report.dtype == dtype
    assert [f.code for f in made.findings] == ["weights-rounded"]
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    assert merged.base_dtype == dtype
    found = apart(adapter, merged)
    assert found.relative is not None
    assert found.relative < most
    base = load_model(tmp_path / "base", device="cpu", purpose="inference").model
    old = slice(0, 261)
    assert torch.equal(
        base.get_input_embeddings().weight[old], merged.model.get_input_embeddings().weight[old]
    )


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_untied_where_one_side_changes(tmp_path: Path, target: str) -> None:
    settings = LoraSettings(r=2, dropout=0.0, target_modules=["q_proj", target])
    adapter = trained(tmp_path, texts=[], settings=settings, tie_word_embeddings=True)
    made = write_merged(tmp_path / "adapter", tmp_path / "merged")
    assert [f.code for f in made.findings] == ["head-untied"]
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    assert apart(adapter, merged).max_difference < 2e-5


def test_a_longer_table_is_merged_whole(tmp_path: Path) -> None:
    texts = [f"<{i}>" for i in range(6)]
    adapter = trained(tmp_path, texts=texts, tie_word_embeddings=True)
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    assert merged.findings == ()
    assert merged.model.config.vocab_size == 261 + 6
    assert apart(adapter, merged).max_difference < 2e-5


@pytest.mark.parametrize("kind", [{"rslora": True}, {"dora": True}])
def test_kinds_of_lora_are_merged(tmp_path: Path, kind: dict[str, bool]) -> None:
    adapter = trained(tmp_path, settings=LoraSettings(r=2, dropout=0.0, **kind))
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    assert apart(adapter, merged).max_difference < 2e-5


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_dequantised_first(tmp_path: Path, bits: str) -> None:
    adapter = trained(tmp_path, load_in=bits, hidden_size=64, intermediate_size=96)
    made = write_merged(tmp_path / "adapter", tmp_path / "merged")
    assert "dequantised" in made.onto
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    found = apart(adapter, merged)
    # LLM.int8 also rounds the inputs of each layer, which a plain layer does not.
    assert found.relative < (1e-5 if bits == "4bit" else 0.05)
    # Onto the original weights it is another model, and that is told.
    other = write_merged(tmp_path / "adapter", tmp_path / "original", onto="original")
    assert [f.code for f in other.findings] == ["merged-onto-other-weights"]
    onto_original = load_model(tmp_path / "original", device="cpu", purpose="inference")
    assert apart(adapter, onto_original).relative > found.relative


def test_the_folder_is_complete(tmp_path: Path) -> None:
    trained(tmp_path)
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert settings["eos_token_id"] == 257


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def break_adapter(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def swap_base(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "base/model.safetensors"
    tensors = {name: -tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def lose_base(folder: Path) -> None:
    (folder / "base").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (break_adapter, "merge-not-finite"),
        (swap_base, "adapter-wrong-base"),
        (cut_weights, "model-weights-damaged"),
        (lose_base, "adapter-no-base"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, harm: Callable[[Path], None], code: str) -> None:
    trained(tmp_path)
    harm(tmp_path)
    before = left(tmp_path)
    with pytest.raises(ModelError) as caught:
        export(str(tmp_path / "adapter"), tmp_path / "merged")
    assert caught.value.code == code
    assert left(tmp_path) == before


@pytest.mark.parametrize(
    ("onto", "code"), [("dequantised", "merge-not-quantised"), ("original", "")]
)
def test_onto_what_is_not_there(tmp_path: Path, onto: Any, code: str) -> None:
    trained(tmp_path)
    if code:
        with pytest.raises(UsageError) as caught:
            write_merged(tmp_path / "adapter", tmp_path / "merged", onto=onto)
        assert caught.value.code == code
    else:
        assert write_merged(tmp_path / "adapter", tmp_path / "merged", onto=onto).findings == ()


@needs_bitsandbytes
def test_a_base_that_is_stored_quantised(tmp_path: Path) -> None:
    """A folder as the Hub has many: bitsandbytes' own 4-bit files."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    write_model(tmp_path / "plain", hidden_size=64, intermediate_size=96)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    write_model(tmp_path / "base", hidden_size=64, intermediate_size=96)
    (tmp_path / "base/model.safetensors").unlink()
    packed.save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base", purpose="lora", device="cpu")
    loaded = add_lora(loaded, LoraSettings(r=2, dropout=0.0), seed=0)
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "adapter")
    with pytest.raises(UsageError) as caught:
        write_merged(tmp_path / "adapter", tmp_path / "merged", onto="original")
    assert caught.value.code == "merge-no-original"
    made = write_merged(tmp_path / "adapter", tmp_path / "merged")
    assert "the weights in the files (bitsandbytes)" in made.onto
    merged = load_model(tmp_path / "merged", device="cpu", purpose="inference")
    assert apart(loaded, merged).relative < 1e-5


@pytest.mark.usefixtures("in_this_process")
def test_a_merge_that_differs_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.exporting import merged as module

    trained(tmp_path)
    merge = module.merge_adapter

    def wrong(*given: Any, **settings: Any) -> Any:
        import torch

        made = merge(*given, **settings)
        weight = made.loaded.model.model.layers[0].mlp.down_proj.weight
        # What rounding to 4 bits does to a weight.
        with torch.no_grad():
            weight.copy_((weight * 4).round() / 4)
        return made

    monkeypatch.setattr(module, "merge_adapter", wrong)
    before = left(tmp_path)
    with pytest.raises(CheckFailed) as caught:
        export(str(tmp_path / "adapter"), tmp_path / "merged")
    (finding,) = caught.value.findings
    assert (finding.code, caught.value.exit_code) == ("verify-failed", 1)
    assert "the merged model compared with the adapter on 3 neutral prompts" in finding.what
    assert left(tmp_path) == before


@pytest.mark.usefixtures("in_this_process")
def test_another_adapter_is_told_apart_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that lacks 3 % differs by less than what any model may differ by, and by more
    than rounding costs this one; the adapter's own merge does not."""
    from safetensors.torch import load_file, save_file

    from truetune.exporting import merged as module

    trained(tmp_path, dtype="bfloat16")
    assert export(str(tmp_path / "adapter"), tmp_path / "merged").verdict.passed
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    path = tmp_path / "other/adapter_model.safetensors"
    tensors = {n: t * 0.97 if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    merge = module.merge_adapter
    monkeypatch.setattr(
        module, "merge_adapter", lambda _, **settings: merge(tmp_path / "other", **settings)
    )
    with pytest.raises(CheckFailed) as caught:
        export(str(tmp_path / "adapter"), tmp_path / "again")
    assert "logits differ by" in caught.value.findings[0].what
    assert not (tmp_path / "again").exists()


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    trained(tmp_path)
    before = left(tmp_path)
    monkeypatch.setattr("truetune.run.pipeline.verify_merge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(str(tmp_path / "adapter"), tmp_path / "merged")
    assert left(tmp_path) == before


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(OutputExists):
        export(str(tmp_path / "adapter"), tmp_path / "merged")
    with pytest.raises(UsageError) as caught:
        export(str(tmp_path / "base"), tmp_path / "new")
    assert caught.value.code == "merge-no-adapter"
    assert left(tmp_path) == {"base", "adapter", "merged"}


def test_a_whole_model_is_copied(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    data = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"{i}+1?", "completion": f"{i + 1}."} for i in range(40)],
    )
    shown = command(
        *("train", tmp_path / "base", data, "-o", tmp_path / "run", "--dtype", "float32"),
        *("--max-steps", 2, "--batch-size", 4),
    )
    assert shown.code == 0, shown.err
    told = command("export", tmp_path / "run", "--to", "merged", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    assert "a complete model, copied without merging" in told.out
    source = tmp_path / "run" / "model"
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    told = command(
        *("export", tmp_path / "run", "--to", "merged", "-o", tmp_path / "half", "--json"),
        *("--dtype", "bfloat16"),
    )
    assert (told.code, json.loads(told.out)["passed"]) == (0, True)
    assert load_model(tmp_path / "half").base_dtype == "bfloat16"
    # Not what the run saved.
    with (source / "config.json").open("a") as file:
        file.write(" ")
    told = command("export", tmp_path / "run", "--to", "merged", "-o", tmp_path / "other")
    assert told.code == 1
    assert "config.json" in told.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", REFUSED)
def test_what_training_refuses_is_not_exported(tmp_path: Path, damage: str) -> None:
    """Copied as it lies, it would be served, or run code, or hold no weights."""
    change, code = REFUSED[damage]
    change(write_model(tmp_path / "base"))
    with pytest.raises(ModelError) as trained:
        load_model(tmp_path / "base")
    assert trained.value.code == code
    before = left(tmp_path)
    for to in ("merged", "vllm"):
        told = command("export", tmp_path / "base", "--to", to, "-o", tmp_path / "out")
        assert (told.code, f"[{code}]" in told.err) == (2, True), told.err
        assert left(tmp_path) == before


def test_code_and_pickles_stay_behind(tmp_path: Path) -> None:
    """Of an architecture that transformers has, the folder's own code is not needed."""
    base = write_model(tmp_path / "base")
    names = left(base)
    edit_json(
        base / "config.json",
        auto_map={"AutoModelForCausalLM": "own.Model"},
        custom_generate="own",
    )
    edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Words", None]})
    (base / "own.py").write_text("raise SystemExit")
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text("raise SystemExit")
    (base / "training_args.bin").write_bytes(b"\x80\x04N.")
    (base / "state").write_bytes(b"\x80\x04N.")
    os.mkfifo(base / "pipe")
    (base / "NOTICE").symlink_to("/dev/zero")
    (base / "LICENSE").write_text("Free.")
    (base / "model-q8_0.gguf").write_bytes(b"GGUF")
    told = command("export", base, "-o", tmp_path / "out")
    assert told.code == 0, told.err
    copied = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == names | {"LICENSE", "model-q8_0.gguf"}
    for name in ("own.py", "custom_generate/generate.py", "training_args.bin", "state", "pipe"):
        assert name in told.out
    # Nor what would look for the code, whoever writes the folder.
    loaded = load_model(base, purpose="inference", device="cpu")
    saved = save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "saved")
    assert "auto_map in config.json" in told.out
    assert "code-forgotten" in [finding.code for finding in saved.findings]
    for folder in (tmp_path / "out", tmp_path / "saved"):
        for name in ("config.json", "tokenizer_config.json"):
            assert not re.search("auto_map|custom_generate|own", (folder / name).read_text())


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    names = left(base)
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner" / "secret.txt").write_text("secret")
    for name in ("notes.txt", "LICENSE", "README.md", "more.safetensors"):
        (base / name).symlink_to("../outside/inner/secret.txt")
    (base / "assets").symlink_to("../outside")
    (base / "round").symlink_to(".")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("url = https://secret@host")
    (base / "NOTICE").symlink_to(".git/config")
    (base / "COPYING").symlink_to("TERMS")
    (base / "TERMS").write_text("Free.")
    # Weights lie on another disk, and the folder itself is known by another name.
    shutil.move(base / "model.safetensors", outside / "weights")
    (base / "model.safetensors").symlink_to(outside / "weights")
    (tmp_path / "alias").symlink_to("base")
    told = command("export", tmp_path / "alias", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    copied = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == names | {"COPYING", "TERMS"}
    assert not any("secret" in p.read_text("latin-1") for p in (tmp_path / "out").iterdir())
    for name in ("assets", "round", "NOTICE", "more.safetensors", "[weights-linked]"):
        assert name in told.out
    (base / "additional_chat_templates").symlink_to("../outside/inner")
    told = command("export", base, "-o", tmp_path / "other")
    assert (told.code, "[model-link-outside]" in told.err) == (2, True)


def test_a_folder_of_the_hub_cache_is_copied_whole(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    names = left(base)
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(base.iterdir()):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    told = command("export", snapshot, "-o", tmp_path / "out")
    assert (told.code, "links" in told.out) == (0, False), told.err
    assert left(tmp_path / "out") == names


def test_an_export_onto_a_full_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, to: Path) -> None:
        raise OSError(28, "No space left on device", str(to))

    base = write_model(tmp_path / "base")
    monkeypatch.setattr(shutil, "copyfile", full)
    told = command("export", base, "-o", tmp_path / "out")
    assert told.code != 0
    assert "cannot be copied: No space left on device\n" in told.err
    assert "free some space" in told.err
    assert left(tmp_path) == {"base"}


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template-refuses"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "template-out-of-bounds",
        ),
    ],
)
def test_a_template_that_no_server_should_render_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, code: str
) -> None:
    monkeypatch.setattr(sandbox, "DEADLINE", 2.0)
    base = write_model(tmp_path / "base", tokenizer=tiny_tokenizer(template))
    told = command("export", base, "-o", tmp_path / "out")
    assert (told.code, code in told.err) == (1, True), told.err
    assert left(tmp_path) == {"base"}


@pytest.mark.parametrize("how", [(), ("--lora",)])
def test_a_record_decides_where_the_manifest_is_gone(
    tmp_path: Path,
    how: tuple[str, ...],
    in_this_process: None,  # noqa: F811
) -> None:
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    data = write_rows(tmp_path / "rows.jsonl", sums(40))
    shown = command(
        *("train", write_model(tmp_path / "base"), data, "-o", run, "--dtype", "float32"),
        *("--max-steps", 2, "--batch-size", 4, *how),
    )
    assert shown.code == 0, shown.err
    (run / "manifest.json").unlink()
    told = command("export", run, "-o", tmp_path / "out")
    assert told.code == 0, told.err
    folder = run / ("adapter" if how else "model")
    path = folder / ("adapter_model.safetensors" if how else "model.safetensors")
    tensors = load_file(path)
    if how:
        # Where the base lies now is not what was trained.
        (tmp_path / "base").rename(tmp_path / "moved")
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
        assert command("export", run, "-o", tmp_path / "again").code == 0
        tensors[min(tensors)][0, 0] += 1
    else:
        one, two = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
        tensors[one], tensors[two] = tensors[two] + 0.5, tensors[one]
    save_file(tensors, path, metadata={"format": "pt"})
    before = left(tmp_path)
    for to in ("merged", "vllm"):
        told = command("export", run, "--to", to, "-o", tmp_path / "other")
        assert (told.code, path.name in told.err) == (1, True), told.err
        assert left(tmp_path) == before


def test_what_can_be_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.gguf").touch()
    for source, output, code in (
        ("nowhere", "there", "output-exists"),
        ("a.gguf", "new", "export-source"),
    ):
        for to in ("merged", "vllm"):
            told = command("export", tmp_path / source, "--to", to, "-o", tmp_path / output)
            assert told.code == 2
            assert f"[{code}]" in told.err


def test_from_the_command_line_through_a_fresh_process(tmp_path: Path) -> None:
    write_model(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=True)
    rows = [{"prompt": f"{i}+1?", "completion": f"<think>a</think>{i + 1}."} for i in range(110)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    shown = command(
        *("train", tmp_path / "base", data, "--lora", "-o", tmp_path / "run"),
        *("--max-steps", 3, "--batch-size", 4, "--eval-steps", 3),
        *("--add-token", "<think>", "--add-token", "</think>"),
    )
    assert shown.code == 0, shown.err
    wrong = command("export", tmp_path / "run", "--merge", "--onto", "x", "-o", tmp_path / "merged")
    assert (wrong.code, "unknown weights 'x'" in wrong.err) == (2, True)
    shown = command("export", tmp_path / "run", "-o", tmp_path / "merged")
    assert shown.code == 0, shown.err
    assert "merged onto the base's original weights, in float32; saved in bfloat16" in shown.out
    assert "the adapter on 6 held-out prompts; logits differ" in shown.out
    verdict = json.loads((tmp_path / "merged/verify.json").read_text())
    assert verdict["passed"]
    assert verdict["artifact"] == str(tmp_path / "merged")
    (check,) = [c for c in verdict["checks"] if c["name"] == "merge"]
    assert {"max_difference", "mean_difference", "greedy", "same_replies"} <= set(check["numbers"])
    answered = command("chat", tmp_path / "merged", "--prompt", "1+1?", "--max-new-tokens", 2)
    assert answered.code == 0, answered.err
    edit_json(tmp_path / "run/adapter/adapter_config.json", base_model_name_or_path="nowhere")
    moved = ("--base", tmp_path / "base", "--no-verify", "--json", "--dtype", "float32")
    shown = command("export", tmp_path / "run", "--merge", "-o", tmp_path / "again", *moved)
    assert shown.code == 0, shown.err
    assert json.loads(shown.out) == {
        "passed": None,
        "checks": [],
        "artifact": str(tmp_path / "again"),
        "onto": "the base's original weights",
    }
    assert load_model(tmp_path / "again").base_dtype == "float32"


def test_two_exports_into_one_folder(tmp_path: Path, in_this_process: None) -> None:  # noqa: F811
    """The second one is refused before it computes, and what a killed one left is swept."""
    trained(tmp_path)
    output, caught = tmp_path / "merged", []

    class Second(Listener):
        def stage(self, name: str) -> None:
            if name != "merging":
                return

            def attempt() -> None:
                try:
                    export(str(tmp_path / "adapter"), output)
                except UsageError as error:
                    caught.append(error.code)

            # A thread stands for another process: locks are a thread's.
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()

    (tmp_path / ".merged.unverified").mkdir()
    (tmp_path / ".merged.unverified" / "model.safetensors").write_text("half of it")
    export(str(tmp_path / "adapter"), output, listener=Second())
    assert caught == ["output-busy"]
    with pytest.raises(OutputExists):
        export(str(tmp_path / "adapter"), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_folder_that_appears_meanwhile_is_left_alone(
    tmp_path: Path,
    in_this_process: None,  # noqa: F811
) -> None:
    trained(tmp_path)
    output = tmp_path / "merged"

    class Appears(Listener):
        def stage(self, name: str) -> None:
            if name.startswith("verifying"):
                output.mkdir()
                (output / "precious").write_text("somebody's")

    with pytest.raises(OutputExists, match="already exists"):
        export(str(tmp_path / "adapter"), output, listener=Appears())
    assert [path.name for path in output.iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_merged_is_the_default_and_types_may_be_in_capitals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of Python's export; llama.cpp writes its types in capitals."""
    write_model(tmp_path / "model")
    told = command("export", tmp_path / "model", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    assert (tmp_path / "out" / "config.json").is_file()
    asked: Any = {
        "merge": False,
        "onto": "auto",
        "no_verify": False,
        "dtype": "auto",
        "go_template": False,
        "adapter": False,
        "source": str(tmp_path / "model"),
    }
    # mlx_lm need not be installed: what it would be asked for is looked at.
    types: list[str] = []
    monkeypatch.setattr("truetune.exporting.mlx.require_mlx", types.append)
    kind = require_export("mlx", quant="4BIT", output=str(tmp_path / "mlx"), **asked)
    assert (kind, types) == (("mlx", "4bit"), ["4bit"])
    told = command("export", tmp_path / "model", "-o", "")
    assert (told.code, "[export-folder]" in told.err) == (2, True)
