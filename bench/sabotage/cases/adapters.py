"""Adapters that adapt less than was meant, and what was saved of them."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import Saved, chats, lora, trl
from bench.sabotage.case import Case
from bench.sabotage.house import House, scratch


def s18(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    names = ["q_proj", "query_key_value", "c_attn"] if broken else ["q_proj", "k_proj", "v_proj"]
    model = house.model(tokenizer)
    return trl(tokenizer, model, chats(), peft_config=lora(target_modules=names))


def _trained_adapter(house: House) -> tuple[Any, str, str]:
    """(tokenizer, folder of the base, folder of an adapter that was trained)."""
    from peft import get_peft_model

    tokenizer = house.tokenizer()
    base, adapter = scratch("base"), scratch("adapter")
    house.model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = get_peft_model(_opened(base), lora())
    trl(tokenizer, model, chats(), learning_rate=1e-2).train()
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return tokenizer, base, adapter


def _opened(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def s20(house: House, broken: bool) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model

    tokenizer, base, adapter = _trained_adapter(house)
    model = (
        get_peft_model(_opened(base), PeftConfig.from_pretrained(adapter))
        if broken
        else PeftModel.from_pretrained(_opened(base), adapter)
    )
    again = scratch("again")
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    return Saved(again)


def s20_merged(house: House, broken: bool) -> Any:
    from peft import PeftModel

    tokenizer, base, adapter = _trained_adapter(house)
    merged = scratch("merged")
    PeftModel.from_pretrained(_opened(base), adapter).merge_and_unload().save_pretrained(merged)
    if not broken:
        tokenizer.save_pretrained(merged)
    return Saved(merged)


def config_without_weights(house: House, broken: bool) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model

    tokenizer = house.tokenizer()
    folder = scratch("adapter")
    get_peft_model(house.model(tokenizer), lora()).save_pretrained(folder)
    base = house.model(tokenizer)
    model = (
        get_peft_model(base, PeftConfig.from_pretrained(folder))
        if broken
        else PeftModel.from_pretrained(base, folder, is_trainable=True)
    )
    return trl(tokenizer, model, chats())


def alpha_zero(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    config = lora(lora_alpha=0 if broken else 4)
    return trl(tokenizer, house.model(tokenizer), chats(), peft_config=config)


def dropout_high(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    config = lora(lora_dropout=0.95 if broken else 0.05)
    return trl(tokenizer, house.model(tokenizer), chats(), peft_config=config)


def decay_high(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    return trl(tokenizer, house.model(tokenizer), chats(), weight_decay=10.0 if broken else 0.1)


CASES: tuple[Case, ...] = (
    Case(
        "U11",
        "lora_alpha 0: an adapter that cannot learn",
        alpha_zero,
        ("lora-scale-zero",),
        "lora_alpha is 0",
        "lora_alpha between r",
        None,
    ),
    Case(
        "U12",
        "lora_dropout 0.95",
        dropout_high,
        ("dropout-unusual",),
        "0.95",
        "lora_dropout=0.05",
        None,
    ),
    Case(
        "U13",
        "weight decay 10",
        decay_high,
        ("weight-decay-unusual",),
        "towards 0",
        "weight_decay between 0 and 0.1",
        None,
    ),
    Case(
        "S18",
        "target_modules that match only some layers",
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
        "adapter made from its config only (get_peft_model), then trained",
        config_without_weights,
        ("nothing-trainable",),
        "weights were not loaded",
        "from_pretrained",
        None,
    ),
)
