"""The audit before a run of TRL: the losses are those of a run without it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from bench.sabotage.build import lora, trl
from bench.sabotage.house import House, messages

import truetune

HOUSE = House(real=False)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def _trainer(**settings: Any) -> Any:
    tokenizer = HOUSE.tokenizer()
    rows = [{"messages": messages(i)} for i in range(24)]
    return trl(
        tokenizer,
        HOUSE.model(tokenizer),
        rows,
        peft_config=lora(lora_dropout=0.3),
        eval_dataset=[{"messages": messages(i)} for i in range(100, 108)],
        max_steps=4,
        logging_strategy="steps",
        logging_steps=1,
        learning_rate=1e-2,
        gradient_accumulation_steps=2,
        **settings,
    )


def _losses(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2},
        {"packing": True, "max_length": 256, "per_device_train_batch_size": 2},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["workers", "packing", "grouped"],
)
def test_losses_are_bit_identical(settings: dict[str, Any]) -> None:
    plain = _losses(_trainer(**settings))
    trainer = _trainer(**settings)
    report = truetune.audit(trainer)
    assert report.ok, str(report)
    assert trainer._metrics["eval"] == {}
    assert _losses(trainer) == plain
    assert len(plain) == 4
