"""Sides of the benchmark on a tiny model: the same rows give the same losses."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_tokenizer, write_model

BENCH = Path(__file__).parents[1] / "bench"
ROWS = [([1 + (3 * i + j) % 90 for j in range(n)], [0] * 3 + [1] * (n - 3)) for i, n in
        enumerate((9, 14, 7, 20, 11, 16))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_has_the_losses_of_trl(
    quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    if quantised:
        pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(BENCH))
    sides, jobs = (importlib.import_module(name) for name in ("one_side", "workloads"))
    # Blocks of 64 weights, as four bits have them.
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    folder = write_model(tmp_path / "m", tokenizer=tiny_tokenizer(), **wide)
    job = jobs.Job("tiny", True, "float32", 2, None, learning_rate=1e-3, quantised=quantised)
    # Dropout is drawn in another order.
    own = importlib.import_module("truetune.model.lora")
    plain = own.LoraSettings
    monkeypatch.setattr(own, "LoraSettings", lambda **made: plain(**made | {"dropout": 0.0}))
    config = sides._lora_config

    def without_dropout() -> Any:
        made = config()
        made.lora_dropout = 0.0
        return made

    monkeypatch.setattr(sides, "_lora_config", without_dropout)
    first, second = (sides.SIDES[name](job, folder, ROWS) for name in ("truetune", "trl"))
    assert len(first.seconds) == len(second.seconds) == 3
    assert first.losses[1] == pytest.approx(second.losses[1], rel=1e-3)


def test_peers_are_named_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has an environment of its own, and a reason where it is not installed."""
    monkeypatch.syspath_prepend(str(BENCH))
    compare, sides = (importlib.import_module(name) for name in ("compare", "one_side"))
    assert set(compare.ON_GPU) <= set(sides.SIDES)
    assert {"unsloth", "axolotl"} <= {*compare.ON_GPU} & {*compare.INTERPRETERS}
    assert any(job.quantised and job.device == "cuda" for job in compare.GPU_JOBS.values())
    assert sys.modules.get("unsloth") is None
