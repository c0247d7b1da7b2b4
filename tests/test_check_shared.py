"""The check on real rows and real tokenizers: what it is expected to find, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from truetune.listener import Listener
from truetune.recipe.sources import make_recipe
from truetune.run.checkup import check_model, check_run

SHARED = Path(__file__).parents[2] / "shared"
pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs ../shared: real tokenizers and rows"
)

QWEN, QWEN_BASE, QWEN3 = "qwen2.5-0.5b-instruct", "qwen2.5-0.5b-base", "qwen3-0.6b"
LLAMA, PHI = "llama-3.2-1b-instruct", "phi-3.5-mini-instruct"

# (model, rows) -> code: (level, count). Anything else is a false alarm, anything less a miss.
EXPECTED: dict[tuple[str, str], dict[str, tuple[str, int]]] = {
    (QWEN, "gsm8k_train.jsonl"): {},
    (QWEN, "gsm8k_test.jsonl"): {},
    (QWEN, "alpaca_en_demo.json"): {
        "rows-duplicate": ("warning", 14),
        # An answer that does stop in the middle of a sentence.
        "answer-broken-off": ("note", 1),
    },
    (PHI, "alpaca_en_demo.json"): {
        "rows-duplicate": ("warning", 14),
        # An answer that does stop in the middle of a sentence.
        "answer-broken-off": ("note", 1),
        # All of 3.8 B weights, as nothing else was asked for.
        "advice-adapter-enough": ("note", 1),
    },
    (QWEN_BASE, "code_alpaca_2k.json"): {
        "empty-answer": ("warning", 2),
        "stop-added": ("note", 1),
    },
    (LLAMA, "self_instruct_seed_tasks.jsonl"): {
        "unused-columns": ("note", 2),
        "template-date": ("note", 1),
        "advice-adapter-enough": ("note", 1),
    },
    (QWEN3, "reason_tool_use_demo_50.jsonl"): {
        "tool-arguments": ("warning", 1),
        "advice-adapter-enough": ("note", 1),
        "advice-reasoning-rows": ("note", 1),
    },
    (QWEN, "glaive_toolcall_en_demo.json"): {
        "openers-mixed": ("note", 69),
        "rows-duplicate": ("warning", 34),
        "tool-arguments": ("warning", 1),
        "prompt-repeated": ("note", 39),
        "rows-nearly-duplicate": ("note", 8),
        # An answer that does stop in the middle of a sentence.
        "answer-broken-off": ("note", 1),
    },
    (QWEN_BASE, "wikitext2_valid.txt"): {
        "text-pieces": ("note", 201),
        "rows-split": ("note", 164),
        "stop-added": ("note", 1),
        "advice-text-knowledge": ("note", 1),
    },
}
SLOW = {
    (QWEN, "gsm8k_train.jsonl"),
    (QWEN, "gsm8k_test.jsonl"),
    (PHI, "alpaca_en_demo.json"),
    (QWEN_BASE, "code_alpaca_2k.json"),
    (QWEN, "glaive_toolcall_en_demo.json"),
    (QWEN, "alpaca_en_demo.json"),
    (QWEN_BASE, "wikitext2_valid.txt"),
}


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair in SLOW else [], id="-".join(pair))
        for pair in EXPECTED
    ],
)
def test_rows(model: str, rows: str) -> None:
    recipe = make_recipe(
        (
            "test",
            {
                "model": str(SHARED / "models" / model),
                "data": str(SHARED / "data" / rows),
                "bad_rows": "drop",
            },
        )
    )
    found = check_run(recipe, Listener()).findings
    # How much memory is free is a fact of the machine.
    told = {f.code: (f.level, f.count) for f in found if f.code != "memory-short"}
    assert told == EXPECTED[model, rows]


@pytest.mark.slow
def test_published_models_raise_no_error() -> None:
    """Small files only; what a base's template ends with is a fact that is told."""
    found = {}
    for name in (QWEN, QWEN_BASE, QWEN3, LLAMA, PHI):
        recipe = make_recipe(("test", {"model": str(SHARED / "models" / name)}))
        told = check_model(recipe, Listener())
        codes = {f.code: f.level for f in told.findings}
        found[name] = (told.summary["verdict"]["kind"], codes)
    small = {"model-no-weights": "note"}
    assert found == {
        QWEN: ("instruct", small),
        QWEN_BASE: ("base", {"stop-not-served": "warning", **small}),
        QWEN3: ("instruct", small),
        LLAMA: ("instruct", small),
        PHI: ("instruct", small),
    }
