"""Breakages of the model around the data: rows, adapters, losses, types, targets of a decoder."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import Batches, Saved, chat_ids, hf, loader, lora, trl
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages, question

_ROWS = 24


def _chats(n: int = _ROWS) -> list[dict[str, Any]]:
    return [{"messages": messages(i)} for i in range(n)]


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
    return trl(tokenizer, model, _chats(), peft_config=lora(**saved))


def s05_tied(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer, tied=True)
    _copy_untrained(tokenizer, model)
    saved: dict[str, Any] = (
        {} if broken else {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    )
    return trl(tokenizer, model, _chats(), peft_config=lora(**saved))


def s14(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|map|>", "<|place|>"]})
    rows = _chats()
    for i in range(0, _ROWS, 2):
        rows[i]["messages"][1]["content"] = f"<|map|>{answer(i)}<|place|>"
    saved = {} if broken else {"modules_to_save": ["embed_tokens", "lm_head"]}
    # The new tokens are meant to stand in the answers.
    return trl(tokenizer, model, rows, peft_config=lora(target_modules=["q_proj"], **saved))


def s15(house: House, broken: bool) -> Any:
    import torch

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits, wanted = outputs.logits[:, :-1], labels[:, 1:]
        summed = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), wanted.reshape(-1), reduction="sum"
        )
        count = (wanted != -100).sum() if broken else num_items_in_batch
        return summed / count

    tokenizer = house.tokenizer()
    rows = [
        {
            "messages": [
                {"role": "user", "content": question(i)},
                {"role": "assistant", "content": t},
            ]
        }
        for i in range(_ROWS)
        for t in [answer(i, words=(5, 60, 10, 90)[i % 4])]
    ]
    return trl(
        tokenizer,
        house.model(tokenizer),
        rows,
        compute_loss_func=loss,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
    )


def s15_overridden(house: House, broken: bool) -> Any:
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer

    class Own(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs["labels"]
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            wanted = labels[:, 1:]
            summed = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1).float(), wanted.reshape(-1), reduction="sum"
            )
            loss = summed / ((wanted != -100).sum() if broken else num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    tokenizer = house.tokenizer()
    rows = [
        {"input_ids": ids, "labels": ids}
        for i in range(_ROWS)
        for ids in [chat_ids(tokenizer, messages(i, reply=lambda k: answer(k, words=9 * (k % 5))))]
    ]
    return hf(
        tokenizer,
        house.model(tokenizer),
        rows,
        DataCollatorForSeq2Seq(tokenizer),
        trainer=Own,
        gradient_accumulation_steps=4,
    )


def s18(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    names = ["q_proj", "query_key_value", "c_attn"] if broken else ["q_proj", "k_proj", "v_proj"]
    model = house.model(tokenizer)
    return trl(tokenizer, model, _chats(), peft_config=lora(target_modules=names))


def _trained_adapter(house: House) -> tuple[Any, str, str]:
    """(tokenizer, folder of the base, folder of an adapter that was trained)."""
    import tempfile

    from peft import get_peft_model

    tokenizer = house.tokenizer()
    base, adapter = (tempfile.mkdtemp(prefix=f"sabotage-{n}-") for n in ("base", "adapter"))
    house.model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = get_peft_model(_opened(base), lora())
    trl(tokenizer, model, _chats(), learning_rate=1e-2).train()
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return tokenizer, base, adapter


def _opened(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def s20(house: House, broken: bool) -> Any:
    import tempfile

    from peft import PeftConfig, PeftModel, get_peft_model

    tokenizer, base, adapter = _trained_adapter(house)
    model = (
        get_peft_model(_opened(base), PeftConfig.from_pretrained(adapter))
        if broken
        else PeftModel.from_pretrained(_opened(base), adapter)
    )
    again = tempfile.mkdtemp(prefix="sabotage-again-")
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    return Saved(again)


def s20_merged(house: House, broken: bool) -> Any:
    import tempfile

    from peft import PeftModel

    tokenizer, base, adapter = _trained_adapter(house)
    merged = tempfile.mkdtemp(prefix="sabotage-merged-")
    PeftModel.from_pretrained(_opened(base), adapter).merge_and_unload().save_pretrained(merged)
    if not broken:
        tokenizer.save_pretrained(merged)
    return Saved(merged)


def config_without_weights(house: House, broken: bool) -> Any:
    import tempfile

    from peft import PeftConfig, PeftModel, get_peft_model

    tokenizer = house.tokenizer()
    folder = tempfile.mkdtemp(prefix="sabotage-adapter-")
    get_peft_model(house.model(tokenizer), lora()).save_pretrained(folder)
    base = house.model(tokenizer)
    model = (
        get_peft_model(base, PeftConfig.from_pretrained(folder))
        if broken
        else PeftModel.from_pretrained(base, folder, is_trainable=True)
    )
    return trl(tokenizer, model, _chats())


def half_precision(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    return trl(tokenizer, house.model(tokenizer, dtype=torch.float16 if broken else None), _chats())


def rounded_away(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    model = house.model(tokenizer, dtype=torch.bfloat16 if broken else None)
    return trl(tokenizer, model, _chats(), learning_rate=1e-6)


def stale_optimizer(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    other = house.model(tokenizer) if broken else model
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4)
    return trl(tokenizer, model, _chats(), optimizers=(optimizer, None))


def wild_rate(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    return trl(
        tokenizer,
        house.model(tokenizer),
        _chats(),
        peft_config=lora(),
        learning_rate=0.05 if broken else 2e-4,
    )


def beyond_rows(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    new = [f"<|new_{i}|>" for i in range(200)]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    if not broken:
        model.resize_token_embeddings(len(tokenizer))
    rows = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i, reply=lambda k: answer(k) + new[-1]))
        rows.append({"input_ids": ids, "labels": ids})
    return Batches(loader(rows, DataCollatorForSeq2Seq(tokenizer)), tokenizer, model)


# ------------------------------------------------------------------ encoder-decoders


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
        for i in range(_ROWS)
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


_HALF = tuple(range(0, _ROWS, 2))

CASES: tuple[Case, ...] = (
    Case(
        "S05",
        "the end token's rows are untrained, and LoRA leaves them frozen",
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
        "two new tokens in spare rows, LoRA on q_proj only",
        s14,
        ("new-token-frozen",),
        "added to the tokenizer",
        "modules_to_save",
        _HALF,
    ),
    Case(
        "S15",
        "loss function leaves num_items_in_batch out, four accumulation steps",
        s15,
        ("accumulation-changes-loss",),
        "num_items_in_batch",
        "num_items_in_batch",
        None,
    ),
    Case(
        "S15b",
        "the same in an overridden compute_loss",
        s15_overridden,
        ("accumulation-changes-loss",),
        "num_items_in_batch",
        "num_items_in_batch",
        None,
        needs_trl=False,
    ),
    Case(
        "S18",
        "target_modules that match in part",
        s18,
        ("lora-targets-unmatched",),
        "query_key_value",
        "names above",
        None,
    ),
    Case(
        "S20",
        "adapter saved again from get_peft_model: the trained weights are gone (check MODEL)",
        s20,
        ("adapter-empty",),
        "changes nothing",
        "from the trained model",
        None,
    ),
    Case(
        "S20b",
        "merged model saved without its tokenizer (check MODEL)",
        s20_merged,
        ("tokenizer-missing", "model-no-tokenizer"),
        "tokenizer",
        "tokenizer.save_pretrained",
        None,
    ),
    Case(
        "S20c",
        "adapter from its config only (get_peft_model), then trained",
        config_without_weights,
        ("nothing-trainable",),
        "weights were not read",
        "from_pretrained",
        None,
    ),
    Case(
        "M01",
        "trained weights in float16",
        half_precision,
        ("trained-float16",),
        "float16",
        "float32",
        None,
    ),
    Case(
        "M02",
        "bfloat16 weights, AdamW, learning rate 1e-6",
        rounded_away,
        ("update-rounded-away",),
        "rounded away",
        "float32",
        None,
    ),
    Case(
        "M03",
        "optimiser of another model",
        stale_optimizer,
        ("optimizer-misses",),
        "optimiser",
        "after the model",
        None,
    ),
    Case(
        "M04",
        "LoRA with a learning rate of 0.05",
        wild_rate,
        ("learning-rate-unusual",),
        "learning rate",
        "learning_rate=1e-4",
        None,
    ),
    Case(
        "M05",
        "new tokens beyond the model's rows",
        beyond_rows,
        ("id-beyond-head",),
        "beyond",
        "resize",
        needs_trl=False,
    ),
    Case(
        "D01",
        "targets of an encoder-decoder without end token",
        decoder_no_end,
        ("stop-missing",),
        "end token",
        "ends them",
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
        "leave decoder_input_ids out",
        None,
        needs_trl=False,
    ),
    Case(
        "D04",
        "labels begin with the decoder's start token",
        decoder_doubled,
        ("decoder-start-doubled",),
        "starts with",
        "leave it out",
        needs_trl=False,
    ),
    Case(
        "D05",
        "generation starts the decoder with another token",
        decoder_start,
        ("decoder-start",),
        "generation with",
        "generation_config",
        None,
        needs_trl=False,
    ),
)
