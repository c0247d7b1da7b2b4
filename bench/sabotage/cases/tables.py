"""Rows of embedding and head that training cannot reach."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, chat_ids, chats, loader, lora, trl
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages


def _unused(tokenizer: Any, model: Any) -> list[int]:
    """Ids behind the tokenizer's last: rows that no text reaches."""
    return list(range(len(tokenizer), len(tokenizer) + 4))


def _copy_untrained(tokenizer: Any, model: Any) -> None:
    """As in base models: the chat token's rows are those of tokens that nothing was trained on."""
    import torch

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for row in _unused(tokenizer, model):
                table[row] = table[end]


def s05(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    _copy_untrained(tokenizer, model)
    saved = {} if broken else {"modules_to_save": ["embed_tokens", "lm_head"]}
    return trl(tokenizer, model, chats(), peft_config=lora(**saved))


def s05_tied(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer, tied=True)
    _copy_untrained(tokenizer, model)
    saved: dict[str, Any] = (
        {} if broken else {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    )
    return trl(tokenizer, model, chats(), peft_config=lora(**saved))


def s14(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|map|>", "<|place|>"]})
    rows = chats()
    for i in range(0, ROWS, 2):
        rows[i]["messages"][1]["content"] = f"<|map|>{answer(i)}<|place|>"
    saved = {} if broken else {"modules_to_save": ["embed_tokens", "lm_head"]}
    # The new tokens are meant to stand in the answers.
    return trl(tokenizer, model, rows, peft_config=lora(target_modules=["q_proj"], **saved))


def beyond_rows(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    new = [f"<|new_{i}|>" for i in range(200)]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    if not broken:
        model.resize_token_embeddings(len(tokenizer))
    rows = []
    for i in range(ROWS):
        ids = chat_ids(tokenizer, messages(i, reply=lambda k: answer(k) + new[-1]))
        rows.append({"input_ids": ids, "labels": ids})
    return Batches(loader(rows, DataCollatorForSeq2Seq(tokenizer)), tokenizer, model)


_HALF = tuple(range(0, ROWS, 2))

CASES: tuple[Case, ...] = (
    Case(
        "S05",
        "the end token's embeddings are untrained, and LoRA leaves them frozen",
        s05,
        ("token-row-untrained",),
        "never trained",
        "modules_to_save",
    ),
    Case(
        "S05b",
        "the same, embedding and head tied",
        s05_tied,
        ("token-row-untrained",),
        "never trained",
        "ensure_weight_tying",
    ),
    Case(
        "S14",
        "two new tokens in unused embeddings, LoRA on q_proj only",
        s14,
        ("new-token-frozen",),
        "added to the tokenizer",
        "modules_to_save",
        _HALF,
    ),
    Case(
        "M05",
        "new tokens beyond the model's embeddings",
        beyond_rows,
        ("id-beyond-head",),
        "exceeds",
        "resize",
        needs_trl=False,
    ),
)
