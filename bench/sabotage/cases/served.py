"""Rows of ids and labels alone, without the columns they were made from: what stands before an
answer is not what a server sends, or what is masked of a row is not its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.sabotage.build import ROWS, Batches, answered, chat_ids, loader, on_answer, padded
from bench.sabotage.case import Case
from bench.sabotage.house import House, answer, messages, question, thought

# As the R1 distills have it: history without reasoning, a served prompt that opens the block.
OPENS = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' ~ m.content.split('</think>')[-1] ~ '<|im_end|>\\n' -}}"
    "{%- else -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)


def of_features(
    house: House, tokenizer: Any, features: Sequence[dict[str, Any]], **more: Any
) -> Batches:
    """Batches of ids and labels, padded on the right."""
    return Batches(
        loader(features, lambda batch: padded(tokenizer, batch)),
        tokenizer,
        house.model(tokenizer),
        **more,
    )


def in_parts(tokenizer: Any, prompt: str, said: str) -> dict[str, list[int]]:
    """Prompt and answer encoded one after the other, labels on the answer."""
    first, second = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, said))
    return {"input_ids": first + second, "labels": [-100] * len(first) + second}


def _chatml(house: House, write: Callable[[int], tuple[str, str]]) -> Batches:
    tokenizer = house.tokenizer()
    return of_features(house, tokenizer, [in_parts(tokenizer, *write(i)) for i in range(ROWS)])


def _system(house: House) -> str:
    talk = [{"role": "user", "content": "qq"}]
    written: str = house.tokenizer().apply_chat_template(talk, tokenize=False)
    return written.partition("<|im_start|>user")[0]


def default_system(house: House, broken: bool) -> Batches:
    head = "" if broken else _system(house)
    return _chatml(
        house,
        lambda i: (
            f"{head}<|im_start|>user\n{question(i)}<|im_end|>\n<|im_start|>assistant\n",
            f"{answer(i)}<|im_end|>\n",
        ),
    )


def space_for_line(house: House, broken: bool) -> Batches:
    head, behind = _system(house), " " if broken else "\n"
    return _chatml(
        house,
        lambda i: (
            f"{head}<|im_start|>user\n{question(i)}<|im_end|>\n<|im_start|>assistant{behind}",
            f"{answer(i)}<|im_end|>\n",
        ),
    )


def role_human(house: House, broken: bool) -> Batches:
    head, role = _system(house), "human" if broken else "user"
    return _chatml(
        house,
        lambda i: (
            f"{head}<|im_start|>{role}\n{question(i)}<|im_end|>\n<|im_start|>assistant\n",
            f"{answer(i)}<|im_end|>\n",
        ),
    )


def block_unserved(house: House, broken: bool) -> Batches:
    """Rendered as training rows are: without the block that the served prompt opens."""
    tokenizer = house.tokenizer()
    tokenizer.chat_template = OPENS
    features = []
    for i in range(ROWS):
        talk = messages(i)
        prompt = tokenizer.apply_chat_template(
            talk[:1], tokenize=False, add_generation_prompt=not broken
        )
        prompt += "<|im_start|>assistant\n" if broken else ""
        said = answer(i) if broken else thought(i).removeprefix("<think>\n")
        features.append(in_parts(tokenizer, prompt, f"{said}<|im_end|>\n"))
    return of_features(house, tokenizer, features)


def header_trained(house: House, broken: bool, every: int = 1) -> Batches:
    tokenizer = house.tokenizer()
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    features = []
    for i in range(ROWS):
        ids, start = answered(tokenizer, messages(i))
        start -= len(header) * (broken and i % every == 0)
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return of_features(house, tokenizer, features)


def header_trained_in_some(house: House, broken: bool) -> Batches:
    return header_trained(house, broken, 3)


def prompt_hidden(house: House, broken: bool) -> Batches:
    tokenizer = house.tokenizer()
    features = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        made = padded(tokenizer, batch)
        if broken:
            made["attention_mask"] = (made["labels"] != -100).long()
        return made

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def last_word_masked(house: House, broken: bool) -> Batches:
    tokenizer = house.tokenizer()
    features = []
    for i in range(ROWS):
        row = on_answer(tokenizer, messages(i))
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        last = max(k for k, token in enumerate(row["input_ids"]) if token == end)
        if broken:
            row["labels"][last - 2 : last] = [-100, -100]
        features.append(row)
    return of_features(house, tokenizer, features)


def positions_zero(house: House, broken: bool) -> Batches:
    import torch

    tokenizer = house.tokenizer()
    features = [on_answer(tokenizer, messages(i)) for i in range(ROWS)]

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        made = padded(tokenizer, batch)
        along = torch.arange(made["input_ids"].shape[1]).expand_as(made["input_ids"])
        made["position_ids"] = torch.zeros_like(along) if broken else along.clone()
        return made

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def one_row_again(house: House, broken: bool) -> Batches:
    tokenizer = house.tokenizer()
    features = [on_answer(tokenizer, messages(i)) for i in range(80)]
    if broken:
        features[40:] = [features[3]] * 40
    return of_features(house, tokenizer, features)


def two_ends(house: House, broken: bool) -> Batches:
    """An end token behind the one that the template wrote, in the middle of conversations too."""
    tokenizer = house.tokenizer()
    features = []
    for i in range(ROWS):
        talk = messages(i, turns=2)
        ids = chat_ids(tokenizer, talk)
        labels = [-100] * len(ids)
        for turn in (1, 3):
            start = len(chat_ids(tokenizer, talk[:turn], add_generation_prompt=True))
            end = len(chat_ids(tokenizer, talk[: turn + 1])) - 1
            labels[start:end] = ids[start:end]
        if broken:
            end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            ids, labels = _doubled(ids, labels, end)
        features.append({"input_ids": ids, "labels": labels})
    return of_features(house, tokenizer, features)


def _doubled(ids: list[int], labels: list[int], end: int) -> tuple[list[int], list[int]]:
    pairs = zip(ids, labels, strict=True)
    twice = [pair for t, label in pairs for pair in [(t, label)] * (1 + (label == end))]
    return [t for t, _ in twice], [label for _, label in twice]


_ALONE = {"needs_trl": False}
CASES: tuple[Case, ...] = (
    Case(
        "U01",
        "ChatML by hand without the default system prompt",
        default_system,
        ("prompt-differs",),
        "system",
        "tokenizer's chat template",
        **_ALONE,
    ),
    Case(
        "U02",
        "a space instead of the line break after the assistant header",
        space_for_line,
        ("prompt-differs",),
        "a server sends",
        "tokenizer's chat template",
        **_ALONE,
    ),
    Case(
        "U03",
        "rows without the think block that the served prompt opens",
        block_unserved,
        ("prompt-differs",),
        "<think>",
        "add_generation_prompt=True",
        **_ALONE,
    ),
    Case(
        "U04",
        "questions with a role that no server sends (human)",
        role_human,
        ("prompt-differs",),
        "'human'",
        "tokenizer's chat template",
        **_ALONE,
    ),
    Case(
        "U05",
        "labels on the header of the answer",
        header_trained,
        ("header-supervised",),
        "header",
        "generation prompt",
        **_ALONE,
    ),
    Case(
        "U05b",
        "labels on the header in a third of the rows",
        header_trained_in_some,
        ("header-supervised",),
        "header",
        "generation prompt",
        tuple(range(0, ROWS, 3)),
        **_ALONE,
    ),
    Case(
        "U06",
        "attention mask 0 over the prompt",
        prompt_hidden,
        ("attention-hole",),
        "prompt",
        "attention mask",
        **_ALONE,
    ),
    Case(
        "U07",
        "the word before the end has no label",
        last_word_masked,
        ("answer-hole",),
        "inside",
        "every token of the answer",
        **_ALONE,
    ),
    Case(
        "U08",
        "position ids all 0",
        positions_zero,
        ("positions-constant",),
        "position",
        "omit position_ids",
        **_ALONE,
    ),
    Case(
        "U09",
        "one row forty times",
        one_row_again,
        ("rows-duplicate",),
        "41 times",
        "remove the copies",
        tuple(range(40, 80)),
        **_ALONE,
    ),
    Case(
        "U10",
        "two end tokens after each answer",
        two_ends,
        ("stop-doubled", "prompt-differs"),
        "twice",
        "once",
        **_ALONE,
    ),
)
