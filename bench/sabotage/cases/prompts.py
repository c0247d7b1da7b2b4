"""What stands before an answer: the served form, begin tokens, markers, earlier reasoning."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import ROWS, Batches, chats, loader, padded, trl
from bench.sabotage.case import Case
from bench.sabotage.house import CHATML, LLAMA3, House, answer, messages, question, thought


def s06(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("bos")
    rows = chats()
    if broken:
        rows = [
            {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in rows
        ]
    return trl(tokenizer, house.model(tokenizer), rows)


def s08(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = chats()
    if broken:
        rows = [
            {"text": f"### Instruction:\n{question(i)}\n\n### Response:\n{answer(i)}"}
            for i in range(ROWS)
        ]
    return trl(tokenizer, house.model(tokenizer), rows)


def s09(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    if broken:
        tokenizer.chat_template = LLAMA3.replace("{{- bos_token -}}", "")
    return trl(tokenizer, house.model(tokenizer), chats())


def s10(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("thinking")
    rows = chats(turns=2 if broken else 1, reply=thought)
    return trl(tokenizer, house.model(tokenizer), rows)


def s10_kept(house: House, broken: bool) -> Any:
    from importlib.resources import files

    tokenizer = house.tokenizer("thinking")
    # TRL trains a template that it knows with another one, which keeps all reasoning.
    known = files("trl").joinpath("chat_templates/qwen3.jinja")
    tokenizer.chat_template = known.read_text(encoding="utf-8")
    rows = chats(turns=2 if broken else 1, reply=thought)
    return trl(tokenizer, house.model(tokenizer), rows, assistant_only_loss=True)


def _generation(inside: str, behind: str) -> str:
    return CHATML.replace(
        "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}",
        "{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
        "{% generation %}{{- m.content" + inside + " -}}{% endgeneration %}"
        "{{- " + behind + " -}}{%- else -%}"
        "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}{%- endif -%}",
    )


def s11(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    tokenizer.chat_template = (
        _generation("", "'<|im_end|>\\n'") if broken else _generation(" ~ '<|im_end|>'", "'\\n'")
    )
    return trl(tokenizer, house.model(tokenizer), chats(), assistant_only_loss=True)


def s12(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = [
        {"prompt": question(i) + (" " if broken else ""), "completion": answer(i)}
        if broken
        else {"prompt": question(i), "completion": " " + answer(i)}
        for i in range(ROWS)
    ]
    return trl(tokenizer, house.model(tokenizer), rows)


def s12_by_hand(house: House, broken: bool) -> Any:
    """Prompt and answer encoded as one text, the mask as long as the prompt alone."""
    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    features = []
    for i in range(ROWS):
        prompt = f"Question: {question(i)}\nAnswer:" + (" " if broken else "")
        said = answer(i) if broken else " " + answer(i)
        ids = tokenizer(prompt + said + tokenizer.eos_token)["input_ids"]
        size = len(tokenizer(prompt)["input_ids"])
        features.append({"input_ids": ids, "labels": [-100] * size + ids[size:]})
    return Batches(loader(features, lambda batch: padded(tokenizer, batch)), tokenizer)


def header_trained(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = [
        {
            "text": tokenizer.apply_chat_template(
                messages(i), tokenize=False, add_generation_prompt=broken
            )
        }
        for i in range(ROWS)
    ]
    return trl(tokenizer, house.model(tokenizer), rows)


CASES: tuple[Case, ...] = (
    Case(
        "S06",
        "rendered text, and the tokenizer adds a second begin token",
        s06,
        ("bos-doubled",),
        "twice",
        "add_special_tokens=False",
    ),
    Case(
        "S08",
        "Alpaca text on an instruct model that is served with its template",
        s08,
        ("prompt-not-served",),
        "template",
        "messages",
    ),
    Case(
        "S09",
        "Llama 3 markers on a ChatML tokenizer",
        s09,
        ("marker-in-pieces",),
        "<|eot_id|>",
        "tokenizer's chat template",
    ),
    Case(
        "S10",
        "template drops the reasoning of earlier turns",
        s10,
        ("reasoning-lost", "answer-text-lost"),
        "reasoning",
        "one row per turn",
    ),
    Case(
        "S10b",
        "earlier reasoning kept in training, dropped when served",
        s10_kept,
        ("history-not-served", "prompt-differs"),
        "server",
        "one row per turn",
    ),
    Case(
        "S11",
        "{% generation %} closed before the end token",
        s11,
        ("stop-not-supervised",),
        "mask stops before",
        "end token",
    ),
    Case(
        "S12",
        "prompt ends with a space",
        s12,
        ("prompt-merged", "answer-start-masked"),
        "merged",
        "space",
    ),
    Case(
        "S12b",
        "the same by hand, without a template: the mask swallows the first word",
        s12_by_hand,
        ("answer-start-masked",),
        "merged",
        "space",
        needs_trl=False,
    ),
    Case(
        "L06",
        "rows end with the generation prompt",
        header_trained,
        ("generation-prompt-trained",),
        "generation prompt",
        "add_generation_prompt=False",
    ),
)
