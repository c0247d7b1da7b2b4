"""Choices about prompts and answers: reasoning, history, system turns, switches, dates, stops."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

import template_corpus as corpus
import tiny_contracts as tiny
from template_corpus import WEATHER, call, own_contract, result, said
from tiny_contracts import byte_level, chat, supervised_texts
from truetune import PromptContract, UnfaithfulTemplate
from truetune.contract.policy import Policy
from truetune.data.conversation import Conversation

pytestmark = pytest.mark.filterwarnings("error")

PLAIN = chat("Hi", "Hello.", "Bye", "See you.")


def reasoned(*thoughts: str) -> list[dict[str, Any]]:
    """PLAIN, its answers with reasoning; "" is none."""
    rows = [dict(message) for message in PLAIN]
    for message, thought in zip(rows[1::2], thoughts, strict=True):
        if thought:
            message["reasoning_content"] = thought
    return rows


THOUGHT = reasoned("first", "second")


def texts(contract: PromptContract, row: Any, **more: Any) -> list[str]:
    return supervised_texts(contract, contract.encode(row, **more))


def refusal(contract: PromptContract, row: Any, **more: Any) -> UnfaithfulTemplate:
    with pytest.raises(UnfaithfulTemplate) as caught:
        contract.encode(row, **more)
    return caught.value


# ------------------------------------------------------------------ reasoning


def test_inline_reasoning_stands_between_markers_in_the_content() -> None:
    assert refusal(own_contract("plain"), THOUGHT).code == "target-dropped"
    contract = own_contract("plain", policy=Policy(reasoning="inline"))
    encoded = contract.encode(THOUGHT)
    assert (len(encoded), encoded.route) == (1, "inline")
    expected = [
        "<think>\nfirst\n</think>\n\nHello.<|done|>",
        "<think>\nsecond\n</think>\n\nSee you.<|done|>",
    ]
    assert supervised_texts(contract, encoded) == expected
    # It is what a row with the markers in its content becomes, and plain rows stay plain.
    written = [dict(m) for m in PLAIN]
    for message, thought in zip(written[1::2], ("first", "second"), strict=True):
        message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    assert list(own_contract("plain").encode(written)) == list(encoded)
    assert list(contract.encode(PLAIN)) == list(own_contract("plain").encode(PLAIN))


def test_inline_markers_of_ones_own() -> None:
    policy = Policy(reasoning="inline", think_markers=("[R]", "[/R]"))
    contract = own_contract("plain", policy=policy)
    assert texts(contract, THOUGHT)[0] == "[R]\nfirst\n[/R]\n\nHello.<|done|>"
    assert contract.as_dict()["policy"]["think_markers"] == ["[R]", "[/R]"]


@pytest.mark.parametrize("name", ["plain", "hybrid_switch", "channels"])
def test_dropped_reasoning_is_not_there(name: str) -> None:
    policy = Policy(reasoning="drop")
    contract = own_contract(name, policy=policy).fit([THOUGHT])
    assert list(contract.encode(THOUGHT)) == list(contract.encode(PLAIN))
    assert contract.template_kwargs == own_contract(name).fit([PLAIN]).template_kwargs


@pytest.mark.parametrize("name", ["plain", "hybrid_switch"])
def test_reasoning_inside_the_content_is_dropped_too(name: str) -> None:
    contract = own_contract(name, policy=Policy(reasoning="drop"), template_kwargs={})
    inside = chat("Hi", "<think>\nfirst\n</think>\n\nHello.")
    if name == "plain":
        assert list(contract.encode(inside)) == list(contract.encode(chat("Hi", "Hello.")))
    fitted = own_contract(name, policy=Policy(reasoning="drop")).fit([inside])
    assert not any("first" in text for text in supervised_texts(fitted, fitted.encode(inside)))


def test_an_answer_that_mentions_a_marker_keeps_it() -> None:
    kept = chat("Hi", "The marker <think> opens it, </think> closes it.")
    dropping = own_contract("plain", policy=Policy(reasoning="drop"))
    assert list(dropping.encode(kept)) == list(own_contract("plain").encode(kept))


@pytest.mark.parametrize("answer", ["Hello.", "\nHello.", "\n\n", ""])
def test_an_opened_block_is_closed_at_once_where_that_is_asked(answer: str) -> None:
    row = chat("Hi", answer)
    assert refusal(own_contract("opens_thinking"), row).code == "thinking-only"
    contract = own_contract("opens_thinking", policy=Policy(reasoning="empty"))
    encoded = contract.encode(row)
    assert supervised_texts(contract, encoded) == [f"</think>\n{answer}<|end|>"]
    assert encoded.remarks == ("reasoning-empty",)
    # A row with reasoning has its own.
    assert texts(contract, THOUGHT)[0] == "first\n</think>\nHello.<|end|>"


@pytest.mark.parametrize("answer", ["Hello.", "\nHello.", "\n\n", ""])
def test_an_empty_block_is_not_learned(answer: str) -> None:
    row = chat("Hi", answer)
    assert refusal(own_contract("empty_block_always"), row).code == "target-invented"
    contract = own_contract("empty_block_always", policy=Policy(reasoning="empty"))
    encoded = contract.encode(row)
    assert supervised_texts(contract, encoded) == [f"{answer}<|m_end|>"]
    assert encoded.remarks == ("thinking-unlearned",)


def test_the_templates_own_switch_comes_before_a_block_closed_by_hand() -> None:
    contract = own_contract("hybrid_mode", policy=Policy(reasoning="empty")).fit([PLAIN])
    assert contract.template_kwargs == {"thinking_mode": "disabled"}
    encoded = contract.encode(PLAIN)
    assert supervised_texts(contract, encoded) == ["Hello.[end~", "See you.[end~"]
    assert encoded.remarks == ()


def test_a_think_block_in_the_content_is_reasoning_where_the_template_deletes_it() -> None:
    contract = own_contract("opens_thinking_deletes")
    row = chat("Hi", "<think>\nfirst\n</think>\n\nHello.")
    assert texts(contract, row) == ["first\n</think>\n\nHello.<|end_of_sentence|>"]
    assert list(contract.encode(row)) == list(contract.encode([*THOUGHT[:2]]))
    assert refusal(own_contract("opens_thinking_deletes"), PLAIN).code == "thinking-only"


# ------------------------------------------------------------------ history and system


def test_history_without_reasoning() -> None:
    as_data = own_contract("hybrid_mode").encode(THOUGHT)
    assert as_data.turns == ((1, 3),)
    contract = own_contract("hybrid_mode", policy=Policy(history="no-reasoning"))
    encoded = contract.encode(THOUGHT)
    assert encoded.turns == ((1,), (3,))
    expected = ["first</seed:think>Hello.[end~", "second</seed:think>See you.[end~"]
    assert supervised_texts(contract, encoded) == expected
    whole = contract.tokens.decode(encoded[1].ids)
    assert "first" not in whole
    served = contract.prompt_ids(THOUGHT[:3])
    assert encoded[1].ids[: len(served)] == served


def test_a_system_turn_is_merged_only_where_that_is_asked() -> None:
    row = chat("Hi", "Hello.", "Bye", "See you.", system="Be short.")
    assert refusal(own_contract("no_system"), row).code == "template-refuses"
    contract = own_contract("no_system", policy=Policy(system="merge"))
    encoded = contract.encode(row)
    # Turns are counted as the row counts them.
    assert encoded.turns == ((2, 4),)
    assert supervised_texts(contract, encoded) == ["Hello.<turn_end>", "See you.<turn_end>"]
    begin = "<turn_start>user\nBe short.\n\nHi<turn_end>\n<turn_start>model\n"
    assert contract.prompt_text(row[:2]) == begin
    served = contract.prompt_ids(row[:4])
    assert encoded[0].ids[: len(served)] == served
    assert list(contract.encode(PLAIN)) == list(own_contract("no_system").encode(PLAIN))


# ------------------------------------------------------------------ switches


def test_thinking_asked_for_by_hand_is_unlearned_by_plain_rows() -> None:
    contract = own_contract("hybrid_switch", template_kwargs={"enable_thinking": True})
    fitted = contract.fit([PLAIN])
    assert fitted.template_kwargs == {"enable_thinking": True}
    encoded = fitted.encode(PLAIN)
    assert supervised_texts(fitted, encoded) == ["Hello.<|im_stop|>", "See you.<|im_stop|>"]
    assert encoded.remarks == ("thinking-unlearned",) * 2
    (one,) = fitted.encode(PLAIN[:2])
    prompt = fitted.prompt_ids(PLAIN[:1])
    assert one.ids[: len(prompt)] == prompt
    assert one.mask == [0] * len(prompt) + [1] * (len(one.ids) - len(prompt))
    assert "think" not in fitted.tokens.decode(one.ids)
    assert "thinking-unlearned" not in fitted.encode(THOUGHT).remarks


DEFAULT_OFF = tiny.PLAIN.replace(
    "'<|assistant|>\\n'",
    "'<|assistant|>\\n<think>\\n' ~ ('' if deep is defined and deep else '\\n</think>\\n\\n')",
)


def test_fit_turns_a_switch_on_for_rows_that_reason() -> None:
    contract = PromptContract.load(byte_level(), DEFAULT_OFF)
    assert refusal(contract, THOUGHT).code == "thinking-off"
    assert "--template-arg deep=true" in refusal(contract, THOUGHT).fix
    fitted = contract.fit([THOUGHT])
    assert fitted.template_kwargs == {"deep": True}
    assert texts(fitted, THOUGHT)[1] == "second\n</think>\n\nSee you.<|end|>"
    assert contract.fit([PLAIN]).template_kwargs == {}
    assert texts(contract, PLAIN)[1] == "See you.<|end|>"


def test_fit_looks_at_the_turns_that_are_trained() -> None:
    contract = own_contract("hybrid_switch")
    row = reasoned("", "second")
    fitted = contract.fit([row], loss_on="last")
    assert fitted.template_kwargs == {}
    expected = ["<think>\nsecond\n</think>\n\nSee you.<|im_stop|>"]
    assert texts(fitted, row, loss_on="last") == expected
    # Under no argument do both of its turns fit.
    assert refusal(contract.fit([row]), row).code in ("target-invented", "thinking-off")
    first = reasoned("first", "")
    assert contract.fit([first], loss_on="last").template_kwargs in ({}, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("hybrid_switch", "enable_thinking=false"),
        ("hybrid_mode", 'thinking_mode="disabled"'),
    ],
)
def test_a_refusal_names_the_argument_that_would_take_the_row(name: str, argument: str) -> None:
    contract = own_contract(name)
    error = refusal(contract, PLAIN)
    assert f"--template-arg {argument} " in error.fix
    key, _, value = argument.partition("=")
    row = Conversation(tuple(PLAIN), "f:1", template_kwargs={key: json.loads(value)})
    assert len(contract.encode(row).turns) >= 1
    # One without such an argument does not name any.
    assert "would accept this row" not in refusal(own_contract("opens_thinking"), PLAIN).fix


@pytest.mark.parametrize(
    "copied",
    [
        "{%- set m = mode -%}{%- set n = m | default('on') -%}{%- set closed = n == 'off' -%}",
        "{%- set ns = namespace(m='on') -%}{%- if mode is defined -%}{%- set ns.m = mode -%}"
        "{%- endif -%}{%- set closed = ns.m == 'off' -%}",
        "{%- set closed = (mode | default('on') | lower) in ['off', 'none'] -%}",
    ],
)
def test_a_switch_is_found_through_other_names(copied: str) -> None:
    source = copied + DEFAULT_OFF.replace("deep is defined and deep", "not closed")
    contract = PromptContract.load(byte_level(), source)
    assert contract.fit([PLAIN]).template_kwargs == {"mode": "off"}
    assert contract.fit([THOUGHT]).template_kwargs == {}


# ------------------------------------------------------------------ names, dates, forms


def test_named_templates_are_saved_and_read_back() -> None:
    contract = own_contract("named", template_kwargs={"unread": "x"})
    saved = contract.saved_template()
    assert isinstance(saved, dict)
    assert set(saved) == {"default", "tool_use"}
    tokenizer = corpus.own_tokenizer("named")
    tokenizer.chat_template = saved
    again = PromptContract.load(tokenizer)
    row = [said("user", "Oslo?"), said("assistant", "", tool_calls=[call("Oslo")])]
    for messages, tools in ((PLAIN, None), (row, [WEATHER])):
        assert list(again.encode(messages, tools)) == list(contract.encode(messages, tools))
    assert again.prompt_text(row[:1], [WEATHER]).startswith("<|tools|>weather: ")
    assert not again.prompt_text(row[:1]).startswith("<|tools|>")
    assert again.fingerprint() == PromptContract.load(tokenizer).fingerprint()
    only = PromptContract.load(tokenizer, "tool_use")
    assert only.tool_template is None
    assert only.origin.endswith("named tool_use")


def test_a_date_stands_still_and_is_told() -> None:
    contract = own_contract("dated")
    assert "Today is 05 March 2026." in contract.prompt_text(PLAIN[:1])
    (note,) = (f for f in contract.findings if f.code == "template-date")
    assert corpus.DATE in note.what
    assert contract.as_dict()["date"] == contract.date == corpus.DATE
    today = PromptContract.load(corpus.own_tokenizer("dated"))
    assert today.date
    assert datetime.date.fromisoformat(today.date) <= datetime.date.today()
    assert not [f for f in own_contract("plain").findings if f.code == "template-date"]


@pytest.mark.parametrize("name", ["plain", "string_arguments", "next_role_ends", "system_moves"])
def test_arguments_of_calls_may_be_an_object_or_its_text(name: str) -> None:
    contract = own_contract(name)
    whole = call("Troms\u00f8")
    text = json.dumps(whole["function"]["arguments"])
    as_text = {**whole, "function": {**whole["function"], "arguments": text}}
    rows = [
        [
            said("user", "Oslo?"),
            said("assistant", "", tool_calls=[c]),
            result("1"),
            said("assistant", "ok"),
        ]
        for c in (whole, as_text)
    ]
    first, second = (contract.encode(row, [WEATHER]) for row in rows)
    assert list(first) == list(second)
    assert "Troms\u00f8" in supervised_texts(contract, first)[0]


# ------------------------------------------------------------------ ends


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("plain", ["<|end|>", "<|done|>"]),
        ("other_end_last", ["<|end|>", "<|return|>"]),
        ("next_role_ends", ["<|end|>", "<|user|>", "<|observation|>"]),
        ("single_call", ["<|end|>", "<|eot|>", "<|eom|>"]),
        ("channels", ["<|return|>", "<|call|>"]),
        ("closed_by_nothing", ["<|end|>"]),
    ],
)
def test_the_ends_of_answers_and_of_calls(name: str, stops: list[str]) -> None:
    contract = own_contract(name)
    assert [contract.tokens.decode([i]) for i in contract.stop_ids] == stops
    added = [f for f in contract.findings if f.code == "stop-added"]
    assert len(added) == len(stops) - 1


def test_an_end_is_appended_where_the_template_writes_none_and_that_is_told() -> None:
    encoded = own_contract("closed_by_nothing").encode(PLAIN[:2])
    assert "stop-appended" in encoded.remarks
    assert "stop-appended" not in own_contract("next_role_ends").encode(PLAIN[:2]).remarks


def test_what_stands_behind_the_end_is_named() -> None:
    behind = tiny.PLAIN.replace(
        "m.content ~ '<|end|>\\n' -}}",
        "m.content ~ '<|end|>' -}}{%- for c in m.tool_calls or [] -%}"
        "{{- c.function | tojson -}}{%- endfor -%}{{- '<|end|>\\n' -}}",
    )
    contract = PromptContract.load(byte_level(), behind)
    row = [said("user", "Oslo?"), said("assistant", "Let me see.", tool_calls=[call("Oslo")])]
    error = refusal(contract, row, tools=[WEATHER])
    assert error.code == "target-behind-stop"
    assert "follows 'Let me see.'" in error.why
    assert texts(contract, PLAIN) == ["Hello.<|end|>", "See you.<|end|>"]


def test_a_dropped_call_is_said_before_a_missing_end() -> None:
    row = [said("user", "Oslo?"), said("assistant", "", tool_calls=[call("Oslo")])]
    assert refusal(own_contract("closed_by_nothing"), row).code == "target-dropped"


def test_the_letter_for_a_space_is_a_letter_where_the_tokenizer_has_none() -> None:
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    contract = PromptContract.load(tokenizer)
    encoded = contract.encode(chat("Hi", "\u2581A\u0300"))
    assert supervised_texts(contract, encoded) == ["\u2581\u00c0<|end|>"]
    assert encoded.remarks == ("normalised",)


def test_tools_may_be_bare_functions() -> None:
    contract = PromptContract.load(byte_level(), tiny.TOOLS)
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    wrapped = [{"type": "function", "function": function}]
    row = chat("Sum?", "yes")
    assert contract.prompt_ids(row[:1], [function]) == contract.prompt_ids(row[:1], wrapped)
    assert list(contract.encode(row, [function])) == list(contract.encode(row, wrapped))
    with pytest.raises(UnfaithfulTemplate, match="a tool has no name"):
        contract.encode(row, [{"parameters": {}}])
