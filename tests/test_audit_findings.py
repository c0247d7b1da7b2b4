"""Findings of the audit that no script of the sabotage suite stands for, each with a near miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench.sabotage.build import chat_ids, dataset, hf, loader, trl
from bench.sabotage.cases.packing import mask_over_positions
from bench.sabotage.house import House, answer, messages, question

import truetune
from truetune.errors import UsageError

HOUSE = House(real=False)


def _collator(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer)


def _feature(tokenizer: Any, talk: Any) -> dict[str, Any]:
    ids = chat_ids(tokenizer, talk)
    start = len(chat_ids(tokenizer, talk[:1], add_generation_prompt=True))
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def _found(report: Any) -> dict[str, Any]:
    return {f.code: f for f in report.findings}


@pytest.mark.parametrize("hidden", [True, False])
def test_attention_hole(hidden: bool) -> None:
    """`ids != pad` hides the ends of earlier turns where pad and end are one token."""
    tokenizer = HOUSE.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    plain = _collator(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = plain(rows)
        if hidden:
            batch["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
        return batch

    rows = [_feature(tokenizer, messages(i, turns=2)) for i in range(8)]
    found = _found(truetune.audit(loader(rows, collate), tokenizer))
    assert ("attention-hole" in found) == hidden
    if hidden:
        assert found["attention-hole"].count == 8
        assert found["attention-hole"].where == "dataset[0]"


def _of_labels(ids: Any, labels: Any, number: int) -> list[int]:
    return [int(label != -100) for label in labels]


def _of_lines(ids: Any, labels: Any, number: int) -> list[int]:
    line = HOUSE.tokenizer()("\n", add_special_tokens=False)["input_ids"][-1]
    return [int(token != line) for token in ids]


def _of_nothing(ids: Any, labels: Any, number: int) -> list[int]:
    return [0] * len(ids)


def _of_some(ids: Any, labels: Any, number: int) -> list[int]:
    return _of_labels(ids, labels, number) if number % 3 == 0 else [1] * len(ids)


@pytest.mark.parametrize(
    ("seen", "rows"), [(_of_labels, 12), (_of_lines, 12), (_of_nothing, 12), (_of_some, 4)]
)
@pytest.mark.parametrize("kind", ["instruct", "bos"])
def test_what_a_mask_hides_is_told_once(seen: Any, rows: int, kind: Any) -> None:
    """The row is judged as its ids are: no prompt is called missing that is only out of sight."""
    tokenizer = HOUSE.tokenizer(kind)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if kind == "bos":
        tokenizer.add_special_tokens({"pad_token": "<|reserved|>"})
    features = []
    for i in range(12):
        row = _feature(tokenizer, messages(i))
        row["attention_mask"] = seen(row["input_ids"], row["labels"], i)
        features.append(row)
    report = truetune.audit(loader(features, _collator(tokenizer)), tokenizer)
    assert {f.code: f.count for f in report.findings} == {"attention-hole": rows}


def _masked(kind: str, number: int, rows: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        size = len(row["input_ids"])
        own = [1] * size + [0] * (width - size)
        cut = min(number, size)
        mask = {
            "inverted": [1 - m for m in own],
            "all": [0] * width,
            "labels": [int(x != -100) for x in row["labels"]] + [0] * (width - size),
            "front": [0] * cut + own[cut:],
            "tail": [1] * (size - cut) + [0] * (width - size + cut),
            "fine": own,
        }[kind]
        batch["input_ids"].append(row["input_ids"] + [pad] * (width - size))
        batch["labels"].append(row["labels"] + [-100] * (width - size))
        batch["attention_mask"].append(mask)
    return {key: torch.tensor(value) for key, value in batch.items()}


@pytest.mark.parametrize(
    ("kind", "level", "said"),
    [
        ("inverted", "error", "inverted"),
        ("all", "error", "every token"),
        ("labels", "error", "made from the labels"),
        ("front", "error", "different lengths"),
        ("tail", "warning", "last tokens"),
        ("fine", "", ""),
    ],
)
@pytest.mark.parametrize("flags", [False, True])
def test_what_an_attention_mask_hides_is_named(
    kind: str, level: str, said: str, flags: bool
) -> None:
    """Each mistake by its own cause, as numbers or as flags; pad and end are two tokens."""
    tokenizer = HOUSE.tokenizer()
    pad = tokenizer.pad_token_id
    assert pad not in (None, tokenizer.eos_token_id)
    features = [_feature(tokenizer, messages(i, turns=1 + i % 3)) for i in range(12)]
    batches = [_masked(kind, 3, features[i : i + 4], pad) for i in range(0, 12, 4)]
    if flags:
        batches = [{**b, "attention_mask": b["attention_mask"].bool()} for b in batches]
    report = truetune.audit(batches, tokenizer)
    told = [f for f in report.findings if f.code == "attention-hole"]
    assert [f.level for f in told] == [level] * bool(level)
    for finding in told:
        assert finding.count == 12
        assert said in f"{finding.what} {finding.why}"
        # The cause of another mistake is not named.
        assert "ids != pad" not in finding.why
        assert ("made from the labels" in finding.why) == (kind == "labels")


def test_what_concerns_few_rows_stands_behind_what_concerns_many() -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [_feature(tokenizer, messages(i)) for i in range(40)]
    for row in rows[1:]:
        stop = max(i for i, x in enumerate(row["labels"]) if x in tokenizer.all_special_ids)
        row["labels"][stop] = -100
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    rows[0]["labels"] = [i if x == -100 else -100 for i, x in zip(ids, labels, strict=True)]
    report = truetune.audit(loader(rows, _collator(tokenizer)), tokenizer)
    errors = [(f.code, f.count) for f in report.findings if f.level == "error"]
    assert errors == [("stop-not-supervised", 39), ("answers-masked", 1)]


def test_what_is_no_batches_is_named_with_what_to_call() -> None:
    tokenizer = HOUSE.tokenizer()
    model = HOUSE.model(tokenizer)
    batch = _collator(tokenizer)([_feature(tokenizer, messages(i)) for i in range(2)])
    for given, said, fix in (
        ((["x"], model, tokenizer), "LlamaForCausalLM, not a tokenizer", "tokenizer, model)"),
        ((["x"], "gpt2"), "a str, not a tokenizer", "tokenizer, model)"),
        (("rows.jsonl",), "is a string", "truetune check MODEL rows.jsonl"),
        ((batch, tokenizer), "is one batch", "audit([batch], tokenizer)"),
        ((dict(batch), tokenizer), "is one batch", "audit([batch], tokenizer)"),
    ):
        with pytest.raises(UsageError) as error:
            truetune.audit(*given)
        assert said in error.value.what
        assert fix in error.value.fix
    assert truetune.audit([batch], tokenizer, model).ok


def test_rows_cut_in_front_are_told_once() -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [chat_ids(tokenizer, messages(i, turns=1 + i % 2)) for i in range(24)]
    limit = 1 + max(len(row) for row in rows[::2])
    short = [row[-limit:] for row in rows]
    for ids, cut in ((short, 12), (rows, 0)):
        features = [{"input_ids": row, "labels": row} for row in ids]
        report = truetune.audit(loader(features, _collator(tokenizer)), tokenizer)
        told = {f.code: f.count for f in report.findings if f.level != "note"}
        assert told == ({"prompt-cut": cut} if cut else {})


@pytest.mark.parametrize(("asked", "level"), [(6, "warning"), (1, "note"), (0, None)])
def test_eval_prompt_in_train(asked: int, level: str | None) -> None:
    """Another answer to a question that is trained too."""
    tokenizer = HOUSE.tokenizer()
    train = [_feature(tokenizer, messages(i)) for i in range(20)]
    held_out = []
    for i in range(12):
        number = i if i < asked else i + 500
        talk = [
            {"role": "user", "content": question(number)},
            {"role": "assistant", "content": f"Nobody knows that of {i}."},
        ]
        held_out.append(_feature(tokenizer, talk))
    collate = _collator(tokenizer)
    report = truetune.audit(loader(train, collate), tokenizer, evaluation=loader(held_out, collate))
    finding = _found(report).get("eval-prompt-in-train")
    assert (finding.level if finding else None) == level
    assert finding is None or finding.count == asked
    assert "eval-in-train" not in report.codes


@pytest.mark.parametrize("known", [True, False])
def test_the_end_is_held_against_the_models_own_generation_config(known: bool) -> None:
    """The tokenizer's end token is not what `generate` stops on."""
    tokenizer = HOUSE.tokenizer()
    model = HOUSE.model(tokenizer)
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.eos_token_id = [other, *([tokenizer.eos_token_id] * known)]
    rows = [_feature(tokenizer, messages(i)) for i in range(8)]
    found = _found(truetune.audit(loader(rows, _collator(tokenizer)), tokenizer, model))
    assert ("stop-not-served" in found) != known
    if not known:
        assert found["stop-not-served"].level == "warning"
        assert str(tokenizer.eos_token_id) in found["stop-not-served"].fix
    # Without the model nothing else was said: the tokenizer's end is what counts.
    assert truetune.audit(loader(rows, _collator(tokenizer)), tokenizer).ok


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_cut_in_front_without_a_word_of_the_limit(side: str) -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [
        _feature(tokenizer, messages(i, reply=lambda k: answer(k, words=150 if k % 3 else 6)))
        for i in range(12)
    ]
    kept = slice(-200, None) if side == "left" else slice(None, 200)
    rows = [{name: ids[kept] for name, ids in row.items()} for row in rows]
    found = _found(truetune.audit(loader(rows, _collator(tokenizer)), tokenizer))
    assert ("prompt-cut" in found) == (side == "left")
    assert ("answer-cut" in found) == (side == "right")


