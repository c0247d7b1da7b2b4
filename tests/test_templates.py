"""Any conversation on any of our templates: what is learned is what a formula written by hand says.

The formulas (`HABITS`) know a template as its author does; the contract only sees what it renders.
Prompts are those of transformers itself, in this process.
"""

from __future__ import annotations

import datetime
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import template_corpus as corpus
from template_corpus import WEATHER, said
from tiny_contracts import byte_fallback, byte_level
from truetune import Encoded, PromptContract, UnfaithfulTemplate
from truetune.data.conversation import Conversation

pytestmark = pytest.mark.filterwarnings("error")

Row = list[dict[str, Any]]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_is(text: str) -> str:
    return text


@dataclass(frozen=True)
class Habit:
    """What the author of a template knows of it.

    Attributes:
        end: what ends an answer.
        lead: what the model writes before an answer without reasoning.
        think: what stands before and behind reasoning in a completion; None where there is none.
        thought, shown: how reasoning and content are written.
        calls: text of a turn of calls up to and with its end, given (name, arguments) of each.
        call_think: what stands behind reasoning in front of a call.
        max_calls: in one turn.
        call_content: whether content is written beside calls.
        plain: arguments under which rows without reasoning fit, or the code of their refusal.
        system: whether a system turn is taken.
        reasoning: the field of a message that holds it.
        branches: whether each turn of a plain row is a sequence of its own.
    """

    end: str
    lead: str = ""
    think: tuple[str, str] | None = None
    thought: Callable[[str], str] = _as_is
    shown: Callable[[str], str] = _as_is
    calls: Callable[[Sequence[tuple[str, Any]]], str] | None = None
    call_think: str | None = None
    max_calls: int = 3
    call_content: bool = True
    plain: Mapping[str, Any] | str = field(default_factory=dict)
    system: bool = True
    reasoning: str = "reasoning_content"
    branches: bool = False


def _each(form: Callable[[str, Any], str], end: str, between: str = "") -> Any:
    return lambda calls: between.join(form(name, value) for name, value in calls) + end


def _argument_tags(name: str, values: Mapping[str, Any]) -> str:
    tags = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{v if isinstance(v, str) else _json(v)}</arg_value>"
        for key, v in values.items()
    )
    return f"<tool_call>{name}{tags}</tool_call>"


def _no_breaks(text: str) -> str:
    return text.strip("\n")


