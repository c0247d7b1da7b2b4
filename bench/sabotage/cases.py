"""Breakages of labels, templates, lengths and data: all that shows in the ids."""

from __future__ import annotations

from typing import Any

from bench.sabotage.build import Batches, chat_ids, hf, loader, trl
from bench.sabotage.case import Case
from bench.sabotage.house import CHATML, LLAMA3, NO_END, House, answer, messages, question, thought

_ROWS = 24


def _chats(n: int = _ROWS, **kwargs: Any) -> list[dict[str, Any]]:
    return [{"messages": messages(i, **kwargs)} for i in range(n)]


def _padded(
    tokenizer: Any, features: list[dict[str, Any]], label_pad: int = -100
) -> dict[str, Any]:
    """A collator by hand: pads on the right by length."""
    import torch

    pad = tokenizer.pad_token_id
    longest = max(len(f["input_ids"]) for f in features)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for feature in features:
        ids = list(feature["input_ids"])
        labels = list(feature.get("labels", ids))
        gap = longest - len(ids)
        batch["input_ids"].append(ids + [pad] * gap)
        batch["attention_mask"].append([1] * len(ids) + [0] * gap)
        batch["labels"].append(labels + [label_pad] * gap)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


# ------------------------------------------------------------------ S01 to S04: the end


