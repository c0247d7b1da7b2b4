"""Which tokens are targets."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import (
    ROWS,
    Batches,
    answered,
    chat_ids,
    loader,
    on_answer,
    padded,
    trl,
)
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages, question


def s13(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]
    if broken:
        rows = [{**row, "labels": [*row["labels"][1:], -100]} for row in rows]
    return trl(tokenizer, house.model(tokenizer), rows)


def s13_inputs(house: House, broken: bool) -> Any:
    """Inputs and targets cut one token apart, as for a model that does not shift by itself."""
    tokenizer = house.tokenizer()
    ids = [chat_ids(tokenizer, messages(i)) for i in range(ROWS)]
    features = [
        {"input_ids": row[:-1], "labels": row[1:]} if broken else {"input_ids": row} for row in ids
    ]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def mixed_mask(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]
    for i in range(2, ROWS, 4):
        rows[i]["labels"] = rows[i]["input_ids"] if broken else rows[i]["labels"]
    return trl(tokenizer, house.model(tokenizer), rows)


def mask_turned(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(ROWS):
        ids, start = answered(tokenizer, messages(i))
        labels = ids[:start] + [-100] * (len(ids) - start)
        rows.append({"input_ids": ids, "labels": labels})
    if not broken:
        rows = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]
    return trl(tokenizer, house.model(tokenizer), rows)


def mask_too_long(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(ROWS):
        ids, start = answered(tokenizer, messages(i))
        start += 2 * broken
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return trl(tokenizer, house.model(tokenizer), rows)


def mask_made_once(house: House, broken: bool) -> Any:
    """Everything behind the first answer's header is a target, later questions too."""
    tokenizer = house.tokenizer()
    features = []
    for i in range(ROWS):
        talk = messages(i, turns=3)
        ids = chat_ids(tokenizer, talk)
        labels = [-100] * len(ids)
        for turn in (1, 3, 5):
            start = len(chat_ids(tokenizer, talk[:turn], add_generation_prompt=True))
            end = len(ids) if broken else len(chat_ids(tokenizer, talk[: turn + 1]))
            labels[start:end] = ids[start:end]
        features.append({"input_ids": ids, "labels": labels})
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def marker_absent(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    marker = tokenizer("### Response:" if broken else "<|im_start|>assistant\n")["input_ids"]
    features = []
    for i in range(ROWS):
        ids = chat_ids(tokenizer, messages(i))
        at = [k for k in range(len(ids)) if ids[k : k + len(marker)] == marker]
        start = at[-1] + len(marker) if at else len(ids)
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch)),
        tokenizer,
        house.model(tokenizer),
    )


def padding_trained(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    features = [{"input_ids": chat_ids(tokenizer, messages(i))} for i in range(ROWS)]
    pad = tokenizer.pad_token_id if broken else -100
    # Rows of a batch that are its longest have no padding.
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch, pad)),
        tokenizer,
        house.model(tokenizer),
    )


def padding_everywhere(house: House, broken: bool) -> Any:
    """Rows padded when they were tokenized, `labels = input_ids.copy()`, no attention mask."""
    import torch

    tokenizer = house.tokenizer()
    features = []
    for i in range(ROWS):
        ids = chat_ids(tokenizer, messages(i))
        gap = 128 - len(ids)
        features.append(
            {
                "input_ids": ids + [tokenizer.pad_token_id] * gap,
                "labels": ids + [tokenizer.pad_token_id if broken else -100] * gap,
            }
        )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: torch.tensor([f[k] for f in batch]) for k in ("input_ids", "labels")}

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def ignore_index(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    features = [{"input_ids": chat_ids(tokenizer, messages(i))} for i in range(ROWS)]
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch, -1 if broken else -100)),
        tokenizer,
        house.model(tokenizer),
    )