HABITS: dict[str, Habit] = {
    "plain": Habit(
        "<|done|>",
        calls=_each(
            lambda n, a: f"<|call|>{_json({'name': n, 'with': a})}<|/call|>",
            "<|done|>",
        ),
    ),
    "history_without_thinking": Habit("<eot>", think=("<think>", "</think>")),
    "hybrid_switch": Habit(
        "<|im_stop|>",
        think=("<think>\n", "\n</think>\n\n"),
        thought=_no_breaks,
        calls=_each(
            lambda n, a: f"\n<tool_call>\n{_json({'name': n, 'arguments': a})}\n</tool_call>",
            "<|im_stop|>",
        ),
        call_think="\n</think>\n\n",
        plain={"enable_thinking": False},
        branches=True,
    ),
    "hybrid_mode": Habit(
        "[end~",
        think=("", "</seed:think>"),
        plain={"thinking_mode": "disabled"},
        reasoning="reasoning",
    ),
    "opens_thinking": Habit(
        "<|end|>",
        think=("", "\n</think>\n"),
        calls=_each(lambda n, a: f"\n<invoke>{n} {_json(a)}</invoke>", "<|end|>"),
        call_think="\n</think>\n",
        plain="thinking-only",
    ),
    "opens_thinking_deletes": Habit(
        "<|end_of_sentence|>",
        think=("", "\n</think>\n\n"),
        thought=_no_breaks,
        plain="thinking-only",
    ),
    "empty_block_always": Habit(
        "<|m_end|>", think=("<think>", "</think>"), plain="target-invented"
    ),
    "other_end_last": Habit("<|return|>", branches=True),
    "next_role_ends": Habit("<|user|>", calls=_each(_argument_tags, "<|observation|>")),
    "closed_by_nothing": Habit("<|end|>", shown=lambda text: " " + text.strip()),
    "channels": Habit(
        "<|return|>",
        lead="<|channel|>final<|message|>",
        think=(
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        calls=_each(
            lambda n, a: f" to={n}<|channel|>commentary<|message|>{_json(a)}",
            "<|call|>",
        ),
        call_think="<|end|><|start|>assistant",
        max_calls=1,
        call_content=False,
        branches=True,
    ),
    "always_prompts": Habit("<</>>", shown=str.strip),
    "system_moves": Habit(
        "</s>",
        calls=lambda calls: (
            "[CALLS]["
            + ", ".join(
                _json({"name": n, "arguments": a, "id": f"call{i:05d}"})
                for i, (n, a) in enumerate(calls)
            )
            + "]</s>"
        ),
        call_content=False,
    ),
    "typed_parts": Habit("<|role:end|>", think=("[THINK]", "[/THINK]")),
    "string_arguments": Habit(
        "<|stop|>", calls=_each(lambda n, a: f"<|fn|>{n}<|args|>{_json(a)}<|/fn|>", "<|stop|>")
    ),
    "single_call": Habit(
        "<|eot|>",
        calls=_each(lambda n, a: f'{{"name": "{n}", "parameters": {_json(a)}}}', "<|eom|>"),
        max_calls=1,
        call_content=False,
    ),
    "dated": Habit("<|/turn|>"),
    "no_system": Habit("<turn_end>", shown=str.strip, system=False),
    "named": Habit("<|over|>", calls=_each(lambda n, a: f"<|action|>{_json([n, a])}", "<|over|>")),
}


def target(habit: Habit, message: Mapping[str, Any]) -> str:
    """What the model must write for a turn, by hand."""
    content, reasoning = habit.shown(message["content"]), message.get("reasoning_content")
    listed = [(c["function"]["name"], c["function"]["arguments"]) for c in _calls_of(message)]
    if listed:
        assert habit.calls
        rest = (content if habit.call_content else "") + habit.calls(listed)
        before, after = (habit.think or ("", ""))[0], habit.call_think or ""
        return f"{before}{habit.thought(reasoning)}{after}{rest}" if reasoning else rest
    if reasoning:
        assert habit.think
        return habit.think[0] + habit.thought(reasoning) + habit.think[1] + content + habit.end
    return habit.lead + content + habit.end


def _calls_of(message: Mapping[str, Any]) -> list[Any]:
    return list(message.get("tool_calls") or [])


# ------------------------------------------------------------------ prompts, by transformers


def served(contract: PromptContract, name: str, messages: Row, tools: Any) -> list[int]:
    """What a server built on transformers sends, messages in the form the template's author
    expects."""
    ids = contract.tokenizer.apply_chat_template(
        [_form(name, message) for message in messages],
        tools=list(tools) if tools else None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        chat_template=_dated(corpus.sources(name)) if name == "dated" else None,
        **contract.template_kwargs,
    )
    return list(ids)


def _dated(source: Any) -> str:
    """transformers writes today; the run has a date of its own."""
    written = f"{datetime.date.fromisoformat(corpus.DATE):%d %B %Y}"
    made = str(source).replace("strftime_now('%d %B %Y')", f"'{written}'")
    assert written in made
    return made


def _form(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in message.items() if key != "train"}
    reasoning = made.pop("reasoning_content", None)
    if reasoning and name != "typed_parts":
        made[HABITS[name].reasoning] = reasoning
    if name == "typed_parts":
        # A client sends back a field, of which this template writes nothing.
        made["content"] = [{"type": "text", "text": made["content"]}]
    if name == "string_arguments":
        made["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": _json(call["function"]["arguments"]),
                },
            }
            for call in _calls_of(made)
        ]
    return made


