"""What vLLM and SGLang load: the adapter where they can, else the merged model; never less than was
trained."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fresh_process import in_this_process  # noqa: F401  (a fixture)
from test_export import trained
from tiny_models import edit_json
from tiny_runs import command
from truetune.model.lora import LoraSettings
from truetune.model.served_adapter import adapter_line, why_merge

PLAIN = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("more", "facts", "said"),
    [
        ({}, {}, ""),
        ({"r": 512, "use_rslora": True, "bias": "none", "rank_pattern": {}}, {}, ""),
        ({"modules_to_save": None, "trainable_token_indices": None, "use_dora": False}, {}, ""),
        ({"use_dora": True}, {}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, "whole layers"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, {}, "embeddings of new tokens"),
        ({}, {"new_tokens": True}, "embeddings of new tokens"),
        ({"bias": "all"}, {}, "biases"),
        ({"alpha_pattern": {"q_proj": 8}}, {}, "alpha_pattern"),
        ({"r": 1024}, {}, "rank 1024"),
        ({"peft_type": "IA3"}, {}, "not a LoRA"),
        ({}, {"quantised": True}, "rounded"),
        ({}, {"stops": ["<|end|>"]}, "does not stop on <|end|>"),
    ],
)
def test_an_adapter_is_judged_by_what_it_holds(more: Any, facts: Any, said: str) -> None:
    found = why_merge({**PLAIN, **more}, **facts)
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_the_lines_make_room_and_name_the_template() -> None:
    words = shlex.split(adapter_line("vllm", "my folder", "me/base", "abc", 20))
    assert words[:5] == ["vllm", "serve", "me/base", "--revision", "abc"]
    assert words[-2:] == ["--max-lora-rank", "32"]
    assert "tuned=my folder" in words
    assert "my folder/chat_template.jinja" in words
    assert "--max-lora-rank" not in adapter_line("vllm", "x", "b", None, 16)
    assert "--lora-paths tuned=x" in adapter_line("sglang", "x", "b", None, 16)


def test_a_plain_adapter_is_written_as_it_is(tmp_path: Path) -> None:
    trained(tmp_path, texts=[])
    (tmp_path / "adapter" / "trainer_state.safetensors").write_text("the state of a checkpoint")
    told = command("export", tmp_path / "adapter", "--to", "vllm", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    assert f"--lora-modules tuned={tmp_path / 'out'}" in told.out
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= written
    assert "trainer_state.safetensors" not in written
    for name in written:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    base = str((tmp_path / "base").resolve())
    assert base in told.out


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("why", ["new tokens", "DoRA", "does not stop on"])
def test_what_a_server_cannot_load_is_merged(tmp_path: Path, why: str) -> None:
    settings = LoraSettings(r=2, dropout=0.0, dora=why == "DoRA")
    trained(tmp_path, texts=["<think>"] if why == "new tokens" else [], settings=settings)
    if why == "does not stop on":
        edit_json(tmp_path / "base" / "generation_config.json", eos_token_id=3)
    told = command(
        *("export", tmp_path / "adapter", "--to", "sglang", "-o", tmp_path / "out", "--json")
    )
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert (found["merged"], found["passed"]) == (True, True)
    assert why in "".join(found["why"])
    # Both servers would round float32 weights to float16.
    assert found["serve"].endswith(f"{tmp_path / 'out'} --dtype float32")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert 257 in (ends if isinstance(ends, list) else [ends])


def test_what_is_whole_already_and_other_names(tmp_path: Path) -> None:
    trained(tmp_path, texts=[])
    # A whole model needs no merging: it is copied, and the line serves the copy.
    told = command("export", tmp_path / "base", "--to", "vllm", "-o", tmp_path / "whole")
    assert told.code == 0, told.err
    assert f"vllm serve {tmp_path / 'whole'} --dtype float32" in told.out
    assert (tmp_path / "whole" / "config.json").is_file()
    for name, fix in (("tgi", "text-generation-launcher"), ("lmstudio", "--to gguf")):
        told = command("export", tmp_path / "adapter", "--to", name, "-o", tmp_path / "out")
        assert told.code == 2
        assert fix in told.err
    assert not (tmp_path / "out").exists()
