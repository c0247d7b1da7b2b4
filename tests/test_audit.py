"""`truetune.audit`: reading leaves no trace, and what it says of trainers and plain batches."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from bench.sabotage.build import Batches, chat_ids, hf, loader
from bench.sabotage.house import House, answer, messages
from torch.utils.data import DataLoader, Dataset, IterableDataset

import truetune
from tiny_models import TEMPLATE, tiny_model, tiny_tokenizer
from truetune.auditing.read import read_batches
from truetune.auditing.report import AuditReport
from truetune.auditing.state import untouched
from truetune.errors import CheckFailed, UsageError

HOUSE = House(real=False)


def _features(n: int = 24) -> list[dict[str, Any]]:
    tokenizer = HOUSE.tokenizer()
    return [
        {"input_ids": (ids := chat_ids(tokenizer, messages(i))), "labels": ids} for i in range(n)
    ]


def _collator(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer)


class NoisyRows(Dataset):  # type: ignore[type-arg]
    """Draws from every random source, and counts what was asked of it."""

    def __init__(self, features: list[dict[str, Any]]) -> None:
        self.features = features
        self.asked: list[int] = []
        self.own = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        drop = int(torch.randint(0, 3, (1,), generator=self.own)) + random.randint(0, 1)
        drop += int(np.random.randint(0, 2)) + int(torch.randint(0, 2, (1,)))
        row = self.features[index]
        return {k: v[drop:] for k, v in row.items()}


def _losses(trainer: Any) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def _noisy_trainer(workers: int) -> Any:
    tokenizer = HOUSE.tokenizer()
    model = HOUSE.model(tokenizer, attention_dropout=0.3)
    return hf(
        tokenizer,
        model,
        NoisyRows(_features()),
        _collator(tokenizer),
        max_steps=5,
        logging_strategy="steps",
        logging_steps=1,
        learning_rate=1e-2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        eval_dataset=_features(4),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_are_bit_identical_with_and_without_the_audit(workers: int) -> None:
    plain = _losses(_noisy_trainer(workers))
    trainer = _noisy_trainer(workers)
    report = truetune.audit(trainer)
    assert report.summary["rows"] == 24
    assert _losses(trainer) == plain
    assert len(plain) == 5


def test_the_audit_leaves_the_trainer_as_it_was() -> None:
    trainer = _noisy_trainer(0)
    trainer.model.lm_head.train(False)
    flags = [module.training for module in trainer.model.modules()]
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    before = {k: v for k, v in vars(trainer).items() if not callable(v)}
    config, generation = trainer.model.config.to_dict(), trainer.model.generation_config.to_dict()
    callbacks = list(trainer.callback_handler.callbacks)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    loaders = len(trainer.accelerator._dataloaders)
    truetune.audit(trainer)
    assert [module.training for module in trainer.model.modules()] == flags
    assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert {k: v for k, v in vars(trainer).items() if not callable(v)}.keys() == before.keys()
    assert trainer.model.config.to_dict() == config
    assert trainer.model.generation_config.to_dict() == generation
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.optimizer is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]
    assert len(trainer.accelerator._dataloaders) == loaders
    assert trainer.train_dataset.asked == []
    assert trainer.train_dataset.own.initial_seed() == 5
    fresh = torch.Generator().manual_seed(5)
    assert torch.equal(trainer.train_dataset.own.get_state(), fresh.get_state())


def test_a_loop_with_its_own_generator_sees_the_same_order() -> None:
    tokenizer = HOUSE.tokenizer()

    def made() -> Any:
        return DataLoader(
            _features(),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
            collate_fn=_collator(tokenizer),
        )

    plain, audited = made(), made()
    truetune.audit(audited, tokenizer)
    for ours, theirs in zip(plain, audited, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_untouched_puts_nested_state_back_in_place_and_after_an_error() -> None:
    class Counter:
        def __init__(self) -> None:
            self.seen = {"rows": [1, 2]}
            self.times = 0

    counter = Counter()
    inner = counter.seen["rows"]

    def disturb() -> None:
        with untouched([counter]):
            counter.seen["rows"].append(3)
            counter.seen["other"] = []
            counter.times = 9
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        disturb()
    assert counter.seen == {"rows": [1, 2]}
    assert counter.seen["rows"] is inner
    assert counter.times == 0


def test_untouched_restores_what_a_collator_keeps_in_its_closure() -> None:
    calls: list[int] = []
    rng = random.Random(1)

    def collate(rows: list[Any]) -> list[Any]:
        calls.append(rng.randint(0, 9))
        return rows

    first = random.Random(1).randint(0, 9)
    with untouched([collate]):
        collate([])
    assert calls == []
    assert rng.randint(0, 9) == first


# ------------------------------------------------------------------ reading


def test_rows_are_named_as_they_can_be_looked_up_whatever_the_sampler() -> None:
    tokenizer = HOUSE.tokenizer()
    data = loader(_features(10), _collator(tokenizer), 3)
    shuffled = DataLoader(
        data.dataset, batch_size=3, shuffle=True, collate_fn=data.collate_fn, drop_last=True
    )
    reading = read_batches(shuffled, name="rows", pad_id=tokenizer.pad_token_id, max_rows=100)
    assert len(reading.rows) == 9
    for row in reading.rows:
        assert row.name == f"rows[{row.index}]"
        assert row.ids[row.real != 0].tolist() == data.dataset[row.index]["input_ids"]


def test_large_data_is_read_evenly_and_the_summary_says_how_much() -> None:
    tokenizer = HOUSE.tokenizer()
    report = truetune.audit(loader(_features(40), _collator(tokenizer), 4), tokenizer, max_rows=8)
    assert report.summary["rows"] == 8
    assert "8 of 40 rows" in str(report)


def test_a_stream_is_read_again_and_an_iterator_is_refused() -> None:
    tokenizer = HOUSE.tokenizer()
    features = _features(8)

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(features)

    data = DataLoader(Stream(), batch_size=4, collate_fn=_collator(tokenizer))
    assert truetune.audit(data, tokenizer).summary["rows"] == 8
    assert len(list(data)) == 2
    with pytest.raises(UsageError, match="iterator"):
        truetune.audit(iter(data), tokenizer)

    class Once(IterableDataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.rows = iter(features)

        def __iter__(self) -> Any:
            return self.rows

    with pytest.raises(UsageError, match="iterator"):
        truetune.audit(DataLoader(Once(), batch_size=4), tokenizer)


def test_a_list_of_batches_and_pairs_of_tensors_are_read() -> None:
    tokenizer = HOUSE.tokenizer()
    batches = list(loader(_features(8), _collator(tokenizer), 4))
    assert truetune.audit(batches, tokenizer).ok
    pairs = [(b["input_ids"], b["labels"]) for b in batches]
    assert truetune.audit(pairs, tokenizer).ok


@pytest.mark.parametrize(
    ("source", "tokenizer", "says"),
    [
        ([{"pixel_values": torch.zeros(2, 3)}], True, "no input_ids"),
        ([], True, "yields no rows"),
        (3, True, "neither a trainer"),
        ([{"input_ids": torch.zeros(1, 3).long()}], False, "cannot be decoded without"),
    ],
)
def test_what_cannot_be_audited_is_refused(source: Any, tokenizer: bool, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        truetune.audit(source, HOUSE.tokenizer() if tokenizer else None)


def test_a_collator_that_fails_is_a_finding_and_its_rows_are_judged_alone() -> None:
    tokenizer = HOUSE.tokenizer()

    def stubborn(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")}

    report = truetune.audit(loader(_features(8), stubborn), tokenizer)
    failed = next(f for f in report.findings if f.code == "batch-fails")
    assert failed.count == 2
    assert failed.where == "dataset[0] to dataset[3]"
    assert report.summary["rows"] == 8


# ------------------------------------------------------------------ the report


def test_a_report_stops_a_script_and_reads_as_findings_do() -> None:
    tokenizer = tiny_tokenizer()
    ids = chat_ids(
        tokenizer, [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    )
    rows = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100] * len(ids)])}]
    report = truetune.audit(rows, tokenizer)
    assert not report.ok
    with pytest.raises(CheckFailed) as caught:
        report.raise_for_errors()
    assert "error[nothing-supervised]" in str(caught.value)
    assert caught.value.findings == list(report.findings)
    assert report.as_dict()["ok"] is False
    assert "nothing-supervised" in report.json()
    assert str(report).splitlines()[-1].startswith("audit: not ok (1 error")
    assert "<pre>" in report._repr_html_()


def test_a_clean_report_hands_itself_on_and_control_characters_are_shown() -> None:
    report = AuditReport((), {"text": "1 row"})
    assert report.raise_for_errors() is report
    assert str(report) == "audit: ok (nothing found; 1 row)"
    loud = truetune.Finding("x-y", "note", "a\x1b[31m red")
    assert "\x1b" not in str(AuditReport((loud,), {}))


def test_importing_truetune_and_naming_the_audit_loads_no_torch() -> None:
    code = (
        "import truetune, sys; assert 'torch' not in sys.modules; assert 'audit' in dir(truetune)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ pad and end


def test_pad_equal_to_end_is_harmless_where_labels_come_from_lengths() -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.pad_token = tokenizer.eos_token
    features = []
    for i in range(9):
        ids = chat_ids(tokenizer, messages(i))
        features.append({"input_ids": ids, "labels": ids})
    report = truetune.audit(loader(features, _collator(tokenizer)), tokenizer, tiny_model())
    assert [f.code for f in report.findings if f.level != "note"] == []


def test_the_stop_set_is_the_one_that_train_will_leave_behind() -> None:
    tokenizer = HOUSE.tokenizer("base")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    features = [
        {"input_ids": (ids := chat_ids(tokenizer, messages(i))), "labels": ids} for i in range(8)
    ]
    model = HOUSE.model(tokenizer)
    broken = truetune.audit(hf(tokenizer, model, features, _collator(tokenizer)))
    assert "stop-not-served" in broken.codes
    # The trainer writes its tokenizer's end token into the configs when it starts.
    tokenizer.eos_token = "<|im_end|>"
    mended = truetune.audit(hf(tokenizer, model, features, _collator(tokenizer)))
    assert mended.ok
    assert end in mended.summary["stop_ids"]
    assert model.generation_config.eos_token_id != end


def test_the_generation_config_that_is_named_is_what_counts() -> None:
    tokenizer = HOUSE.tokenizer()
    batches = list(loader(_features(8), _collator(tokenizer)))
    end = tokenizer.eos_token_id
    assert truetune.audit(batches, tokenizer, None, {"eos_token_id": [end, 3]}).ok
    assert (
        truetune.audit(batches, tokenizer, None, {"eos_token_id": 3}).codes[0] == "stop-not-served"
    )


def test_batches_of_answers_are_a_subject_too() -> None:
    tokenizer = HOUSE.tokenizer()
    subject = Batches(loader(_features(8), _collator(tokenizer)), tokenizer)
    report = truetune.audit(
        subject.loader,
        subject.tokenizer,
        evaluation=[
            {
                "input_ids": torch.tensor([_features(1)[0]["input_ids"]]),
                "labels": torch.tensor([_features(1)[0]["input_ids"]]),
            }
        ],
    )
    assert "eval-in-train" in report.codes
    assert answer(0) != answer(1)