@pytest.mark.parametrize("cache", [True, False])
def test_packing_needs_no_cache(cache: bool) -> None:
    """Positions separate conversations only while no cache is filled."""
    subject = mask_over_positions(HOUSE, False)
    subject.model.config.use_cache = cache
    report = truetune.audit(subject.loader, subject.tokenizer, subject.model)
    assert ("packing-needs-no-cache" in report.codes) == cache
    assert report.ok


def test_accumulation_that_cannot_be_asked_is_a_note() -> None:
    tokenizer = HOUSE.tokenizer()

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        raise RuntimeError("only inside a step")

    rows = [
        {"input_ids": (ids := chat_ids(tokenizer, messages(i))), "labels": ids} for i in range(8)
    ]
    settings = {"gradient_accumulation_steps": 4, "compute_loss_func": loss}
    trainer = hf(tokenizer, HOUSE.model(tokenizer), rows, _collator(tokenizer), **settings)
    finding = _found(truetune.audit(trainer))["accumulation-not-measured"]
    assert finding.level == "note"
    assert "only inside a step" in finding.what


@pytest.mark.parametrize("summed", [True, False])
def test_a_loss_of_ones_own_is_asked_and_not_read(summed: bool) -> None:
    """Weights along the row are fine where the sum is divided by the count of the whole step."""
    tokenizer = HOUSE.tokenizer()

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        wanted = labels[:, 1:]
        each = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(), wanted.reshape(-1), reduction="none"
        )
        # A loss that grows along the row, so that rows of other lengths have other means.
        steps = torch.arange(wanted.shape[1]).expand_as(wanted).reshape(-1)
        each = each * (1 + steps / 20)
        own = (wanted != -100).sum() * 2
        return each.sum() / (num_items_in_batch if summed else own)

    rows = []
    for i in range(12):
        ids = chat_ids(tokenizer, messages(i, reply=lambda k: answer(k, words=3 + 30 * (k % 2))))
        rows.append({"input_ids": ids, "labels": ids})
    settings = {"gradient_accumulation_steps": 2, "compute_loss_func": loss}
    trainer = hf(tokenizer, HOUSE.model(tokenizer), rows, _collator(tokenizer), **settings)
    codes = truetune.audit(trainer).codes
    assert ("accumulation-changes-loss" in codes) != summed