def s01(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForLanguageModeling

    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    # One row at a time: with several, TRL 1.16 and this collator cannot pad the labels at all.
    chosen = {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
    model = house.model(tokenizer)
    return trl(
        tokenizer, model, _chats(), per_device_train_batch_size=1, **(chosen if broken else {})
    )


def s01_transformers(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ids = [chat_ids(tokenizer, messages(i)) for i in range(_ROWS)]
    if broken:
        rows = [{"input_ids": row} for row in ids]
        collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        rows = [{"input_ids": row, "labels": row} for row in ids]
        collator = DataCollatorForSeq2Seq(tokenizer)
    return hf(tokenizer, house.model(tokenizer), rows, collator)


def s01_by_hand(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    features = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = _padded(tokenizer, batch)
        if broken:
            made["labels"][made["input_ids"] == tokenizer.pad_token_id] = -100
        return made

    return Batches(loader(features, collate), tokenizer, house.model(tokenizer))


def s02(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    tokenizer.chat_template = NO_END if broken else CHATML
    return trl(tokenizer, house.model(tokenizer), _chats())


def s03(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(_ROWS):
        prompt = chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True)
        reply = tokenizer(answer(i), add_special_tokens=False)["input_ids"]
        # Every third row was made by a script that forgot the end.
        reply = reply + ([] if broken and i % 3 == 0 else [tokenizer.eos_token_id])
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return trl(tokenizer, house.model(tokenizer), rows)


def s04(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("base")
    chosen = {} if broken else {"eos_token": "<|im_end|>"}
    return trl(tokenizer, house.model(tokenizer), _chats(), **chosen)


def s04_by_hand(house: House, broken: bool) -> Any:
    from transformers import GenerationConfig

    tokenizer = house.tokenizer("base")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [chat_ids(tokenizer, messages(i)) for i in range(_ROWS)]
    served = GenerationConfig(eos_token_id=tokenizer.eos_token_id if broken else [end])
    features = [{"input_ids": row} for row in ids]
    return Batches(
        loader(features, lambda batch: _padded(tokenizer, batch)),
        tokenizer,
        house.model(tokenizer),
        served,
    )


# ------------------------------------------------------------------ S06 to S12: the prompt


def s06(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("bos")
    rows = _chats()
    if broken:
        rows = [
            {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in rows
        ]
    return trl(tokenizer, house.model(tokenizer), rows)


def s07(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(_ROWS):
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
        for i in range(_ROWS)
    ]
    chosen = {"max_length": 300, "truncation_mode": "keep_end"} if broken else {"max_length": None}
    return trl(tokenizer, house.model(tokenizer), rows, **chosen)


def s08(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = _chats()
    if broken:
        rows = [
            {"text": f"### Instruction:\n{question(i)}\n\n### Response:\n{answer(i)}"}
            for i in range(_ROWS)
        ]
    return trl(tokenizer, house.model(tokenizer), rows)


def s09(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    if broken:
        tokenizer.chat_template = LLAMA3.replace("{{- bos_token -}}", "")
    return trl(tokenizer, house.model(tokenizer), _chats())


def s10(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("thinking")
    rows = _chats(turns=2 if broken else 1, reply=thought)
    return trl(tokenizer, house.model(tokenizer), rows)


def s10_kept(house: House, broken: bool) -> Any:
    from importlib.resources import files

    tokenizer = house.tokenizer("thinking")
    # TRL trains a template that it knows with another one, which keeps all reasoning.
    known = files("trl").joinpath("chat_templates/qwen3.jinja")
    tokenizer.chat_template = known.read_text(encoding="utf-8")
    rows = _chats(turns=2 if broken else 1, reply=thought)
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
    return trl(tokenizer, house.model(tokenizer), _chats(), assistant_only_loss=True)


def s12(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = [
        {"prompt": question(i) + (" " if broken else ""), "completion": answer(i)}
        if broken
        else {"prompt": question(i), "completion": " " + answer(i)}
        for i in range(_ROWS)
    ]
    return trl(tokenizer, house.model(tokenizer), rows)


# ------------------------------------------------------------------ S13: the labels


def s13(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        labels = [-100] * start + ids[start:]
        rows.append({"input_ids": ids, "labels": [*labels[1:], -100] if broken else labels})
    return trl(tokenizer, house.model(tokenizer), rows)


def mixed_mask(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        start = 0 if broken and i % 4 == 2 else start
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return trl(tokenizer, house.model(tokenizer), rows)


def mask_turned(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        answered = [-100] * start + ids[start:]
        asked = ids[:start] + [-100] * (len(ids) - start)
        rows.append({"input_ids": ids, "labels": asked if broken else answered})
    return trl(tokenizer, house.model(tokenizer), rows)


def mask_too_long(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i))
        start = len(chat_ids(tokenizer, messages(i)[:1], add_generation_prompt=True))
        start += 2 * broken
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return trl(tokenizer, house.model(tokenizer), rows)


def marker_absent(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    marker = tokenizer("### Response:" if broken else "<|im_start|>assistant\n")["input_ids"]
    features = []
    for i in range(_ROWS):
        ids = chat_ids(tokenizer, messages(i))
        at = [k for k in range(len(ids)) if ids[k : k + len(marker)] == marker]
        start = at[-1] + len(marker) if at else len(ids)
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return Batches(
        loader(features, lambda batch: _padded(tokenizer, batch)),
        tokenizer,
        house.model(tokenizer),
    )


def padding_trained(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    features = [{"input_ids": chat_ids(tokenizer, messages(i))} for i in range(_ROWS)]
    pad = tokenizer.pad_token_id if broken else -100
    # Rows of a batch that are its longest have no padding.
    return Batches(
        loader(features, lambda batch: _padded(tokenizer, batch, pad)),
        tokenizer,
        house.model(tokenizer),
    )


def padding_everywhere(house: House, broken: bool) -> Any:
    """Rows padded when they were tokenized, `labels = input_ids.copy()`, no attention mask."""
    import torch

    tokenizer = house.tokenizer()
    features = []
    for i in range(_ROWS):
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
    features = [{"input_ids": chat_ids(tokenizer, messages(i))} for i in range(_ROWS)]
    return Batches(
        loader(features, lambda batch: _padded(tokenizer, batch, -1 if broken else -100)),
        tokenizer,
        house.model(tokenizer),
    )


def left_pads_seen(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    features = [{"input_ids": chat_ids(tokenizer, messages(i))} for i in range(_ROWS)]

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


def header_trained(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = [
        {
            "text": tokenizer.apply_chat_template(
                messages(i), tokenize=False, add_generation_prompt=broken
            )
        }
        for i in range(_ROWS)
    ]
    return trl(tokenizer, house.model(tokenizer), rows)


def thought_cut(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer("thinking")

    def long_thought(i: int) -> str:
        words = 300 if i % 2 else 6
        return f"<think>\n{answer(i, words=words)}\n</think>\n\n{answer(i)}"

    return trl(
        tokenizer,
        house.model(tokenizer),
        _chats(reply=long_thought),
        max_length=180 if broken else None,
    )


# ------------------------------------------------------------------ S16, S17, S19: packing, text


def s16(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    return trl(
        tokenizer,
        house.model(tokenizer),
        _chats(),
        packing=True,
        packing_strategy="wrapped" if broken else "bfd",
        max_length=512,
        per_device_train_batch_size=1,
    )


def s17(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = _chats(reply=lambda i: answer(i, words=300 if i % 2 else 9))
    return trl(
        tokenizer,
        house.model(tokenizer),
        rows,
        packing=True,
        packing_strategy="bfd",
        max_length=200 if broken else 4096,
        per_device_train_batch_size=1,
    )


def joined_text(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows, cuts = [], []
    for i in range(0, _ROWS, 2):
        first, second = (
            tokenizer(f"Q: {question(k)}\nA: {answer(k)}{tokenizer.eos_token}")["input_ids"]
            for k in (i, i + 1)
        )
        rows.append({"input_ids": first + second})
        cuts.append(len(first))

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = batch[0]["input_ids"]
        made = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
        if not broken:
            cut = cuts[[row["input_ids"] for row in rows].index(ids)]
            positions = [*range(cut), *range(len(ids) - cut)]
            made["position_ids"] = torch.tensor([positions])
        return made

    model = house.model(tokenizer)
    model.config.use_cache = False
    return Batches(loader(rows, collate, 1), tokenizer, model)


def mask_over_positions(house: House, broken: bool) -> Any:
    import torch

    tokenizer = house.tokenizer()
    ids = [chat_ids(tokenizer, messages(i)) for i in range(_ROWS)]
    features = [
        {"input_ids": a + b, "cut": len(a)} for a, b in zip(ids[::2], ids[1::2], strict=True)
    ]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        feature = batch[0]
        row, cut = feature["input_ids"], feature["cut"]
        made = {
            "input_ids": torch.tensor([row]),
            "labels": torch.tensor([row]),
            "position_ids": torch.tensor([[*range(cut), *range(len(row) - cut)]]),
        }
        if broken:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        return made

    model = house.model(tokenizer)
    model.config.use_cache = False
    return Batches(loader(features, collate, 1), tokenizer, model)


def s19(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = _chats()
    for i in (5, 17):
        written = "<|im_end|>\n<|im_start|>assistant" if broken else "< |im_end|>\n< |im_start|>"
        rows[i]["messages"][0]["content"] += f" They wrote: {written}"
    return trl(tokenizer, house.model(tokenizer), rows)


# ------------------------------------------------------------------ a popular notebook's defects


def notebook_no_end(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = []
    for i in range(_ROWS):
        text = f"### Human: {question(i)} ### Assistant: {answer(i)}"
        ids = tokenizer(text + ("" if broken else tokenizer.eos_token))["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    return hf(tokenizer, house.model(tokenizer), rows, DataCollatorForSeq2Seq(tokenizer))


def notebook_pad(house: House, broken: bool) -> Any:
    from transformers import DataCollatorForLanguageModeling

    tokenizer = house.tokenizer("base")
    tokenizer.chat_template = None
    rows = []
    for i in range(_ROWS):
        text = f"### Human: {question(i)} ### Assistant: {answer(i)}{tokenizer.eos_token}"
        rows.append({"input_ids": tokenizer(text)["input_ids"]})
    tokenizer.pad_token = tokenizer.eos_token if broken else "<|im_start|>"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return hf(tokenizer, house.model(tokenizer), rows, collator)


def notebook_eval(house: House, broken: bool) -> Any:
    tokenizer = house.tokenizer()
    rows = _chats(40)
    # Twelve rows for evaluation, drawn from all; the twin takes them out of the training rows.
    held_out = rows[::3][:12]
    train = rows if broken else [row for row in rows if row not in held_out]
    return trl(tokenizer, house.model(tokenizer), train, eval_dataset=held_out)


_EVERY_THIRD = tuple(range(0, _ROWS, 3))

CASES: tuple[Case, ...] = (
    Case(
        "S01",
        "pad token = end token under the language-modelling collator (TRL)",
        s01,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
    ),
    Case(
        "S01b",
        "the same under transformers' Trainer",
        s01_transformers,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
        needs_trl=False,
    ),
    Case(
        "S01c",
        "the same by hand: labels[ids == pad] = -100",
        s01_by_hand,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
        needs_trl=False,
    ),
    Case(
        "S02",
        "template closes no assistant turn",
        s02,
        ("stop-missing",),
        "no end token",
        "chat template",
    ),
    Case(
        "S03",
        "tokenized rows without end token (every third)",
        s03,
        ("stop-missing",),
        "no end token",
        "append",
        _EVERY_THIRD,
    ),
    Case(
        "S04",
        "base tokenizer ends on <|endoftext|>, rows on <|im_end|>",
        s04,
        ("stop-not-served",),
        "<|im_end|>",
        "eos_token",
    ),
    Case(
        "S04b",
        "the same by hand, against the generation config",
        s04_by_hand,
        ("stop-not-served",),
        "<|im_end|>",
        "generation_config",
        needs_trl=False,
    ),
    Case(
        "S06",
        "rendered text, and the tokenizer adds a second begin token",
        s06,
        ("bos-doubled",),
        "twice",
        "add_special_tokens=False",
    ),
    Case(
        "S07",
        "max_length cuts answers and drops rows",
        s07,
        ("answer-cut", "rows-dropped"),
        "limit",
        "raise",
        tuple(i for i in range(_ROWS) if i % 4 in (1, 3)),
    ),
    Case(
        "S07b",
        "truncation that keeps the end loses the prompt",
        s07_start,
        ("prompt-cut",),
        "beginning",
        "raise the limit",
        tuple(range(3, _ROWS, 4)),
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
        "own chat template",
    ),
    Case(
        "S10",
        "template drops the reasoning of earlier turns",
        s10,
        ("reasoning-lost", "answer-text-lost"),
        "reasoning",
        "one row a turn",
    ),
    Case(
        "S10b",
        "earlier reasoning kept in training, dropped when served",
        s10_kept,
        ("history-not-served", "prompt-differs"),
        "server",
        "one row a turn",
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
        "S13",
        "labels shifted by the user",
        s13,
        ("labels-misaligned",),
        "shifted",
        "no shift",
    ),
    Case(
        "S16",
        "packing without isolation (wrapped)",
        s16,
        ("packing-not-isolated",),
        "see",
        "bfd",
    ),
    Case(
        "S16b",
        "positions that restart beside an attention mask of ones",
        mask_over_positions,
        ("packing-not-isolated",),
        "attention mask",
        "no attention mask",
        needs_trl=False,
    ),
    Case(
        "S16c",
        "question and answer texts joined by hand, no template",
        joined_text,
        ("packing-not-isolated",),
        "where a conversation begins",
        "position_ids",
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
        "S19",
        "control tokens in a user's text",
        s19,
        ("control-token-in-content",),
        "<|im_",
        "break them up",
        (5, 17),
    ),
    Case(
        "N01",
        "notebook: pad token = end token, plain text",
        notebook_pad,
        ("stop-not-supervised",),
        "pad token",
        "lengths",
        needs_trl=False,
    ),
    Case(
        "N02",
        "notebook: no end token in the text",
        notebook_no_end,
        ("stop-missing",),
        "no end token",
        "append",
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
    Case(
        "L01",
        "prompt masked in some rows only",
        mixed_mask,
        ("loss-mask-mixed",),
        "prompt",
        "all rows",
        tuple(i for i in range(_ROWS) if i % 4 == 2),
    ),
    Case(
        "L01b",
        "mask the wrong way round: prompts trained, answers not",
        mask_turned,
        ("answers-masked",),
        "wrong way round",
        "-100 on what the server sends",
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
        "padding is trained",
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
        "L06",
        "rows end with the generation prompt",
        header_trained,
        ("generation-prompt-trained",),
        "generation prompt",
        "add_generation_prompt=False",
    ),
    Case(
        "L07",
        "thinking cut before it closes",
        thought_cut,
        ("reasoning-unclosed",),
        "cut",
        "raise the length limit",
        tuple(range(1, _ROWS, 2)),
    ),
)
