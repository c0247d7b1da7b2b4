"""What the data itself holds."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, chats, loader, on_answer, padded, trl
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages


def s19(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = chats()
    for i in (5, 17):
        written = "<|im_end|>\n<|im_start|>assistant" if broken else "< |im_end|>\n< |im_start|>"
        rows[i]["messages"][0]["content"] += f" They wrote: {written}"
    return trl(tokenizer, house.model(tokenizer), rows)


_SOME = (5, 17)


def s19_ids(house: House, broken: bool) -> Any:
    """Only ids reach the loop; an answer holds the end token as text."""
    tokenizer = house.tokenizer()
    talks = [messages(i) for i in range(ROWS)]
    for i in _SOME:
        said = talks[i][1]
        said["content"] = ("<|im_end|>" if broken else "An end:") + f" {said['content']}"
        said["content"] = "As they wrote " + said["content"]
    features = [on_answer(tokenizer, talk) for talk in talks]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def s19_header(house: House, broken: bool) -> Any:
    """Only ids reach the loop; a question ends with the markers of an answer."""
    tokenizer = house.tokenizer()
    talks = [messages(i) for i in range(ROWS)]
    for i in _SOME:
        talks[i][0]["content"] += (
            "<|im_end|>\n<|im_start|>assistant" if broken else "< |im_end|>\n< |im_start|>"
        )
    features = [on_answer(tokenizer, talk) for talk in talks]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def empty_answers(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    talks = [messages(i, reply=lambda k: "" if k in _SOME else answer(k)) for i in range(ROWS)]
    if not broken:
        talks = [talk for talk in talks if talk[1]["content"]]
    features = [on_answer(tokenizer, talk) for talk in talks]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def notebook_eval(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = chats(40)
    # Twelve rows for evaluation, drawn from all; the twin takes them out of the training rows.
    held_out = rows[::3][:12]
    train = rows if broken else [row for row in rows if row not in held_out]
    return trl(tokenizer, house.model(tokenizer), train, eval_dataset=held_out)


CASES: tuple[Case, ...] = (
    Case(
        "S19",
        "control tokens in a user's text",
        s19,
        ("control-token-in-content",),
        "<|im_",
        "break them up",
        _SOME,
    ),
    Case(
        "S19b",
        "the end token in the text of an answer, ids only",
        s19_ids,
        ("control-token-in-content",),
        "the text itself contains the token",
        "break it up",
        _SOME,
        needs_trl=False,
    ),
    Case(
        "S19c",
        "the markers of an answer in a user's text, ids only",
        s19_header,
        ("empty-answer",),
        "control tokens",
        "break them up",
        _SOME,
        needs_trl=False,
    ),
    Case(
        "L08",
        "empty answers",
        empty_answers,
        ("empty-answer",),
        "the data has an empty answer",
        "remove those rows",
        _SOME,
        needs_trl=False,
    ),
    Case(
        "N03",
        "notebook: evaluation rows drawn from the training rows",
        notebook_eval,
        ("eval-in-train",),
        "drawn from the training rows",
        "split",
        tuple(range(12)),
    ),
)
