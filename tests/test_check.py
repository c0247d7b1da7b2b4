"""The preflight: each finding has rows that bring it about, and rows that nearly do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tiny_models import tiny_tokenizer
from truetune.checks.preflight import Preflight, preflight
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.findings import Finding

PAD, END, USER, ASSISTANT = 256, 257, 258, 259
GOOD = SFTExample([USER, 65, ASSISTANT, 66, END], [0, 0, 0, 1, 1])


@pytest.fixture(scope="module")
def contract() -> PromptContract:
    return PromptContract.load(tiny_tokenizer())


def facts(contract: PromptContract, *examples: SFTExample, **changes: Any) -> Preflight:
    shown = examples or (GOOD,)
    plain = Preflight(
        contract=contract,
        examples=shown,
        rows=[f"rows.jsonl:{i}" for i in range(1, len(shown) + 1)],
        is_text=False,
        loss_on="assistant",
        head_rows=264,
        base_stop_ids=(END,),
        lora=False,
        learning_rate=1e-4,
        suggested_rate=1e-4,
        max_steps=100,
        warmup_steps=3,
    )
    return replace(plain, **changes)


def codes(found: list[Finding]) -> list[str]:
    return [finding.code for finding in found]


def masked(*mask: int) -> SFTExample:
    return SFTExample(GOOD.ids, list(mask))


Make = Callable[[PromptContract], Preflight]

# Per code: what brings it about, and what is as near to it as can be.
CASES: dict[str, tuple[list[Make], list[Make]]] = {
    "nothing-supervised": (
        [lambda c: facts(c, GOOD, masked(0, 0, 0, 0, 0))],
        [lambda c: facts(c, GOOD, masked(0, 0, 0, 0, 1))],
    ),
    "stop-not-supervised": (
        [
            lambda c: facts(c, GOOD, masked(0, 0, 0, 1, 0)),
            lambda c: facts(c, masked(1, 1, 1, 1, 0), loss_on="all"),
        ],
        [
            lambda c: facts(c, GOOD, GOOD),
            lambda c: facts(c, SFTExample([*GOOD.ids, USER, 65], [*GOOD.mask, 0, 0])),
            # What the template writes after the stop is a target too: the user said all.
            lambda c: facts(c, SFTExample([*GOOD.ids, 10], [1] * 6), loss_on="all"),
            # Plain text has no answer that could end.
            lambda c: facts(c, SFTExample([65, 66], [1, 1]), is_text=True),
        ],
    ),
    "stop-missing": (
        [
            # The answer was cut.
            lambda c: facts(c, SFTExample([USER, 65, ASSISTANT, 66], [0, 0, 0, 1])),
            # The stop is a target of an earlier turn only.
            lambda c: facts(c, SFTExample([*GOOD.ids, USER, ASSISTANT, 66], [*GOOD.mask, 0, 0, 1])),
        ],
        [
            lambda c: facts(c, GOOD, GOOD),
            lambda c: facts(c, SFTExample([65, 66], [1, 1]), is_text=True),
        ],
    ),
    "id-beyond-head": (
        [lambda c: facts(c, GOOD, head_rows=259)],
        [lambda c: facts(c, GOOD, head_rows=260)],
    ),
    "adapter-stop-unread": (
        [
            lambda c: facts(c, lora=True, base_stop_ids=(PAD,)),
            lambda c: facts(c, lora=True, base_stop_ids=()),
        ],
        [
            lambda c: facts(c, lora=True, base_stop_ids=(PAD, END)),
            # All weights bring their own generation_config.
            lambda c: facts(c, lora=False, base_stop_ids=(PAD,)),
        ],
    ),
    "learning-rate-unusual": (
        [
            lambda c: facts(c, learning_rate=1e-3),
            lambda c: facts(c, learning_rate=0.99e-5),
        ],
        [
            lambda c: facts(c, learning_rate=9.9e-4),
            lambda c: facts(c, learning_rate=1.1e-5),
        ],
    ),
    "warmup-too-long": (
        [lambda c: facts(c, warmup_steps=100), lambda c: facts(c, warmup_steps=101)],
        [
            lambda c: facts(c, warmup_steps=99),
            # A run of one step is a trial.
            lambda c: facts(c, warmup_steps=1, max_steps=1),
        ],
    ),
}


@pytest.mark.parametrize(
    ("code", "make"), [(code, make) for code, (bad, _) in CASES.items() for make in bad]
)
def test_found(contract: PromptContract, code: str, make: Make) -> None:
    found = [finding for finding in preflight(make(contract)) if finding.code == code]
    assert len(found) == 1
    assert found[0].what
    assert found[0].fix


@pytest.mark.parametrize(
    ("code", "make"), [(code, make) for code, (_, good) in CASES.items() for make in good]
)
def test_near_misses(contract: PromptContract, code: str, make: Make) -> None:
    assert code not in codes(preflight(make(contract)))


def test_a_sound_run_has_no_finding(contract: PromptContract) -> None:
    assert preflight(facts(contract, GOOD, GOOD)) == []


def test_the_first_place_and_the_count(contract: PromptContract) -> None:
    bad = masked(0, 0, 0, 1, 0)
    (finding,) = preflight(facts(contract, GOOD, bad, GOOD, bad))
    assert finding.code == "stop-not-supervised"
    assert finding.level == "error"
    assert (finding.where, finding.count) == ("rows.jsonl:2", 2)


def test_the_unread_stop_names_the_ids_to_serve_with(contract: PromptContract) -> None:
    (finding,) = preflight(facts(contract, lora=True, base_stop_ids=()))
    assert finding.level == "warning"
    assert "stop_token_ids=[257]" in finding.fix


def test_the_learning_rate_is_judged_both_ways(contract: PromptContract) -> None:
    (high,) = preflight(facts(contract, learning_rate=2e-3))
    (low,) = preflight(facts(contract, learning_rate=5e-6))
    assert "is 20 times the usual" in high.what
    assert "is 1/20 of the usual" in low.what
    assert high.fix == low.fix == "use --learning-rate 0.0001"
