"""Targets of encoder-decoders that lost their first token, and targets that look as if they had."""

from __future__ import annotations

from typing import Any

import pytest
from bench.sabotage.cases.decoders import _decoder
from bench.sabotage.house import House, answer, question

import truetune
from tiny_contracts import byte_fallback, prefix_space
from truetune.findings import Finding

HOUSE = House(real=False)


def found(tokenizer: Any, pairs: list[tuple[str, str]], lost: int) -> Finding | None:
    """What the audit says of targets without their first `lost` tokens."""
    import torch

    batches = []
    for source, target in pairs:
        ids, said = tokenizer([source, target], add_special_tokens=False)["input_ids"]
        labels = [*said, tokenizer.eos_token_id][lost:]
        batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    report = truetune.audit(batches, tokenizer, _decoder(HOUSE, tokenizer))
    return next((f for f in report.findings if f.code == "target-start-lost"), None)


PAIRS = [(question(i), answer(i)) for i in range(12)]


@pytest.mark.parametrize("make", [HOUSE.tokenizer, prefix_space, byte_fallback])
def test_a_first_token_that_was_shifted_away(make: Any) -> None:
    tokenizer = make()
    lost = found(tokenizer, PAIRS, 1)
    assert lost is not None
    assert "shifted away" in lost.why
    assert found(tokenizer, PAIRS, 0) is None


@pytest.mark.parametrize(
    "pairs",
    [
        # They go on with a sentence that the source begins.
        [(question(i).rstrip("?"), " " + answer(i)[0].lower() + answer(i)[1:]) for i in range(12)],
        # Names of classes, with the space that some write in front.
        [(question(i), " positive" if i % 2 else " negative") for i in range(12)],
        # Lower case from the beginning on.
        [(question(i), answer(i).lower()) for i in range(12)],
    ],
    ids=["continued", "classes", "lower"],
)
def test_targets_that_begin_so_by_nature(pairs: list[tuple[str, str]]) -> None:
    for make in (HOUSE.tokenizer, prefix_space, byte_fallback):
        assert found(make(), pairs, 0) is None
