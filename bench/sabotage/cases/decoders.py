"""Targets of encoder-decoders."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, hf, loader
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, question


def _decoder(house: House, tokenizer: Any, **changes: Any) -> Any:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {
        "vocab_size": len(tokenizer) + 8,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        return T5ForConditionalGeneration(T5Config(**(settings | changes)))


def _pairs(tokenizer: Any, *, ended: bool = True, started: bool = False) -> list[dict[str, Any]]:
    start = [tokenizer.pad_token_id] if started else []
    end = [tokenizer.eos_token_id] if ended else []
    return [
        {
            "input_ids": tokenizer(question(i))["input_ids"],
            "labels": [*start, *tokenizer(answer(i))["input_ids"], *end],
        }
        for i in range(ROWS)
    ]


def decoder_no_end(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    rows = _pairs(tokenizer, ended=not broken)
    model = _decoder(house, tokenizer)
    return hf(tokenizer, model, rows, DataCollatorForSeq2Seq(tokenizer, model=model))


def decoder_pads(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = _decoder(house, tokenizer)
    pad = tokenizer.pad_token_id if broken else -100
    collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=pad)
    return hf(tokenizer, model, _pairs(tokenizer), collator)


def decoder_leak(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = _decoder(house, tokenizer)
    plain = DataCollatorForSeq2Seq(tokenizer)

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = plain(features)
        if broken:
            filled = batch["labels"].clone()
            filled[filled == -100] = tokenizer.pad_token_id
            batch["decoder_input_ids"] = filled
        return batch

    return Batches(loader(_pairs(tokenizer), collate), tokenizer, model)


def decoder_doubled(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = _decoder(house, tokenizer)
    rows = _pairs(tokenizer, started=broken)
    return hf(tokenizer, model, rows, DataCollatorForSeq2Seq(tokenizer, model=model))


def decoder_start(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = _decoder(house, tokenizer)
    if broken:
        model.generation_config.decoder_start_token_id = tokenizer.eos_token_id
    return hf(tokenizer, model, _pairs(tokenizer), DataCollatorForSeq2Seq(tokenizer, model=model))


def decoder_shifted(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = _decoder(house, tokenizer)
    rows = _pairs(tokenizer)
    if broken:
        rows = [{**row, "labels": [*row["labels"][1:], -100]} for row in rows]
    return hf(tokenizer, model, rows, DataCollatorForSeq2Seq(tokenizer, model=model))


CASES: tuple[Case, ...] = (
    Case(
        "D01",
        "targets of an encoder-decoder without an end token",
        decoder_no_end,
        ("stop-missing",),
        "end token",
        "appends the end token",
        needs_trl=False,
    ),
    Case(
        "D02",
        "targets padded with the pad token",
        decoder_pads,
        ("padding-supervised",),
        "padding",
        "-100",
        None,
        needs_trl=False,
    ),
    Case(
        "D03",
        "decoder is shown the labels unshifted",
        decoder_leak,
        ("decoder-inputs",),
        "the labels themselves",
        "omit decoder_input_ids",
        None,
        needs_trl=False,
    ),
    Case(
        "D04",
        "labels begin with the decoder's start token",
        decoder_doubled,
        ("decoder-start-doubled",),
        "starts the decoder",
        "remove it",
        needs_trl=False,
    ),
    Case(
        "D05",
        "generation starts the decoder with a different token",
        decoder_start,
        ("decoder-start",),
        "generation starts it with",
        "generation_config",
        None,
        needs_trl=False,
    ),
    Case(
        "D06",
        "targets shifted before the model shifts them",
        decoder_shifted,
        ("target-start-lost",),
        "shifted away",
        "unshifted",
        needs_trl=False,
    ),
)
