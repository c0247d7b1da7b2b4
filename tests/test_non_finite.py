"""The causes of a loss that is no number are told apart by computing the step's examples again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_models import write_model
from truetune.contract.example import SFTExample
from truetune.model.load import LoadedModel, load_model
from truetune.run.non_finite import find_cause

BROKEN = 70
EXAMPLES = {
    4: SFTExample([65, 66, 67, 68], [0, 0, 1, 1]),
    9: SFTExample([65, BROKEN, 67, 68], [0, 0, 1, 1]),
}


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load_model(str(write_model(tmp_path / "tiny")), device="cpu", dtype="float32")


def embedding(loaded: LoadedModel) -> torch.Tensor:
    return loaded.transformers_model.get_input_embeddings().weight.data


def test_a_row_of_a_broken_token_is_named(loaded: LoadedModel) -> None:
    embedding(loaded)[BROKEN] = torch.inf
    cause = find_cause(loaded, EXAMPLES, 5)
    assert cause.rows == (9,)
    assert "1 of the step's 2 examples" in cause.why
    assert "embed_tokens.weight contain" in cause.why


def test_weights_that_were_broken_before_the_first_step(loaded: LoadedModel) -> None:
    embedding(loaded)[BROKEN] = torch.nan
    cause = find_cause(loaded, EXAMPLES, 1)
    assert "before the first step" in cause.why
    assert cause.rows == (9,)


def test_weights_that_a_step_has_destroyed(loaded: LoadedModel) -> None:
    for parameter in loaded.model.parameters():
        parameter.data.fill_(torch.nan)
    cause = find_cause(loaded, EXAMPLES, 5)
    assert cause.rows == ()
    assert "an earlier step was too large" in cause.why
    assert "--learning-rate" in cause.fix


def test_numbers_that_float16_does_not_hold(loaded: LoadedModel) -> None:
    for name, parameter in loaded.model.named_parameters():
        if "down_proj" in name:
            parameter.data.mul_(1e7)
    narrow = replace(loaded, compute_dtype=torch.float16)
    cause = find_cause(narrow, EXAMPLES, 5)
    assert "overflows on 2 of the step's 2 examples" in cause.why
    assert cause.fix == "use --dtype float32"
    assert "gradient" in find_cause(loaded, EXAMPLES, 5).why


def test_examples_that_are_well_leave_the_gradient(loaded: LoadedModel) -> None:
    cause = find_cause(loaded, EXAMPLES, 5)
    assert cause.rows == ()
    assert "the gradient overflowed" in cause.why
