"""Prompts rebuilt from ids: silent on every template whose rows are served so, in many set-ups, and
loud where no conversation leads to what stands before an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench.sabotage.build import answered, chat_ids, on_answer
from bench.sabotage.cases.served import OPENS, in_parts
from bench.sabotage.house import House, answer, messages, question, thought

import template_corpus as corpus
from label_rows import check_labels
from truetune import PromptContract
from truetune.contract.contract import Refused
from truetune.data.conversation import Conversation
from truetune.findings import Finding

HOUSE = House(real=False)
# Codes that judge what stands around an answer by the template alone.
JUDGED = frozenset(
    {
        "prompt-differs",
        "header-supervised",
        "answer-hole",
        "stop-doubled",
        "template-unusable",
        "template-twice",
        "marker-in-pieces",
    }
)
N = 12
Features = Sequence[dict[str, Any]]


def found(rows: Features, tokenizer: Any, **more: Any) -> dict[str, Finding]:
    return {f.code: f for f in check_labels(rows, tokenizer, **more)}


# ------------------------------------------------------------------ sound rows of any template


def _talks() -> list[list[dict[str, Any]]]:
    system = {"role": "system", "content": "Be brief.\n\nAnswer in words: user, assistant."}
    odd = "  Two spaces, a tab\t, and\n\n<b>bold</b> [INST] user: assistant\n1. one\n"
    one: list[list[dict[str, Any]]] = [messages(i) for i in range(3)]
    three = [messages(i, turns=3) for i in range(3, 6)]
    rest = [[system, *messages(i, turns=2)] for i in range(6, 9)]
    strange = [
        [{"role": "user", "content": odd.strip() + str(i)}, {"role": "assistant", "content": odd}]
        for i in range(3)
    ]
    return [*one, *three, *rest, *strange]


def _encoded(contract: PromptContract) -> Features:
    """Rows whose prompts are proved to be the served ones."""
    rows = [Conversation(tuple(talk), f"r:{i}") for i, talk in enumerate(_talks())]
    made = [r for r in contract.fit(rows).encode_all(rows) if not isinstance(r, Refused)]
    return [
        {
            "input_ids": example.ids,
            "labels": [i if on else -100 for i, on in zip(*example, strict=True)],
        }
        for encoded in made
        for example in encoded
    ]


@pytest.mark.parametrize("name", corpus.CONTROL)
def test_rows_of_our_own_templates_are_as_served(name: str) -> None:
    contract = corpus.own_contract(name)
    rows = _encoded(contract)
    told = found(rows, contract.tokenizer, stop_ids=contract.stop_ids)
    assert {c: f.why for c, f in told.items() if c in JUDGED} == {}


@pytest.mark.slow
@pytest.mark.skipif(not corpus.OFFICIAL, reason="the shared templates are not here")
@pytest.mark.parametrize("path", corpus.OFFICIAL, ids=lambda p: p.stem)
def test_rows_of_published_templates_are_as_served(path: Any) -> None:
    contract = corpus.official_contract(path)
    rows = _encoded(contract)
    told = found(rows, contract.tokenizer, stop_ids=contract.stop_ids)
    assert {c: f.why for c, f in told.items() if c in JUDGED} == {}


# ------------------------------------------------------------------ healthy set-ups


def whole() -> tuple[Features, Any]:
    """Loss on everything."""
    tokenizer = HOUSE.tokenizer()
    ids = [chat_ids(tokenizer, messages(i, turns=2)) for i in range(N)]
    return [{"input_ids": row, "labels": row} for row in ids], tokenizer


def system() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer()
    said = ("", "Be brief.", "You are a pirate.\nSpeak so.")
    talks = [[{"role": "system", "content": said[i % 3]}, *messages(i)] for i in range(N)]
    return [on_answer(tokenizer, talk) for talk in talks], tokenizer


def history_masked() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer()
    return [on_answer(tokenizer, messages(i, turns=3)) for i in range(N)], tokenizer


def apart() -> tuple[Features, Any]:
    """Prompt and completion encoded one after the other."""
    tokenizer = HOUSE.tokenizer()
    rows = []
    for i in range(N):
        prompt = tokenizer.apply_chat_template(
            messages(i)[:1], tokenize=False, add_generation_prompt=True
        )
        rows.append(in_parts(tokenizer, prompt, f"{answer(i)}<|im_end|>"))
    return rows, tokenizer


def padded_left() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer()
    rows = []
    for i in range(N):
        row = on_answer(tokenizer, messages(i))
        gap = 120 - len(row["input_ids"])
        rows.append(
            {
                "input_ids": [tokenizer.pad_token_id] * gap + row["input_ids"],
                "labels": [-100] * gap + row["labels"],
                "attention_mask": [0] * gap + [1] * len(row["labels"]),
            }
        )
    return rows, tokenizer


def packed() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer()
    rows = []
    for i in range(N):
        parts = [on_answer(tokenizer, messages(3 * i + k, turns=1 + k)) for k in range(3)]
        rows.append(
            {
                "input_ids": [t for p in parts for t in p["input_ids"]],
                "labels": [t for p in parts for t in p["labels"]],
                "position_ids": [n for p in parts for n in range(len(p["labels"]))],
            }
        )
    return rows, tokenizer


def begin_token() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer("bos")
    return [on_answer(tokenizer, messages(i, turns=2)) for i in range(N)], tokenizer


def without_begin_token() -> tuple[Features, Any]:
    """That is told of the begin token, and once."""
    rows, tokenizer = begin_token()
    return [{k: v[1:] for k, v in row.items()} for row in rows], tokenizer


def thinking() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer("thinking")
    talks = [messages(i, reply=thought if i % 2 else answer) for i in range(N)]
    return [on_answer(tokenizer, talk) for talk in talks], tokenizer


def opened() -> tuple[Features, Any]:
    """Behind the block that the served prompt opens."""
    tokenizer = HOUSE.tokenizer()
    tokenizer.chat_template = OPENS
    rows = []
    for i in range(N):
        prompt = tokenizer.apply_chat_template(
            messages(i)[:1], tokenize=False, add_generation_prompt=True
        )
        rows.append(
            in_parts(tokenizer, prompt, thought(i).removeprefix("<think>\n") + "<|im_end|>")
        )
    return rows, tokenizer


def dated() -> tuple[Features, Any]:
    """Rows that were rendered on other days."""
    tokenizer = HOUSE.tokenizer()
    tokenizer.chat_template = (
        "{{- '<|im_start|>system\\nToday is ' ~ strftime_now('%d %B %Y') ~ '.<|im_end|>\\n' -}}"
        + HOUSE.tokenizer().chat_template.partition("{%- endif -%}")[2]
    )
    rows = []
    for i in range(N):
        contract = PromptContract.load(tokenizer, date=f"2025-0{1 + i % 9}-1{i % 8}")
        prompt = contract.prompt_text(messages(i)[:1])
        rows.append(in_parts(tokenizer, prompt, f"{answer(i)}<|im_end|>"))
    return rows, tokenizer


def labels_alone() -> tuple[Features, Any]:
    """A classification: one word an answer."""
    tokenizer = HOUSE.tokenizer()
    talks = [messages(i, reply=lambda k: ("yes", "no")[k % 2]) for i in range(N)]
    return [on_answer(tokenizer, talk) for talk in talks], tokenizer


def raw_text() -> tuple[Features, Any]:
    tokenizer = HOUSE.tokenizer("base")
    ids = [[*tokenizer(answer(i, words=40))["input_ids"], tokenizer.eos_token_id] for i in range(N)]
    return [{"input_ids": row, "labels": row} for row in ids], tokenizer


def tools_in_system() -> tuple[Features, Any]:
    """Schemas and replies of tools in the text of turns, as some write them by hand."""
    tokenizer = HOUSE.tokenizer()
    head = {"role": "system", "content": '# Tools\n<tools>\n{"name": "weather"}\n</tools>'}
    talks = []
    for i in range(N):
        call = {"role": "assistant", "content": '<tool_call>\n{"name": "weather"}\n</tool_call>'}
        reply = {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}
        talks.append([head, messages(i)[0], call, reply, {"role": "assistant", "content": "Rain."}])
    return [on_answer(tokenizer, talk) for talk in talks], tokenizer


def environment_masked() -> tuple[Features, Any]:
    """What a search engine wrote into the answer has no labels."""
    tokenizer = HOUSE.tokenizer()
    rows = []
    for i in range(N):
        talk = messages(i, reply=lambda k: f"I look. INFO{question(k)}INFO {answer(k)}")
        ids, start = answered(tokenizer, talk)
        labels = [-100] * start + ids[start:]
        labels[start + 8 : start + 30] = [-100] * 22
        rows.append({"input_ids": ids, "labels": labels})
    return rows, tokenizer


def tensors() -> tuple[Features, Any]:
    rows, tokenizer = history_masked()
    return [{k: torch.tensor(v) for k, v in row.items()} for row in rows], tokenizer


HEALTHY: tuple[Callable[[], tuple[Features, Any]], ...] = (
    *(whole, system, history_masked, apart, padded_left, packed, begin_token, thinking, opened),
    *(without_begin_token, dated, labels_alone, raw_text, tools_in_system, environment_masked),
    tensors,
)


@pytest.mark.parametrize("make", HEALTHY)
def test_healthy_set_ups_are_left_in_peace(make: Callable[[], tuple[Features, Any]]) -> None:
    rows, tokenizer = make()
    told = found(rows, tokenizer)
    assert {c: (f.what, f.why) for c, f in told.items() if c in JUDGED} == {}


# ------------------------------------------------------------------ rows that are not served so


def test_a_mark_in_some_rows_is_found_in_those() -> None:
    tokenizer = HOUSE.tokenizer()
    rows = []
    for i in range(N):
        prompt = tokenizer.apply_chat_template(
            messages(i)[:1], tokenize=False, add_generation_prompt=True
        )
        prompt = prompt.replace("helpful assistant", "clumsy assistant") if i % 4 == 1 else prompt
        prompt = prompt.replace("assistant\n", "assistant: ") if i % 4 == 3 else prompt
        rows.append(in_parts(tokenizer, prompt, f"{answer(i)}<|im_end|>"))
    told = found(rows, tokenizer)["prompt-differs"]
    # Another system message is what a user may send; a colon in the header is nobody's.
    assert told.level == "error"
    assert [int(place.split()[-1]) for place in told.rows] == [3, 7, 11]
    assert ": " in told.why


def test_rows_without_an_answer_among_others_are_passed_over() -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(N)]
    text = tokenizer(answer(1, words=30))["input_ids"]
    rows[4] = {"input_ids": text, "labels": text}
    assert "prompt-differs" not in found(rows, tokenizer)


def test_selected_tokens_are_a_choice() -> None:
    """Many holes in each answer are made on purpose; one in each is not."""
    tokenizer = HOUSE.tokenizer()
    for times, level in ((6, "note"), (1, "error")):
        rows = []
        for i in range(N):
            row = on_answer(tokenizer, messages(i, reply=lambda k: answer(k, words=60)))
            start = next(k for k, label in enumerate(row["labels"]) if label != -100)
            for hole in range(times):
                row["labels"][start + 3 + 4 * hole] = -100
            rows.append(row)
        assert found(rows, tokenizer)["answer-hole"].level == level


def test_a_second_end_behind_the_last_answer_is_a_note() -> None:
    tokenizer = HOUSE.tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = []
    for i in range(N):
        row = on_answer(tokenizer, messages(i))
        rows.append({k: [*v[:-1], end] for k, v in row.items()})
    told = found(rows, tokenizer)
    assert told["stop-doubled"].level == "note"
    assert "prompt-differs" not in told


# ------------------------------------------------------------------ whitespace before the answer


def _spaced(tokenizer: Any, extra: str, begins: str = "", *, every: int = 1) -> list[Any]:
    """(prompt, answer) texts; `extra` ends the prompts and `begins` opens the answers of some."""
    texts = []
    for i in range(2 * N):
        prompt = tokenizer.apply_chat_template(
            messages(i)[:1], tokenize=False, add_generation_prompt=True
        )
        some = i % every == 0
        said = f"{begins if some else ''}{answer(i)}<|im_end|>"
        texts.append((prompt + (extra if some else ""), said))
    return texts


def _joined(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> Features:
    """Prompt and answer tokenized in one, and every token a target."""
    ids = [tokenizer(a + b, add_special_tokens=False)["input_ids"] for a, b in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


def _merging() -> Any:
    """Two line breaks are one token, as in most vocabularies."""
    tokenizer = HOUSE.tokenizer()
    tokenizer.add_tokens(["\n\n"])
    return tokenizer


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("merges", [True, False])
def test_a_line_break_more_in_the_prompt_is_not_served(merges: bool, every: int) -> None:
    tokenizer = _merging() if merges else HOUSE.tokenizer()
    rows = [in_parts(tokenizer, *pair) for pair in _spaced(tokenizer, "\n", every=every)]
    told = found(rows, tokenizer)["prompt-differs"]
    assert (told.level, told.count) == ("error", 2 * N // every)
    assert "whitespace" in told.what
    assert "assistant\\n\\n' where a server sends " in told.why


def test_a_line_break_more_is_seen_without_a_mask() -> None:
    tokenizer = _merging()
    rows = _joined(tokenizer, _spaced(tokenizer, "\n"))
    assert "whitespace" in found(rows, tokenizer)["prompt-differs"].what


@pytest.mark.parametrize("merges", [True, False])
def test_answers_that_begin_with_a_line_break_are_their_own(merges: bool) -> None:
    tokenizer = _merging() if merges else HOUSE.tokenizer()
    rows = [in_parts(tokenizer, *pair) for pair in _spaced(tokenizer, "", "\n")]
    assert "prompt-differs" not in found(rows, tokenizer)
    # A few that were joined to their prompts first have another token there, and are no pattern.
    rows = list(_joined(tokenizer, _spaced(tokenizer, "", "\n", every=N)))
    assert "prompt-differs" not in found(rows, tokenizer)


# ------------------------------------------------------------------ questions that are gone


def _asked(tokenizer: Any, prompt: Callable[[int, str], str], every: int = 3) -> Features:
    rows = []
    for i in range(3 * N):
        served = tokenizer.apply_chat_template(
            messages(i)[:1], tokenize=False, add_generation_prompt=True
        )
        text = prompt(i, served) if i % every == 0 else served
        rows.append(in_parts(tokenizer, text, f"{answer(i)}<|im_end|>"))
    return rows


def _without_turn(i: int, served: str) -> str:
    return served.partition("<|im_start|>user")[0] + "<|im_start|>assistant\n"


def _with_empty_turn(i: int, served: str) -> str:
    return served.replace(question(i), "")


@pytest.mark.parametrize("prompt", [_without_turn, _with_empty_turn])
@pytest.mark.parametrize("every", [1, 3])
def test_answers_to_no_question(prompt: Callable[[int, str], str], every: int) -> None:
    tokenizer = HOUSE.tokenizer()
    told = found(_asked(tokenizer, prompt, every), tokenizer)
    assert (told["question-missing"].level, told["question-missing"].count) == (
        "error",
        3 * N // every,
    )


def test_many_answers_to_one_question_and_greetings_are_none_of_that() -> None:
    tokenizer = HOUSE.tokenizer()

    def same(i: int, served: str) -> str:
        return served.replace(question(i), "Write a sentence.")

    assert "question-missing" not in found(_asked(tokenizer, same), tokenizer)
    hello = {"role": "assistant", "content": "Hello."}
    rows = []
    for i in range(N):
        # The assistant greets first, in words of its own.
        ids = chat_ids(tokenizer, [{**hello, "content": f"Hello {i}."}, *messages(i)])
        rows.append({"input_ids": ids, "labels": ids})
    assert "question-missing" not in found(rows, tokenizer)
    # The instruction is the system message, another one in each row.
    alone = [
        on_answer(tokenizer, [{"role": "system", "content": question(i)}, messages(i)[1]])
        for i in range(N)
    ]
    assert "question-missing" not in found(alone, tokenizer)


def test_turns_of_unknown_roles_that_a_template_left_out() -> None:
    tokenizer = HOUSE.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- for m in messages -%}",
        "{%- for m in messages if m.role in ('system', 'user', 'assistant') -%}",
    )
    roles = {"user": "human", "assistant": "gpt"}
    ids = [
        chat_ids(tokenizer, [{**m, "role": roles[m["role"]]} for m in messages(i)])
        for i in range(N)
    ]
    told = found([{"input_ids": row, "labels": row} for row in ids], tokenizer)
    assert "unknown roles" in told["prompt-not-served"].why


# ------------------------------------------------------------------ markers that are gone


@pytest.mark.parametrize("kind", ["instruct", "bos"])
def test_rows_that_lost_their_control_tokens(kind: Any) -> None:
    tokenizer = HOUSE.tokenizer(kind)
    rows = []
    for i in range(N):
        talk = [{"role": "system", "content": "Be brief."}, *messages(i, turns=2)]
        text = tokenizer.decode(chat_ids(tokenizer, talk), skip_special_tokens=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    told = found(rows, tokenizer)
    assert {c: f.level for c, f in told.items()} == {"markers-lost": "error"}
    assert told["markers-lost"].count == N


def test_texts_that_speak_of_users_and_assistants_lost_no_markers() -> None:
    tokenizer = HOUSE.tokenizer()
    texts = [
        f"The roles of a chat are these:\nuser\n{question(i)}\nassistant\n{answer(i)}"
        for i in range(N)
    ]
    ids = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    assert "markers-lost" not in found(rows, tokenizer)


# ------------------------------------------------------------------ documents among conversations


def _documents(tokenizer: Any, end: bool = True) -> Features:
    rows = []
    for i in range(N):
        ids = tokenizer(answer(i, words=40) + f" {question(i)}", add_special_tokens=False)
        row = ids["input_ids"] + ([tokenizer.pad_token_id] if end else [])
        rows.append({"input_ids": row, "labels": row})
    return rows


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("everything", [True, False])
def test_plain_text_among_conversations_is_a_note(end: bool, everything: bool) -> None:
    tokenizer = HOUSE.tokenizer()
    chats = [on_answer(tokenizer, messages(i)) for i in range(N)]
    if everything:
        chats = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in chats]
    told = found([*_documents(tokenizer, end), *chats], tokenizer)
    assert told.pop("plain-text-rows").count == N
    assert {c: f.level for c, f in told.items() if f.level != "note"} == {}


def test_another_form_among_conversations_is_no_plain_text() -> None:
    """Neither with labels on all, nor where the prompt has none; nor plain text alone."""
    tokenizer = HOUSE.tokenizer()
    chats = [on_answer(tokenizer, messages(i)) for i in range(N)]
    head, end = "### Question:\n{}\n\n### Answer:\n", tokenizer.eos_token
    pairs = [(head.format(question(i)), answer(i) + end) for i in range(N)]
    for rows in (_joined(tokenizer, pairs), [in_parts(tokenizer, *pair) for pair in pairs]):
        told = found([*rows, *chats], tokenizer)
        assert "plain-text-rows" not in told
        assert told["prompt-not-served"].level == "error"
    assert "plain-text-rows" not in found(_documents(tokenizer), tokenizer)
