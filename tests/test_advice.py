"""Advice: each note where it applies, and not one step beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_config, tiny_tokenizer
from tiny_runs import command, sums, write_rows
from truetune.recipe.advice import RULES, RunOutline, advise

# An instruct model of 3 B weights, an adapter on 2,000 conversations.
PLAIN = RunOutline(
    num_parameters=3 * 10**9,
    num_rows=2000,
    num_supervised=400_000,
    reasoning_share=0.0,
    start="instruct",
    lora=True,
    num_trainable=20_000_000,
    is_text=False,
)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "advice-few-rows": ({"num_rows": 49}, {"num_rows": 50}),
    "advice-reasoning-rows": (
        {"num_rows": 800, "reasoning_share": 0.9},
        {"num_rows": 800, "reasoning_share": 0.9, "num_parameters": 32 * 10**9},
    ),
    "advice-base-start": (
        {"num_rows": 999, "start": "base"},
        {"num_rows": 1000, "start": "base"},
    ),
    "advice-text-knowledge": (
        {"is_text": True, "start": "base", "num_rows": 40},
        {"is_text": True, "start": "base", "num_rows": 40, "num_supervised": 10**8, "lora": False},
    ),
    "advice-adapter-capacity": ({"num_supervised": 40_000_001}, {"num_supervised": 40_000_000}),
    "advice-adapter-enough": ({"lora": False}, {"lora": False, "num_rows": 10_000}),
}


def codes(changes: dict[str, Any]) -> list[str]:
    return [note.code for note in advise(dataclasses.replace(PLAIN, **changes))]


def test_nothing_to_say() -> None:
    assert codes({}) == []
    assert len(CASES) == len(RULES)


@pytest.mark.parametrize("code", CASES)
def test_where_it_applies_and_beside_it(code: str) -> None:
    here, beside = CASES[code]
    assert codes(here) == [code]
    assert codes(beside) == []
    (note,) = advise(dataclasses.replace(PLAIN, **here))
    assert note.level == "note"
    assert note.why
    # Nothing is known of models this small but what was measured here.
    assert codes({**here, "num_parameters": 49_999_999}) == []


def test_check_tells_it_before_any_weight_is_read(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8).save_pretrained(
        tmp_path / "base"
    )
    data = write_rows(tmp_path / "rows.jsonl", sums(40))
    shown = command("check", tmp_path / "base", data, "--lora")
    assert shown.code == 0, shown.err
    assert "note[advice-few-rows]: 40 rows" in shown.out


def test_the_page_that_notes_point_to_is_there() -> None:
    page = Path(__file__).parents[1] / "docs/choose.md"
    assert "Base or instruct?" in page.read_text(encoding="utf-8")
