"""The loss over a step, the optimizer, types and rates."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, chat_ids, chats, hf, lora, trl
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages, question


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
        for i in range(ROWS)
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
        for i in range(ROWS)
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


def half_precision(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    return trl(tokenizer, house.model(tokenizer, dtype=torch.float16 if broken else None), chats())


def rounded_away(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    model = house.model(tokenizer, dtype=torch.bfloat16 if broken else None)
    return trl(tokenizer, model, chats(), learning_rate=1e-6)


def stale_optimizer(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    model = house.model(tokenizer)
    other = house.model(tokenizer) if broken else model
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4)
    return trl(tokenizer, model, chats(), optimizers=(optimizer, None))


def wild_rate(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    return trl(
        tokenizer,
        house.model(tokenizer),
        chats(),
        peft_config=lora(),
        learning_rate=0.05 if broken else 2e-4,
    )


CASES: tuple[Case, ...] = (
    Case(
        "S15",
        "loss function ignores num_items_in_batch, four accumulation steps",
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
        "lost to rounding",
        "float32",
        None,
    ),
    Case(
        "M03",
        "optimizer of a different model",
        stale_optimizer,
        ("optimizer-misses",),
        "optimizer",
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
)
