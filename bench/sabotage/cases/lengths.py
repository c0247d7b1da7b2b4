"""What a length limit takes away."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, chats, loader, on_answer, padded, trl
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages, question


def s07(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(ROWS):
        asked, said = question(i), answer(i)
        if i % 4 == 1:
            asked = answer(i, words=900) + " " + asked
        if i % 4 == 3:
            said = answer(i, words=700)
        rows.append(
            {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": said}],
            }
        )
    return trl(tokenizer, house.model(tokenizer), rows, max_length=400 if broken else None)


def s07_start(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = [
        {"messages": messages(i, reply=lambda k: answer(k, words=500 if k % 4 == 3 else 9))}
        for i in range(ROWS)
    ]
    chosen = {"max_length": 300, "truncation_mode": "keep_end"} if broken else {"max_length": None}
    return trl(tokenizer, house.model(tokenizer), rows, **chosen)


def _long_now_and_then(i: int) -> str:
    return answer(i, words=200 if i % 4 == 3 else 6 + i % 7)


def cut_by_hand(house: House, broken: bool) -> Any:
    """Rows cut in front, as a tokenizer with truncation_side="left" does."""
    tokenizer = house.tokenizer()
    features = [on_answer(tokenizer, messages(i, reply=_long_now_and_then)) for i in range(ROWS)]
    if broken:
        features = [{name: ids[-150:] for name, ids in row.items()} for row in features]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def cut_and_closed(house: House, broken: bool) -> Any:
    """`ids[:limit - 1] + [eos]`: every row ends, and some in the middle of a sentence."""
    tokenizer = house.tokenizer()
    features = [on_answer(tokenizer, messages(i, reply=_long_now_and_then)) for i in range(ROWS)]
    for row in features if broken else ():
        if len(row["input_ids"]) > 150:
            for name in row:
                row[name] = [*row[name][:149], tokenizer.eos_token_id]
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def s17(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = chats(reply=lambda i: answer(i, words=300 if i % 2 else 9))
    return trl(
        tokenizer,
        house.model(tokenizer),
        rows,
        packing=True,
        packing_strategy="bfd",
        max_length=200 if broken else 4096,
        per_device_train_batch_size=1,
    )


def thought_cut(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("thinking")

    def long_thought(i: int) -> str:
        words = 300 if i % 2 else 6
        return f"<think>\n{answer(i, words=words)}\n</think>\n\n{answer(i)}"

    return trl(
        tokenizer,
        house.model(tokenizer),
        chats(reply=long_thought),
        max_length=180 if broken else None,
    )


CASES: tuple[Case, ...] = (
    Case(
        "S07",
        "max_length cuts answers and drops rows",
        s07,
        ("answer-cut", "rows-dropped"),
        "limit",
        "raise",
        tuple(i for i in range(ROWS) if i % 4 in (1, 3)),
    ),
    Case(
        "S07b",
        "truncation that keeps the end loses the prompt",
        s07_start,
        ("prompt-cut",),
        "beginning",
        "raise the limit",
        tuple(range(3, ROWS, 4)),
    ),
    Case(
        "S07c",
        "rows cut at the beginning by hand",
        cut_by_hand,
        ("prompt-cut",),
        "beginning",
        "raise the limit",
        tuple(range(3, ROWS, 4)),
        needs_trl=False,
    ),
    Case(
        "S07d",
        "rows cut and closed with an end token",
        cut_and_closed,
        ("answer-cut",),
        "middle of a sentence",
        "never append an end token",
        tuple(range(3, ROWS, 4)),
        needs_trl=False,
    ),
    Case(
        "S17",
        "packing cuts long answers",
        s17,
        ("answer-cut",),
        "limit",
        "raise",
        None,
    ),
    Case(
        "L07",
        "thinking cut before it closes",
        thought_cut,
        ("reasoning-unclosed",),
        "cut",
        "raise the length limit",
        tuple(range(1, ROWS, 2)),
    ),
)