# ------------------------------------------------------------------ the judgement


def judge(
    contract: PromptContract,
    name: str,
    row: Conversation,
    encoded: Encoded,
    loss_on: str,
    normal: Callable[[str], str] = _as_is,
    alternatives: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda message: [message],
) -> None:
    """Every trained turn is in one example, after what a server sends, and reads as by hand."""
    messages = [dict(message) for message in row.messages]
    wanted = [
        i
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and m.get("train") is not False
    ]
    wanted = wanted[-1:] if loss_on == "last" else wanted
    assert sorted(turn for turns in encoded.turns for turn in turns) == wanted
    decode = contract.tokenizer.decode
    for example, turns in zip(encoded, encoded.turns, strict=True):
        spans = _spans(example.mask)
        assert len(spans) == len(turns)
        assert spans[-1][1] == len(example.ids)
        for (start, end), turn in zip(spans, turns, strict=True):
            # A block inside the content may be taken for reasoning, in the history as well.
            histories = [messages[:turn], [alternatives(m)[-1] for m in messages[:turn]]]
            prompts = [served(contract, name, history, row.tools) for history in histories]
            assert example.ids[:start] in prompts
            stops = [i for i in range(start, end) if example.ids[i] in contract.stop_ids]
            assert stops == [end - 1]
            text = decode(example.ids[:end])[len(decode(example.ids[:start])) :]
            assert text in [normal(target(HABITS[name], m)) for m in alternatives(messages[turn])]
    for index, parent in enumerate(encoded.parents):
        if parent is not None:
            ours, theirs, shared = encoded[index].ids, encoded[parent].ids, encoded.shared[index]
            assert parent < index
            assert ours[:shared] == theirs[:shared]
            assert ours[shared] != theirs[shared]


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of ones."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


# ------------------------------------------------------------------ conversations

# Nothing that a template or a tokenizer takes for a marker.
ODD = [
    "",
    " ",
    "\n",
    "\n\n",
    " \n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2581",
    "\u2028",
    "e\u0301",
    "\u0301",
]
ODD += [
    "\U0001f468\u200d\U0001f469",
    "{{ x }}",
    "{% if %}",
    '"',
    "\\n",
    "###",
    "\u6f22",
    "\x00",
    "</",
]
PLAIN_TEXT = st.text(
    st.characters(exclude_characters="<>[]|~", exclude_categories=["Cs"]), max_size=8
)
TEXT = st.lists(PLAIN_TEXT | st.sampled_from(ODD), max_size=3).map("".join)
SAID = TEXT.filter(str.strip)
SCALAR = TEXT | st.integers(-99, 99) | st.booleans() | st.none() | st.just(2.5)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "days", "\u00fcber", "x_1"]), SCALAR | st.lists(SCALAR, max_size=2)
)


@st.composite
def rows(
    draw: Any, habit: Habit, reasoned: bool, text: Any = TEXT, user: Any = SAID
) -> Conversation:
    messages: Row = []
    if habit.system and draw(st.booleans()):
        messages.append(said("system", draw(user)))
    with_tools = habit.calls is not None and draw(st.booleans())
    if with_tools and reasoned and habit.call_think is None:
        with_tools = False
    for _ in range(draw(st.integers(1, 3))):
        messages.append(said("user", draw(user)))
        if with_tools and draw(st.booleans()):
            count = draw(st.integers(1, habit.max_calls))
            calls = [
                {
                    "type": "function",
                    "id": f"call{i:05d}",
                    "function": {"name": "weather", "arguments": draw(ARGUMENTS)},
                }
                for i in range(count)
            ]
            content = draw(text) if habit.call_content and draw(st.booleans()) else ""
            messages.append(_thinking(draw, reasoned, said("assistant", content, tool_calls=calls)))
            for i in range(count):
                messages.append(
                    said("tool", draw(user), name="weather", tool_call_id=f"call{i:05d}")
                )
        messages.append(_thinking(draw, reasoned, said("assistant", draw(text))))
    answers = [m for m in messages if m["role"] == "assistant"]
    for message in answers[:-1]:
        if draw(st.integers(0, 4)) == 0:
            message["train"] = False
    return Conversation(tuple(messages), "f:1", tools=(WEATHER,) if with_tools else None)