def test_prompt_differs_where_the_columns_show_another_system_prompt() -> None:
    """Rows were rendered with a template that is not the one that is saved."""
    tokenizer, other = HOUSE.tokenizer(), HOUSE.tokenizer()
    other.chat_template = other.chat_template.replace("a helpful assistant", "a pirate")
    for source, differs in ((tokenizer, False), (other, True)):
        rows = dataset(
            [{"messages": messages(i), **_feature(source, messages(i))} for i in range(8)]
        )
        trainer = hf(tokenizer, HOUSE.model(tokenizer), rows, _collator(tokenizer))
        found = _found(truetune.audit(trainer))
        assert ("prompt-differs" in found) == differs
        if differs:
            assert "pirate" in found["prompt-differs"].why
            assert found["prompt-differs"].count == 8


@pytest.mark.parametrize("role", ["human", "user"])
def test_a_role_of_the_columns_that_no_server_sends(role: str) -> None:
    tokenizer = HOUSE.tokenizer()
    talks = [[{**messages(i)[0], "role": role}, messages(i)[1]] for i in range(8)]
    rows = dataset([{"messages": talk, **_feature(tokenizer, talk)} for talk in talks])
    trainer = hf(tokenizer, HOUSE.model(tokenizer), rows, _collator(tokenizer))
    found = _found(truetune.audit(trainer))
    assert ("prompt-differs" in found) == (role == "human")
    if role == "human":
        assert "'human'" in found["prompt-differs"].what
        assert found["prompt-differs"].count == 8


