"""Folders for MLX: mlx_lm makes of them what transformers makes of the model, or there are none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fresh_process import in_this_process  # noqa: F401  (a fixture)
from test_export import trained
from tiny_models import write_model
from tiny_runs import command
from truetune.errors import CheckFailed
from truetune.run.export_mlx import export_mlx

needs_mlx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlx", "mlx_lm")),
    reason="the mlx extra is missing",
)


@needs_mlx
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_float32_is_what_transformers_computes(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "model", kind, tie_word_embeddings=kind != "llama")
    made = export_mlx(str(tmp_path / "model"), tmp_path / "out", quant="f32")
    assert made.apart.relative < 1e-4
    assert made.apart.greedy == 1
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["holds"]
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


@needs_mlx
@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_is_merged_and_quantised(tmp_path: Path) -> None:
    trained(tmp_path, hidden_size=64, intermediate_size=128, head_dim=16)
    told = command(
        *("export", tmp_path / "adapter", "--to", "mlx", "--quant", "8bit", "-o", tmp_path / "out")
    )
    assert told.code == 0, told.err
    assert "mlx_lm.server --model" in told.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["proved_in_float32"]
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@needs_mlx
def test_a_folder_that_differs_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that mlx_lm converts is another model's than the one it is held to."""
    from truetune.run import export_mlx as room

    write_model(tmp_path / "model")
    write_model(tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    load = room.load_model
    monkeypatch.setattr(room, "load_model", lambda _, **more: load(str(tmp_path / "other"), **more))
    with pytest.raises(CheckFailed) as caught:
        export_mlx(str(tmp_path / "model"), tmp_path / "out", quant="f32")
    assert [f.code for f in caught.value.findings] == ["mlx-differs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]


def test_what_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    words = ("export", tmp_path / "model", "--to", "mlx", "-o", tmp_path / "out")
    for more, code in ((("--dtype", "float16"), "export-what"), (("--adapter",), "export-what")):
        told = command(*words, *more)
        assert told.code == 2
        assert f"[{code}]" in told.err
    if importlib.util.find_spec("mlx_lm") is not None:
        told = command(*words, "--quant", "8bits")
        assert told.code == 2
        assert "did you mean 8bit?" in told.err
    monkeypatch.setattr("truetune.exporting.mlx.importlib.util.find_spec", lambda _: None)
    told = command(*words)
    assert told.code == 2
    assert "truetune[mlx]" in told.err
    assert not (tmp_path / "out").exists()