def _thinking(draw: Any, reasoned: bool, message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "reasoning_content": draw(SAID)} if reasoned else message


# ------------------------------------------------------------------ contracts

Tokenizer = Literal["byte-level", "NFC", "byte fallback"]


def _normal(kind: Tokenizer, tokenizer: Any) -> Callable[[str], str]:
    """What a tokenizer makes of a text, as its author knows it."""
    if kind == "NFC":
        return lambda text: unicodedata.normalize("NFC", text)
    if kind == "byte-level":
        return _as_is
    added = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
    token = "|".join(sorted(added, key=len, reverse=True))
    inner = re.compile(f"({token})(?!{token}|$)")
    # A space is put behind every token inside; none in front of the whole.
    return lambda text: inner.sub(r"\1 ", text.replace("\u2581", " "))


def _tokenizer(kind: Tokenizer) -> Any:
    if kind == "byte fallback":
        return byte_fallback()
    tokenizer = byte_level()
    if kind == "NFC":
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@cache
def contract_for(name: str, reasoned: bool, kind: Tokenizer = "byte-level") -> PromptContract:
    """Fitted on one short row, as a run is on its rows."""
    contract = corpus.own_contract(name, _tokenizer(kind))
    row = [said("user", "Hello"), said("assistant", "yes")]
    if reasoned:
        row[1]["reasoning_content"] = "maybe"
    return contract.fit([row])


def encode(contract: PromptContract, row: Conversation, loss_on: Any) -> Encoded:
    """The encoding, which is the same where no prompt stands for a rendering."""
    encoded = contract.encode(row, loss_on=loss_on)
    thorough = replace(contract)
    thorough.__dict__.update(_closes_itself=False, _behaviours=contract._behaviours)
    assert thorough.encode(row, loss_on=loss_on) == encoded
    return encoded


def encoded_or_code(contract: PromptContract, row: Conversation) -> Encoded | str:
    try:
        return encode(contract, row, "assistant")
    except UnfaithfulTemplate as error:
        return error.code


LOSS_ON = st.sampled_from(["assistant", "assistant", "last"])


def test_every_template_of_the_folder_has_a_formula() -> None:
    names = {path.name.split(".")[0] for path in corpus.FOLDER.glob("*.jinja")}
    assert names == set(HABITS) == set(corpus.CONTROL)


@pytest.mark.parametrize("name", HABITS)
@settings(max_examples=15)
@given(data=st.data())
def test_any_plain_conversation(name: str, data: Any) -> None:
    habit, contract = HABITS[name], contract_for(name, reasoned=False)
    row, loss_on = data.draw(rows(habit, reasoned=False)), data.draw(LOSS_ON)
    if isinstance(habit.plain, str):
        with pytest.raises(UnfaithfulTemplate) as caught:
            contract.encode(row, loss_on=loss_on)
        assert caught.value.code == habit.plain
        return
    assert contract.template_kwargs == habit.plain
    encoded = encode(contract, row, loss_on)
    judge(contract, name, row, encoded, loss_on)
    if habit.branches and not row.tools:
        assert all(len(turns) == 1 for turns in encoded.turns)


@pytest.mark.parametrize("name", [name for name in HABITS if HABITS[name].think])
@settings(max_examples=15)
@given(data=st.data())
def test_any_conversation_with_reasoning(name: str, data: Any) -> None:
    habit, contract = HABITS[name], contract_for(name, reasoned=True)
    row, loss_on = data.draw(rows(habit, reasoned=True)), data.draw(LOSS_ON)
    assert contract.template_kwargs == {}
    judge(contract, name, row, encode(contract, row, loss_on), loss_on)