def test_rows_of_a_filtered_dataset_are_named_by_the_data_as_well() -> None:
    tokenizer = HOUSE.tokenizer()
    rows = dataset([_feature(tokenizer, messages(i)) | {"keep": i != 2} for i in range(9)])
    rows = rows.map(
        lambda row, i: {"labels": [*row["labels"][:-2], -100, -100]} if i == 5 else row,
        with_indices=True,
    ).filter(lambda row: row["keep"])
    trainer = hf(tokenizer, HOUSE.model(tokenizer), rows, _collator(tokenizer))
    finding = _found(truetune.audit(trainer))["stop-not-supervised"]
    assert finding.where == "train_dataset[4], of the data row 5"
    assert "rows-dropped" not in [f.code for f in truetune.audit(trainer).findings]


@pytest.mark.parametrize("added", ["special", "plain"])
def test_new_tokens_of_a_tokenizer_from_a_folder_are_known(added: str) -> None:
    from bench.sabotage.build import lora
    from peft import get_peft_model

    tokenizer = HOUSE.tokenizer()
    if added == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|map|>"]})
    else:
        tokenizer.add_tokens(["<|map|>"])
    rows = [
        _feature(tokenizer, messages(i, reply=lambda k: f"{answer(k)}<|map|>")) for i in range(8)
    ]
    model = get_peft_model(HOUSE.model(tokenizer), lora())
    found = _found(truetune.audit(loader(rows, _collator(tokenizer)), tokenizer, model))
    assert found["new-token-frozen"].count == 8
    whole = HOUSE.model(tokenizer)
    found = _found(truetune.audit(loader(rows, _collator(tokenizer)), tokenizer, whole))
    assert "new-token-frozen" not in found


@pytest.mark.parametrize("rows", [["embed_tokens"], {"embed_tokens", "lm_head"}])
def test_trainable_token_rows_are_seen_by_side(rows: Any) -> None:
    """peft's list trains the embedding's row only; a mapping with both trains both."""
    from bench.sabotage.build import lora
    from peft import get_peft_model

    tokenizer = HOUSE.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|map|>"]})
    new = tokenizer.convert_tokens_to_ids("<|map|>")
    data = [
        _feature(tokenizer, messages(i, reply=lambda k: f"{answer(k)}<|map|>")) for i in range(8)
    ]
    model = get_peft_model(
        HOUSE.model(tokenizer), lora(trainable_token_indices={name: [new] for name in rows})
    )
    found = _found(truetune.audit(loader(data, _collator(tokenizer)), tokenizer, model))
    if len(rows) == 2:
        assert "new-token-frozen" not in found
    else:
        assert "vectors in the head are frozen" in found["new-token-frozen"].why


def _backwards(size: int) -> Any:
    return torch.arange(size - 1, -1, -1)


def _shuffled(size: int) -> Any:
    return (torch.arange(size) * 7919) % (size + 1)


def _in_pairs(size: int) -> Any:
    return torch.arange(size) // 2


def _from_five(size: int) -> Any:
    return torch.arange(size) + 5