def left_pads_seen(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    features = [{"input_ids": chat_ids(tokenizer, messages(i))} for i in range(ROWS)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(f["input_ids"]) for f in batch)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for feature in batch:
            ids = feature["input_ids"]
            gap = longest - len(ids)
            rows["input_ids"].append([tokenizer.pad_token_id] * gap + ids)
            rows["attention_mask"].append([1 if broken else 0] * gap + [1] * len(ids))
            rows["labels"].append([-100] * gap + ids)
        return {name: torch.tensor(value) for name, value in rows.items()}

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def other_vocabulary(house: House, broken: bool) -> Any:
    """Rows tokenized for another model, whose ids all lie in this vocabulary."""
    tokenizer = house.tokenizer()
    other = house.tokenizer("bos") if house.real else _reordered(tokenizer)
    texts = [f"{question(i)} {answer(i, words=60)}{tokenizer.eos_token}" for i in range(ROWS)]
    rows = (other if broken else tokenizer)(texts)["input_ids"]
    features = [{"input_ids": [i for i in ids if i < len(tokenizer)]} for ids in rows]
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch)), tokenizer, house.model(tokenizer)
    )


def _reordered(tokenizer: Any) -> Any:
    """A tokenizer that splits alike and numbers its tokens from the other end."""

    def encode(texts: list[str]) -> dict[str, list[list[int]]]:
        most = tokenizer.vocab_size - 1
        rows = tokenizer(texts)["input_ids"]
        return {"input_ids": [[most - i if i <= most else i for i in ids] for ids in rows]}

    return encode


CASES: tuple[Case, ...] = (
    Case(
        "S13",
        "labels shifted by the user",
        s13,
        ("labels-misaligned",),
        "shifted",
        "do not shift",
    ),
    Case(
        "L01",
        "prompt masked in some rows only",
        mixed_mask,
        ("loss-mask-mixed",),
        "prompt",
        "all rows",
        tuple(i for i in range(ROWS) if i % 4 == 2),
    ),
    Case(
        "L01b",
        "inverted mask: prompts supervised, answers not",
        mask_turned,
        ("answers-masked",),
        "inverted",
        "-100 on the prompt",
    ),
    Case(
        "L01c",
        "mask two tokens too long: answers never begin",
        mask_too_long,
        ("answer-start-masked",),
        "too long",
        "generation prompt",
    ),
    Case(
        "S13b",
        "inputs and targets one token apart, for a model that shifts by itself",
        s13_inputs,
        ("labels-misaligned",),
        "shifted",
        "do not shift",
        needs_trl=False,
    ),
    Case(
        "L01d",
        "mask made once: the user's later turns are supervised too",
        mask_made_once,
        ("question-supervised",),
        "ends at the first answer",
        "every answer",
        needs_trl=False,
    ),
    Case(
        "L02",
        "response marker of another template: all labels -100",
        marker_absent,
        ("nothing-supervised",),
        "marker",
        "marks the answers",
        needs_trl=False,
    ),
    Case(
        "L03",
        "padding is supervised",
        padding_trained,
        ("padding-supervised",),
        "padding",
        "-100",
        None,
        needs_trl=False,
    ),
    Case(
        "L03b",
        "rows padded to one length, labels copied from the ids, no attention mask",
        padding_everywhere,
        ("padding-supervised",),
        "padding",
        "-100",
        needs_trl=False,
    ),
    Case(
        "L04",
        "ignored labels are -1",
        ignore_index,
        ("label-outside",),
        "-1",
        "-100",
        None,
        needs_trl=False,
    ),
    Case(
        "L05",
        "left padding that the attention mask does not hide",
        left_pads_seen,
        ("padding-attended",),
        "padding",
        "attention_mask",
        None,
        needs_trl=False,
    ),
    Case(
        "M06",
        "rows tokenized for another model, ids within range, a label on every token",
        other_vocabulary,
        ("ids-of-another-tokenizer",),
        "not made by this tokenizer",
        "tokenize the data again",
        needs_trl=False,
    ),
)
