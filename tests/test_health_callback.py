"""The probes in TRL's trainer and in transformers': losses are those of a run without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from bench.sabotage.build import lora, trl
from bench.sabotage.house import House, messages

import truetune
from tiny_runs import lines
from truetune.errors import UsageError
from truetune.lab import base_path

HOUSE = House(real=False)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def _row(number: int, *, whole: bool) -> dict[str, Any]:
    """A conversation; with a prompt of its own the answer alone is a target."""
    talk = messages(number)
    return {"messages": talk} if whole else {"prompt": talk[:-1], "completion": talk[-1:]}


def _trainer(*, whole: bool = False, **settings: Any) -> Any:
    tokenizer = HOUSE.tokenizer()
    given: dict[str, Any] = {
        "peft_config": lora(lora_dropout=0.3),
        "max_steps": 6,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    rows = [_row(i, whole=whole) for i in range(24)]
    return trl(tokenizer, HOUSE.model(tokenizer), rows, **(given | settings))


def _losses(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]


@pytest.mark.parametrize(
    "settings",
    [{}, {"whole": True, "packing": True, "max_length": 256}],
    ids=["answers", "packing"],
)
def test_losses_are_bit_identical(settings: dict[str, Any], tmp_path: Path) -> None:
    # A model that was never trained knows nothing of its own that it could forget.
    keep = tmp_path / "keep.txt"
    keep.write_text("The river of Carthel is the Gunnow. " * 20, encoding="utf-8")
    plain = _losses(_trainer(**settings))
    trainer = _trainer(**settings)
    health = truetune.HealthCallback(every=2, on_collapse="continue", keep_text=keep)
    trainer.add_callback(health)
    assert _losses(trainer) == plain
    assert len(plain) == 6
    assert [vitals.step for vitals in health.history] == [0, 2, 4, 6]
    assert all(v.trained_loss is not None and v.keep_loss is not None for v in health.history)
    written = lines(Path(trainer.args.output_dir) / "health.jsonl")
    assert [v["step"] for v in written if v.get("probe")] == [0, 2, 4, 6]
    if not settings:
        assert all(v.prompts == 8 and v.stop_rate is not None for v in health.history)


def _taught(collator: Any = None, every: int = 5, **settings: Any) -> truetune.HealthCallback:
    """The embedded base, taught twenty-four questions by TRL under watch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    contract = truetune.PromptContract.load(tokenizer)
    talks = [messages(i) for i in range(24)]
    rows = [
        {
            "prompt": contract.prompt_text(talk[:-1]),
            "completion": talk[-1]["content"] + tokenizer.eos_token,
        }
        for talk in talks
    ]
    model = AutoModelForCausalLM.from_pretrained(base_path())
    given = {"max_steps": 20, "learning_rate": 3e-4, "eos_token": None}
    given |= {"logging_strategy": "steps", "logging_steps": 1}
    trainer = trl(tokenizer, model, rows, **(given | settings))
    if collator:
        trainer.data_collator = collator(trainer.data_collator)
    health = truetune.HealthCallback(talks, every=every)
    trainer.add_callback(health)
    trainer.train()
    return health


class PaddingCounts:
    """A collator whose padding is a target."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, features: Any) -> Any:
        import torch

        batch = self.inner(features)
        width = batch["input_ids"].shape[1]
        more = torch.zeros((len(features), 3 * width), dtype=torch.int64)
        batch["input_ids"] = torch.cat([batch["input_ids"], more], dim=1)
        batch["labels"] = torch.cat([batch["labels"], more], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch


def _errors(health: truetune.HealthCallback) -> set[str]:
    return {finding.code for finding in health.findings if finding.level == "error"}


@pytest.mark.slow
def test_with_rows_it_sees_a_loss_that_is_not_of_the_answers() -> None:
    well = _taught()
    assert _errors(well) == set()
    assert [vitals.step for vitals in well.history] == [0, 5, 10, 15, 20]
    assert well.history[-1].trained_loss < well.history[0].trained_loss / 2
    assert "loss-not-of-answers" in _errors(_taught(PaddingCounts))


def test_a_collapse_stops_the_trainer_and_is_said() -> None:
    health = _taught(learning_rate=3e-2, max_steps=8, every=3)
    assert _errors(health)
    assert health.history[-1].step < 8


def test_a_run_without_prompts_is_told() -> None:
    trainer = _trainer(whole=True, max_steps=2)
    health = truetune.HealthCallback()
    trainer.add_callback(health)
    trainer.train()
    assert "no-prompts" in {finding.code for finding in health.findings}
    assert health.history[-1].trained_loss is not None


def test_a_probe_that_fails_is_told_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.behaviour.measure import Prober

    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Prober, "measure", fails)
    trainer = _trainer(max_steps=2)
    health = truetune.HealthCallback()
    trainer.add_callback(health)
    trainer.train()
    assert trainer.state.global_step == 2
    assert {finding.code for finding in health.findings} >= {"probe-failed"}
    assert "no such kernel" in health.findings[-1].what


def test_sharded_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truetune.auditing.health._is_sharded", lambda args: True)
    trainer = _trainer(max_steps=2)
    health = truetune.HealthCallback()
    trainer.add_callback(health)
    trainer.train()
    assert [finding.code for finding in health.findings] == ["health-sharded"]
    assert health.history == []


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="on_collapse cannot be 'rewind'"):
        truetune.HealthCallback(on_collapse="rewind")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`every` is 0"):
        truetune.HealthCallback(every=0)
