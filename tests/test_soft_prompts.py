"""Prompt tuning, prefix tuning and p-tuning: audited while they are trained, checked when saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.sabotage.build import Batches, dataset, hf, loader, on_answer, padded
from bench.sabotage.house import House, messages
from bench.sabotage.run import audited

from truetune.findings import Finding
from truetune.listener import Listener
from truetune.recipe.settings import Recipe
from truetune.run.checkup import check_model

HOUSE = House(real=False)
KINDS = ("prompt", "prefix", "p-tuning")


def _config(kind: str, number: int = 5) -> Any:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    made = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}.get(
        kind, PromptEncoderConfig
    )
    return made(task_type="CAUSAL_LM", num_virtual_tokens=number)


def _model(tokenizer: Any, kind: str, number: int = 5, **changes: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(HOUSE.model(tokenizer, **changes), _config(kind, number))


def _found(subject: Any) -> dict[str, Finding]:
    return {f.code: f for f in audited(subject).findings}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_is_told_and_raises_nothing(kind: str) -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(12)]
    trainer = hf(
        tokenizer,
        _model(tokenizer, kind),
        dataset(rows),
        lambda batch: padded(tokenizer, batch),
        learning_rate=0.05,
        gradient_accumulation_steps=2,
    )
    found = _found(trainer)
    assert [f.code for f in found.values() if f.level != "note"] == []
    longest = max(len(row["input_ids"]) for row in rows)
    assert f"{longest + 5:,}" in found["soft-prompt"].what
    trainer.train()


def _trainer(kind: str, **settings: Any) -> Any:
    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(8)]
    collate = lambda batch: padded(tokenizer, batch)  # noqa: E731
    settings = {"learning_rate": 0.05, "max_steps": 1, **settings}
    return hf(tokenizer, _model(tokenizer, kind), dataset(rows), collate, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_lost_where_activations_are_recomputed(kind: str, recomputed: bool) -> None:
    """What the audit says of gradient checkpointing is what training does with it."""
    trainer = _trainer(kind, gradient_checkpointing=recomputed)
    before = {name: dict(vars(m)) for name, m in trainer.model.named_modules()}
    found = _found(trainer)
    assert {name: dict(vars(m)) for name, m in trainer.model.named_modules()} == before
    assert ("soft-prompt-recomputed" in found) == (recomputed and kind == "prefix")
    if "soft-prompt-recomputed" in found:
        assert found["soft-prompt-recomputed"].level == "error"
        with pytest.raises(RuntimeError):
            trainer.train()
    else:
        trainer.train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "rate", "low"),
    [
        ("prompt", 1e-5, True),
        ("prefix", 1e-5, True),
        ("prompt", 3e-3, False),
        # A network computes the virtual tokens, and takes the rates of networks.
        ("p-tuning", 1e-5, False),
    ],
)
def test_a_rate_at_which_a_soft_prompt_stays_where_it_was(
    kind: str, rate: float, low: bool
) -> None:
    found = _found(_trainer(kind, learning_rate=rate)).get("learning-rate-unusual")
    assert (found is not None) == low
    if found:
        assert "below the usual range for a soft prompt" in found.what
        assert found.fix == "set learning_rate=0.003 to 0.3"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("over", [True, False])
def test_rows_and_virtual_tokens_must_fit_the_context_together(over: bool) -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(6)]
    longest = max(len(row["input_ids"]) for row in rows)
    model = _model(tokenizer, "prompt", max_position_embeddings=longest + 5 - over)
    batches = loader(rows, lambda batch: padded(tokenizer, batch))
    found = _found(Batches(batches, tokenizer, model))
    assert ("virtual-tokens-overflow" in found) == over
    if over:
        assert found["virtual-tokens-overflow"].level == "error"
        assert f"max_length to {longest - 1}" in found["virtual-tokens-overflow"].fix


@pytest.mark.filterwarnings("ignore")
def test_packed_rows_see_each_other_behind_a_soft_prompt() -> None:
    """peft leaves the positions of the batch out, and the borders with them."""
    from transformers import DataCollatorWithFlattening

    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(8)]
    for model, leaks in ((_model(tokenizer, "prompt"), True), (HOUSE.model(tokenizer), False)):
        trainer = hf(tokenizer, model, dataset(rows), DataCollatorWithFlattening())
        found = _found(trainer)
        assert ("packing-not-isolated" in found) == leaks
        assert ("soft-prompt" in found) == leaks


def _saved(tmp_path: Path, kind: str) -> Path:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    tokenizer = HOUSE.tokenizer()
    base, folder = tmp_path / "base", tmp_path / "adapter"
    HOUSE.model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config(kind))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _checked(folder: Path) -> dict[str, Finding]:
    return {f.code: f for f in check_model(Recipe(model=str(folder)), Listener()).findings}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_soft_prompt_is_a_note(tmp_path: Path, kind: str) -> None:
    found = _checked(_saved(tmp_path, kind))
    assert "5 virtual tokens" in found["soft-prompt"].what
    assert not {"soft-prompt-unfit", "adapter-empty", "adapter-wrong-base"} & set(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_on_another_base_is_an_error(tmp_path: Path, kind: str) -> None:
    folder = _saved(tmp_path, kind)
    other = tmp_path / "other"
    tokenizer = HOUSE.tokenizer()
    HOUSE.model(tokenizer, hidden_size=32, num_hidden_layers=2).save_pretrained(other)
    tokenizer.save_pretrained(other)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(other)}
    path.write_text(json.dumps(config))
    found = _checked(folder)["soft-prompt-unfit"]
    assert found.level == "error"
    assert "but the base has" in found.what
