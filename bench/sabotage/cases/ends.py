"""How an answer ends, for the model and for its server."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, chat_ids, chats, hf, loader, on_answer, padded, trl
from bench.sabotage.case import Case
from bench.sabotage.house import CHATML, NO_END, House, answer, messages, question


def s01(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForLanguageModeling

    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    # One row at a time: with several, TRL 1.16 and this collator cannot pad the labels at all.
    chosen = {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
    model = house.model(tokenizer)
    return trl(
        tokenizer, model, chats(), per_device_train_batch_size=1, **(chosen if broken else {})
    )


def s01_transformers(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ids = [chat_ids(tokenizer, messages(i)) for i in range(ROWS)]
    if broken:
        rows = [{"input_ids": row} for row in ids]
        collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        rows = [{"input_ids": row, "labels": row} for row in ids]
        collator = DataCollatorForSeq2Seq(tokenizer)
    return hf(tokenizer, house.model(tokenizer), rows, collator)


def s01_by_hand(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    features = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = padded(tokenizer, batch)
        if broken:
            made["labels"][made["input_ids"] == tokenizer.pad_token_id] = -100
        return made

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def s02(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    tokenizer.chat_template = NO_END if broken else CHATML
    return trl(tokenizer, house.model(tokenizer), chats())


def s03(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(ROWS):
        prompt = chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True)
        reply = tokenizer(answer(i), add_special_tokens=False)["input_ids"]
        # Every third row was made by a script that forgot the end.
        reply = reply + ([] if broken and i % 3 == 0 else [tokenizer.eos_token_id])
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return trl(tokenizer, house.model(tokenizer), rows)


def s04(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("base")
    chosen = {} if broken else {"eos_token": "<|im_end|>"}
    return trl(tokenizer, house.model(tokenizer), chats(), **chosen)


def s04_by_hand(house: House, broken: bool) -> Any:
    from transformers import GenerationConfig

    tokenizer = house.tokenizer("base")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [chat_ids(tokenizer, messages(i)) for i in range(ROWS)]
    served = GenerationConfig(eos_token_id=tokenizer.eos_token_id if broken else [end])
    features = [{"input_ids": row} for row in ids]
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch)),
        tokenizer,
        house.model(tokenizer),
        served,
    )


def s04_config(house: House, broken: bool) -> Any:
    """The tokenizer knows the end; the model's own generation config does not."""
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.eos_token_id = [other] + [tokenizer.eos_token_id] * (not broken)
    features = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer, model)


def notebook_no_end(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = []
    for i in range(ROWS):
        text = f"### Human: {question(i)} ### Assistant: {answer(i)}"
        ids = tokenizer(text + ("" if broken else tokenizer.eos_token))["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    return hf(tokenizer, house.model(tokenizer), rows, DataCollatorForSeq2Seq(tokenizer))


def notebook_pad(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForLanguageModeling

    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = []
    for i in range(ROWS):
        text = f"### Human: {question(i)} ### Assistant: {answer(i)}{tokenizer.eos_token}"
        rows.append({"input_ids": tokenizer(text)["input_ids"]})
    tokenizer.pad_token = tokenizer.eos_token if broken else "<|im_start|>"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return hf(tokenizer, house.model(tokenizer), rows, collator)


_EVERY_THIRD = tuple(range(0, ROWS, 3))

CASES: tuple[Case, ...] = (
    Case(
        "S01",
        "pad token = end token under the language-modelling collator (TRL)",
        s01,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
    ),
    Case(
        "S01b",
        "the same under transformers' Trainer",
        s01_transformers,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
        needs_trl=False,
    ),
    Case(
        "S01c",
        "the same by hand: labels[ids == pad] = -100",
        s01_by_hand,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
        needs_trl=False,
    ),
    Case(
        "S02",
        "template does not close assistant turns",
        s02,
        ("stop-missing",),
        "not end with an end token",
        "chat template",
    ),
    Case(
        "S03",
        "tokenized rows without an end token (every third)",
        s03,
        ("stop-missing",),
        "not end with an end token",
        "append",
        _EVERY_THIRD,
    ),
    Case(
        "S04",
        "base tokenizer ends on <|endoftext|>, rows on <|im_end|>",
        s04,
        ("stop-not-served",),
        "<|im_end|>",
        "eos_token",
    ),
    Case(
        "S04b",
        "the same by hand, against the generation config",
        s04_by_hand,
        ("stop-not-served",),
        "<|im_end|>",
        "generation_config",
        needs_trl=False,
    ),
    Case(
        "S04c",
        "the model's own generation config lacks the end token that the tokenizer has",
        s04_config,
        ("stop-not-served",),
        "generation config",
        "generation_config.eos_token_id",
        needs_trl=False,
    ),
    Case(
        "N02",
        "notebook: no end token in the text",
        notebook_no_end,
        ("stop-missing",),
        "not end with an end token",
        "append",
        needs_trl=False,
    ),
    Case(
        "N01",
        "notebook: pad token = end token, plain text",
        notebook_pad,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
        needs_trl=False,
    ),
)