@pytest.mark.parametrize("kind", ["NFC", "byte fallback"])
@pytest.mark.parametrize("name", ["plain", "hybrid_switch", "closed_by_nothing", "channels"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_conversation_under_a_normaliser(name: str, kind: Tokenizer, data: Any) -> None:
    reasoned = HABITS[name].think is not None and data.draw(st.booleans())
    contract = contract_for(name, reasoned, kind)
    row = data.draw(rows(HABITS[name], reasoned))
    encoded = encode(contract, row, "assistant")
    normal = _normal(kind, contract.tokenizer)
    judge(contract, name, row, encoded, "assistant", normal)


REFUSALS = {
    "stop-in-answer",
    "target-dropped",
    "target-invented",
    "target-behind-stop",
    "thinking-only",
    "thinking-off",
    "prompt-differs",
    "no-stop",
}


@pytest.mark.parametrize("name", HABITS)
@settings(max_examples=15, derandomize=True)
@given(data=st.data())
def test_markers_in_any_text_are_learned_as_they_are_or_refused(name: str, data: Any) -> None:
    """A question may hold what it likes; an answer may hold what is no stop and what the template
    leaves as it is."""
    habit = HABITS[name]
    contract = contract_for(name, reasoned=isinstance(habit.plain, str))
    marks = [
        habit.end,
        "<think>",
        "</think>",
        "<think>\nhm\n</think>\n\nyes",
        *corpus.CONTROL[name],
    ]
    text = st.lists(st.sampled_from(marks) | PLAIN_TEXT, max_size=3).map("".join)
    row = data.draw(
        rows(habit, reasoned=False, text=text | PLAIN_TEXT, user=text.filter(str.strip))
    )
    encoded = encoded_or_code(contract, row)
    if isinstance(encoded, str):
        assert encoded in REFUSALS
        return
    judge(
        contract,
        name,
        row,
        encoded,
        "assistant",
        alternatives=_apart if habit.think else lambda message: [message],
    )


def _apart(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer as it is, and with think blocks at its beginning as reasoning; empty ones are
    nothing."""
    if message["role"] != "assistant":
        return [message]
    for opening, closing in BLOCKS:
        block = rf"\s*{re.escape(opening)}\n*(.*?)\n*{re.escape(closing)}\n*(.*)"
        found = re.fullmatch(block, message["content"], re.DOTALL)
        if found and found[1].strip():
            return [message, {**message, "reasoning_content": found[1], "content": found[2]}]
        if found:
            return [message, *_apart({**message, "content": found[2]})]
    return [message]


BLOCKS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))


@pytest.mark.parametrize("name", [name for name in HABITS if HABITS[name].think])
@settings(max_examples=15)
@given(data=st.data())
def test_turns_with_and_without_reasoning(name: str, data: Any) -> None:
    """What takes rows of both kinds takes rows that have both; what does not says why."""
    habit, contract = HABITS[name], contract_for(name, reasoned=True)
    row = data.draw(rows(habit, reasoned=True))
    messages = [dict(m) for m in row.messages]
    for message in messages:
        if message["role"] == "assistant" and data.draw(st.booleans()):
            del message["reasoning_content"]
    row = replace(row, messages=tuple(messages))
    trained = [m for m in messages if m["role"] == "assistant" and m.get("train") is not False]
    both = all(m.get("reasoning_content") for m in trained) or habit.plain == {}
    encoded = encoded_or_code(contract, row)
    assert both == isinstance(encoded, Encoded)
    if isinstance(encoded, str):
        assert encoded in ("thinking-only", "target-invented")
        return
    judge(contract, name, row, encoded, "assistant")
