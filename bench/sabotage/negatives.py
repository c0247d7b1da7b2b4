"""Hard negatives: what looks like a breakage and is none."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, chat_ids, chats, hf, loader, lora, padded, trl
from bench.sabotage.case import Negative
from bench.sabotage.house import House, answer, messages, question, thought


def pad_is_end(house: House) -> Any:
    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return trl(tokenizer, house.model(tokenizer), chats())


def two_stops(house: House) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    model.generation_config.eos_token_id = ends
    return trl(tokenizer, model, chats())


def spare_rows(house: House) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    assert len(tokenizer) < model.config.vocab_size
    return trl(tokenizer, model, chats(), peft_config=lora())


def left_padding(house: House) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    tokenizer.padding_side = "left"
    rows = [
        {"input_ids": (ids := chat_ids(tokenizer, messages(i))), "labels": ids} for i in range(ROWS)
    ]
    return hf(tokenizer, house.model(tokenizer), rows, DataCollatorForSeq2Seq(tokenizer))


def prompt_loss(house: House) -> Any:
    tokenizer = house.tokenizer()
    return trl(tokenizer, house.model(tokenizer), chats(turns=3))


def one_turn_thinking(house: House) -> Any:
    tokenizer = house.tokenizer("thinking")
    return trl(tokenizer, house.model(tokenizer), chats())


def reasoning_once(house: House) -> Any:
    tokenizer = house.tokenizer("thinking")
    return trl(tokenizer, house.model(tokenizer), chats(reply=thought))


def plain_text(house: House) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer("base")
    stream = [
        token
        for i in range(200)
        for token in [*tokenizer(answer(i, words=20))["input_ids"], tokenizer.eos_token_id]
    ]
    blocks = [stream[i : i + 64] for i in range(0, len(stream) - 64, 64)]
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    return hf(tokenizer, house.model(tokenizer), rows, DataCollatorForSeq2Seq(tokenizer))


def packed_apart(house: House) -> Any:
    from transformers import DataCollatorWithFlattening

    tokenizer = house.tokenizer()
    rows = []
    for i in range(ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return hf(tokenizer, house.model(tokenizer), rows, DataCollatorWithFlattening())


def trl_padding_free(house: House) -> Any:
    tokenizer = house.tokenizer()
    return trl(tokenizer, house.model(tokenizer), chats(), padding_free=True, max_length=None)


def completion_rows(house: House) -> Any:
    tokenizer = house.tokenizer()
    rows = [
        {
            "prompt": [{"role": "user", "content": question(i)}],
            "completion": [{"role": "assistant", "content": answer(i)}],
        }
        for i in range(ROWS)
    ]
    return trl(tokenizer, house.model(tokenizer), rows)


def clean_split(house: House) -> Any:
    tokenizer = house.tokenizer()
    rows = chats(40)
    return trl(tokenizer, house.model(tokenizer), rows[:32], eval_dataset=rows[32:])


def same_opening(house: House) -> Any:
    """Other questions behind the same long system prompt are not the same rows."""
    tokenizer = house.tokenizer()
    system = {"role": "system", "content": answer(3, words=60)}
    rows = [{"messages": [system, *row["messages"]]} for row in chats(40)]
    return trl(tokenizer, house.model(tokenizer), rows[:32], eval_dataset=rows[32:])


def new_tokens_trained(house: House) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|map|>"]})
    # Added and never used: nothing has to be learned.
    return trl(tokenizer, model, chats(), peft_config=lora())


def bos_once(house: House) -> Any:
    tokenizer = house.tokenizer("bos")
    return trl(tokenizer, house.model(tokenizer), chats(turns=2))


def angle_brackets(house: House) -> Any:
    tokenizer = house.tokenizer()
    rows = chats()
    rows[3]["messages"][0]["content"] += (
        " Is <b>bold</b> and a < b | c > d, [INST] or <|x|> special?"
    )
    return trl(tokenizer, house.model(tokenizer), rows)


def accumulated(house: House) -> Any:
    tokenizer = house.tokenizer()
    rows = chats(reply=lambda i: answer(i, words=(5, 60, 10, 90)[i % 4]))
    return trl(
        tokenizer,
        house.model(tokenizer),
        rows,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
    )


def base_with_own_form(house: House) -> Any:
    """A base model without a template, in a form of its own that ends."""
    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = [{"text": f"Q: {question(i)}\nA: {answer(i)}"} for i in range(ROWS)]
    return trl(tokenizer, house.model(tokenizer), rows)


def decoder_ok(house: House) -> Any:
    from bench.sabotage.cases.decoders import decoder_no_end

    return decoder_no_end(house, False)


def by_hand(house: House) -> Any:
    tokenizer = house.tokenizer()
    features = []
    for i in range(ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(f["input_ids"]) for f in batch)
        pad = tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor(
                [f["input_ids"] + [pad] * (longest - len(f["input_ids"])) for f in batch]
            ),
            "labels": torch.tensor(
                [f["labels"] + [-100] * (longest - len(f["labels"])) for f in batch]
            ),
        }

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def sampled_tokens(house: House) -> Any:
    """BPE dropout: rows that the tokenizer itself would split into fewer tokens."""
    tokenizer, sampling = house.tokenizer("base"), house.tokenizer("base")
    sampling.backend_tokenizer.model.dropout = 0.2
    texts = [f"{question(i)} {answer(i, words=60)}{tokenizer.eos_token}" for i in range(ROWS)]
    features = [{"input_ids": ids} for ids in sampling(texts)["input_ids"]]
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch)), tokenizer, house.model(tokenizer)
    )


NEGATIVES: tuple[Negative, ...] = (
    Negative("H01", "pad token = end token with TRL's own collator", pad_is_end),
    Negative("H02", "generation config with two end tokens", two_stops),
    Negative("H03", "tokenizer shorter than the embedding", spare_rows),
    Negative("H04", "padding on the left, masked", left_padding, needs_trl=False),
    Negative("H05", "loss on prompts, on purpose, three turns", prompt_loss),
    Negative("H06", "single turns through a thinking template", one_turn_thinking),
    Negative("H07", "single turns with reasoning", reasoning_once),
    Negative("H08", "blocks of plain text on a base model", plain_text, needs_trl=False),
    Negative("H09", "flattened batches with positions", packed_apart, needs_trl=False),
    Negative("H10", "padding-free batches of TRL", trl_padding_free),
    Negative("H11", "prompt and completion, loss on the completion", completion_rows),
    Negative("H12", "separate evaluation rows", clean_split),
    Negative("H13", "the same system prompt on both sides of the split", same_opening),
    Negative("H14", "a new token that no row uses", new_tokens_trained),
    Negative("H15", "a tokenizer and a template that both know the begin token", bos_once),
    Negative("H16", "angle brackets and foreign markers in a text", angle_brackets),
    Negative("H17", "accumulation with TRL's own loss", accumulated),
    Negative("H18", "base model, no template, its own format", base_with_own_form),
    Negative("H19", "encoder-decoder with DataCollatorForSeq2Seq", decoder_ok, needs_trl=False),
    Negative("H20", "batches by hand without an attention mask", by_hand, needs_trl=False),
    Negative("H21", "rows sampled with BPE dropout", sampled_tokens, needs_trl=False),
)