@pytest.mark.parametrize(
    ("positions", "code"),
    [
        (_backwards, "positions-disordered"),
        (_shuffled, "positions-disordered"),
        (_in_pairs, "positions-constant"),
        (torch.arange, None),
        (_from_five, None),
    ],
)
def test_positions_disordered(positions: Any, code: str | None) -> None:
    """Positions that do not count up are told once, and cut no row into documents."""
    tokenizer = HOUSE.tokenizer()
    plain = _collator(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = plain(rows)
        number, size = batch["input_ids"].shape
        batch["position_ids"] = positions(size).expand(number, size).clone()
        return batch

    rows = [_feature(tokenizer, messages(i)) for i in range(8)]
    report = truetune.audit(loader(rows, collate), tokenizer)
    assert report.codes == ((code,) if code else ())
    assert not code or report.findings[0].count == 8


def _with_mask(tokenizer: Any, number: int = 8) -> list[dict[str, Any]]:
    rows = [_feature(tokenizer, messages(i)) for i in range(number)]
    return [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label != -100) for label in row["labels"]],
            "labels": list(row["input_ids"]),
        }
        for row in rows
    ]


@pytest.mark.parametrize("kept", [True, False])
def test_mask_ignored(kept: bool) -> None:
    """A mask that the dataset brings and the trainer does not read; the same mask in the labels."""
    tokenizer = HOUSE.tokenizer()
    rows = _with_mask(tokenizer)
    if kept:
        for row in rows:
            flags = zip(row["labels"], row["completion_mask"], strict=True)
            row["labels"] = [label if flag else -100 for label, flag in flags]
    trainer = hf(tokenizer, HOUSE.model(tokenizer), dataset(rows), _collator(tokenizer))
    report = truetune.audit(trainer)
    assert ("mask-ignored" in report.codes) != kept
    if not kept:
        (finding,) = (f for f in report.findings if f.code == "mask-ignored")
        assert (finding.level, finding.count, finding.where) == ("warning", 8, "train_dataset[0]")
        trained = sum(len(row["labels"]) - 1 for row in rows)
        wanted = sum(sum(row["completion_mask"]) for row in rows)
        assert f"{wanted:,} tokens" in finding.what
        assert f"{trained:,} are supervised" in finding.what
        assert "loss-on-everything" not in report.codes


def test_labels_that_a_collator_makes_anew() -> None:
    """DataCollatorForLanguageModeling writes labels over those of the dataset."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer = HOUSE.tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    rows = [_feature(tokenizer, messages(8 * i)) for i in range(6)]
    size = min(len(row["input_ids"]) for row in rows)
    rows = [row for row in rows if len(row["input_ids"]) == size] * 3
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = hf(tokenizer, HOUSE.model(tokenizer), dataset(rows), collate)
    found = _found(truetune.audit(trainer))
    assert "DataCollatorForLanguageModeling" in found["mask-ignored"].why
    assert "DataCollatorForSeq2Seq" in found["mask-ignored"].fix


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_mask_that_was_switched_off_is_a_choice(asked: bool | None) -> None:
    """TRL reads completion_mask where completion_only_loss says so, and not without it."""
    pytest.importorskip("trl")
    tokenizer = HOUSE.tokenizer()
    rows = [{k: v for k, v in r.items() if k != "labels"} for r in _with_mask(tokenizer)]
    report = truetune.audit(
        trl(tokenizer, HOUSE.model(tokenizer), rows, completion_only_loss=asked)
    )
    assert ("mask-ignored" in report.codes) == (asked is None)


@pytest.mark.parametrize("part", ["question", "answer"])
def test_a_template_that_was_applied_twice_is_told_once(part: str) -> None:
    """Neither as packing, nor as control tokens, nor as empty answers."""
    tokenizer = HOUSE.tokenizer()

    def twice(talk: list[dict[str, str]]) -> list[dict[str, str]]:
        asked, said = talk
        prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        if part == "question":
            return [{"role": "user", "content": prompt}, said]
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        bare = tokenizer.apply_chat_template([asked], tokenize=False)
        return [asked, {"role": "assistant", "content": whole.removeprefix(bare)}]

    rows = [chat_ids(tokenizer, twice(messages(i))) for i in range(8)]
    features = [{"input_ids": ids, "labels": list(ids)} for ids in rows]
    trainer = hf(tokenizer, HOUSE.model(tokenizer), dataset(features), _collator(tokenizer))
    report = truetune.audit(trainer)
    told = {f.code: f.count for f in report.findings if f.level != "note"}
    assert told == {"template-twice": 8}
