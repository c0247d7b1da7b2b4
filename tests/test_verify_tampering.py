"""Healthy runs pass, tampered ones do not: a slice of `python -m bench.verify_matrix`, and all of
its tamperings in the slow suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.tampering import ADAPTER, BOTH, MODEL
from bench.verify_matrix import healthy, prepared_runs, tampered

# What hashes alone show: nothing that is read, computed or served is another. A rate that was
# edited after training, a bit of a record, a count.
BY_HASH_ALONE = {
    "rows: half of them removed",
    "contract: another template",
    "recipe: another rate",
    "data.json: another count",
}
# Of either kind, in bfloat16: found without manifest and without hashes, by what is predicted.
SLICE = {
    "model": ("weights: two norms swapped", "weights: an earlier checkpoint"),
    "adapter": ("adapter: one matrix zero", "adapter_config: alpha doubled"),
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind in bfloat16, beside its base."""
    return prepared_runs(tmp_path_factory.mktemp("runs"), "bfloat16")


@pytest.mark.parametrize("method", ["LoRA", "full", "adamw_bf16"])
def test_healthy_runs_in_bfloat16(method: str, tmp_path: Path) -> None:
    """The fresh process computes as the run did; another machine's kernels raise no alarm."""
    found = healthy(tmp_path, method, "bfloat16", "cpu", "llama", 0)
    assert found.failures == []
    assert found.bit_equal
    assert found.other_ratio < 1


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in SLICE.items() for n in names])
def test_changes_that_bfloat16_could_hide(
    homes: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    found = tampered(homes[kind], tmp_path, kind, name, (ADAPTER | MODEL)[name])
    assert found.manifest == ["files", "record"]
    assert found.record == ["record"]
    assert "logits" in found.behaviour


@pytest.mark.parametrize(
    "name",
    [
        "rows: emptied",
        "added file: pytorch_model.bin",
        "added file: Python code",
        "contract: another stop",
    ],
)
def test_records_and_strangers(homes: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = tampered(homes["adapter"], tmp_path, "adapter", name, BOTH[name])
    assert "files" in found.manifest
    assert found.record
    assert found.behaviour


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_tamperings(tmp_path: Path, dtype: str) -> None:
    homes = prepared_runs(tmp_path / "homes", dtype)
    through: dict[str, list[str]] = {"manifest": [], "record": [], "behaviour": []}
    for kind, table in (("adapter", BOTH | ADAPTER), ("model", MODEL)):
        for name, tamper in table.items():
            found = tampered(homes[kind], tmp_path, kind, name, tamper)
            for way, names in through.items():
                if not getattr(found, way):
                    names.append(name)
    assert through["manifest"] == through["record"] == []
    assert set(through["behaviour"]) <= BY_HASH_ALONE


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "LoRA", "DoRA", "new tokens"])
def test_healthy_runs(method: str, dtype: str, model: str, tmp_path: Path) -> None:
    assert healthy(tmp_path, method, dtype, "cpu", model, 1).failures == []
