"""Conversations to token examples: the central equation, template by template, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_contracts as tiny
from tiny_contracts import byte_level, chat, prefix_space, require_equation, supervised_texts
from truetune import ChatTemplate, PromptContract, SFTExample, TruetuneError, UnfaithfulTemplate
from truetune.contract import sandbox
from truetune.contract.contract import Refused
from truetune.data.conversation import Conversation

pytestmark = pytest.mark.filterwarnings("error")

TWO = chat("Hello world", "Hello there.", "Question?", "yes, no")
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "own BOS": lambda: byte_level(own_bos=True),
    "prefix space": prefix_space,
    "one token for all": tiny.one_token_for_all,
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def refused(contract: PromptContract, messages: Any, **arguments: Any) -> UnfaithfulTemplate:
    with pytest.raises(UnfaithfulTemplate) as caught:
        contract.encode(messages, **arguments)
    assert isinstance(caught.value, TruetuneError)
    assert isinstance(caught.value, ValueError)
    return caught.value


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("template", ["PLAIN", "BOS", "NO_SYSTEM", "DATED", "TOOLS", "TRIMMING"])
def test_turns_that_extend_each_other_are_one_sequence(tokenizer: Any, template: str) -> None:
    contract = PromptContract.load(tokenizer, getattr(tiny, template))
    encoded = contract.encode(TWO)
    require_equation(contract, TWO, encoded)
    assert (encoded.turns, encoded.parents, encoded.shared) == (((1, 3),), (None,), (0,))
    assert supervised_texts(contract, encoded) == ["Hello there.<|end|>", "yes, no<|end|>"]
    assert encoded.remarks == ()
    assert isinstance(encoded[0], SFTExample)
    assert list(encoded) == [encoded[0]] == list(encoded[:1])


@pytest.mark.parametrize("template", ["instruction-response", "chatml-lite"])
def test_the_built_in_templates(tokenizer: Any, template: str) -> None:
    contract = PromptContract.load(tokenizer, template)
    encoded = contract.encode(TWO)
    require_equation(contract, TWO, encoded)
    assert supervised_texts(contract, encoded) == ["Hello there.<|end|>", "yes, no<|end|>"]
    assert len(encoded) == 1


def test_history_that_is_not_what_was_answered_becomes_branches(tokenizer: Any) -> None:
    contract = PromptContract.load(tokenizer, tiny.END_OF_TEXT)
    messages = [*TWO, *chat("maybe", "Answer!")]
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert (encoded.turns, encoded.parents) == (((1,), (3,), (5,)), (None, 0, 1))
    assert supervised_texts(contract, encoded) == [
        "Hello there.</s>",
        "yes, no</s>",
        "Answer!</s>",
    ]
    # All but the end of the earlier answer is shared.
    assert list(encoded.shared) == [0, len(encoded[0].ids) - 1, len(encoded[1].ids) - 1]


def test_thinking_taken_out_of_history_becomes_branches() -> None:
    contract = PromptContract.load(byte_level(), tiny.THINKING)
    messages = chat(
        "Hello", "<think>\nyes\n</think>\n\nno", "Question?", "<think>\nx\n</think>\n\ny"
    )
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert encoded.turns == ((1,), (3,))
    assert supervised_texts(contract, encoded) == [
        "<think>\nyes\n</think>\n\nno<|end|>",
        "<think>\nx\n</think>\n\ny<|end|>",
    ]
    prompt = contract.prompt_ids(messages[:1])
    assert encoded.shared == (0, len(prompt))
    plain = chat("Hello", "no", "Question?", "y")
    assert contract.encode(plain).turns == ((1, 3),)


def test_branches_and_a_sequence_mix() -> None:
    contract = PromptContract.load(byte_level(), tiny.THINKING)
    messages = chat("a", "b", "c", "<think>\nd\n</think>\n\ne", "f", "g", "h", "i")
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert encoded.turns == ((1, 3), (5, 7))
    assert encoded.parents == (None, 0)


def test_a_trimming_template_is_told_and_the_answer_kept_inside() -> None:
    contract = PromptContract.load(byte_level(), tiny.TRIMMING)
    messages = chat(" Hello ", "\n Hello \n there. ")
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == ["Hello \n there.<|end|>"]
    assert encoded.remarks == ("stripped",)


@pytest.mark.parametrize(
    "answer", ["", " ", "\n", "\n\n", " Hello", "\nHello\n", "e\u0301\U0001f600"]
)
def test_odd_answers_survive_to_the_character(answer: str) -> None:
    contract = PromptContract.load(byte_level())
    messages = chat("Question?", answer)
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == [answer + "<|end|>"]


def test_a_seam_that_would_merge_keeps_the_served_prompt() -> None:
    tokenizer = byte_level()
    merged = tokenizer.encode("\n\n", add_special_tokens=False)
    assert len(merged) == 1, "the tokenizer of this test must merge line breaks"
    contract = PromptContract.load(tokenizer)
    messages = chat("Question?", "\nHello", "yes", "no")
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert encoded.remarks == ("seam",)
    assert supervised_texts(contract, encoded) == ["\nHello<|end|>", "no<|end|>"]
    # The served history has the merged token: the second turn extends something else.
    assert encoded.turns == ((1,), (3,))


def test_a_prefix_space_is_not_learned() -> None:
    tight = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    tight += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    contract = PromptContract.load(prefix_space(), tight)
    joint = contract.tokens.encode([contract.renderer.render(chat("Hello", "yes"))])[0]
    assert contract.tokens.decode(joint).endswith("<|assistant|> yes<|end|>"), "no prefix space?"
    for answer in ("yes", " yes", "yes, no"):
        messages = chat("Hello", answer)
        encoded = contract.encode(messages)
        require_equation(contract, messages, encoded)
        prompt = contract.prompt_ids(messages[:1])
        completion = encoded[0].ids[len(prompt) :]
        assert contract.tokens.decode_after(prompt, completion) == answer + "<|end|>"


def test_a_bos_is_there_once() -> None:
    bos = byte_level().bos_token_id
    for own in (False, True):
        contract = PromptContract.load(byte_level(own_bos=own), tiny.BOS)
        encoded = contract.encode(TWO)
        assert encoded[0].ids.count(bos) == 1
        assert encoded[0].ids[0] == bos
    # A built-in template writes it for a tokenizer that was trained to see one.
    for own, count in ((False, 0), (True, 1)):
        contract = PromptContract.load(byte_level(own_bos=own), "instruction-response")
        assert contract.encode(TWO)[0].ids.count(bos) == count


def test_tools_and_tool_calls() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": ["x \u00e9", None, True, 2.5]}}}
    messages = [
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "yes"},
    ]
    contract = PromptContract.load(byte_level(), tiny.TOOLS)
    encoded = contract.encode(messages, tools)
    require_equation(contract, messages, encoded, tools)
    first, second = supervised_texts(contract, encoded)
    assert first == (
        '\n{"name": "add", "arguments": {"a": 1, "b": ["x \u00e9", null, true, 2.5]}}<|end|>'
    )
    assert second == "yes<|end|>"
    assert '"parameters"' in contract.tokens.decode(encoded[0].ids)
    assert '"parameters"' not in contract.tokens.decode(contract.encode(messages)[0].ids)
    as_row = Conversation(tuple(messages), "f:1", tools=tuple(tools))
    assert contract.encode(as_row)[0] == encoded[0]


def test_reasoning_content() -> None:
    contract = PromptContract.load(byte_level(), tiny.HYBRID)
    messages = chat("Sum?", "Answer!")
    messages[1]["reasoning_content"] = "yes, no"
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == ["<think>\nyes, no\n</think>\n\nAnswer!<|end|>"]


# ---------------------------------------------------------------- which turns


def test_loss_on() -> None:
    contract = PromptContract.load(byte_level())
    messages = [*chat("a", "b", "c", "d", system="s"), {"role": "user", "content": "e"}]
    assistant = contract.encode(messages, loss_on="assistant")
    assert supervised_texts(contract, assistant) == ["b<|end|>", "d<|end|>"]
    assert assistant.turns == ((2, 4),)
    last = contract.encode(messages, loss_on="last")
    assert supervised_texts(contract, last) == ["d<|end|>"]
    assert last[0].ids == assistant[0].ids
    every = contract.encode(messages, loss_on="all")
    assert every[0].ids == assistant[0].ids
    assert set(every[0].mask) == {1}
    with pytest.raises(ValueError, match="assistant, last, all"):
        contract.encode(messages, loss_on="asistant")  # type: ignore[arg-type]


def test_loss_on_all_has_each_token_of_a_tree_once() -> None:
    contract = PromptContract.load(byte_level(), tiny.END_OF_TEXT)
    encoded = contract.encode(TWO, loss_on="all")
    assert encoded.turns == ((1,), (3,))
    for example, shared in zip(encoded, encoded.shared, strict=True):
        assert example.mask == [0] * shared + [1] * (len(example.ids) - shared)


def test_turns_that_are_not_to_be_trained() -> None:
    contract = PromptContract.load(byte_level())
    for untrained, kept in ((1, ["d<|end|>"]), (3, ["b<|end|>"])):
        messages = chat("a", "b", "c", "d")
        messages[untrained]["train"] = False
        messages[4 - untrained]["train"] = True
        encoded = contract.encode(messages)
        require_equation(contract, messages, encoded)
        assert supervised_texts(contract, encoded) == kept
        assert encoded.turns == ((4 - untrained,),)
        assert contract.encode(messages, loss_on="last").turns == ((4 - untrained,),)
    messages = chat("a", "b")
    messages[1]["train"] = False
    assert refused(contract, messages).code == "no-assistant-turn"


def test_a_greeting_in_front_is_context_where_it_is_not_trained() -> None:
    contract = PromptContract.load(byte_level())
    messages = chat("a", "Hello", "b", "yes")[1:]
    messages[0]["train"] = False
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == ["yes<|end|>"]


def test_train_is_not_shown_to_the_template() -> None:
    shows = tiny.PLAIN.replace(
        "m.content", "m.content ~ (m.train | string if 'train' in m else '')"
    )
    contract = PromptContract.load(byte_level(), shows)
    messages = chat("a", "b", "c", "d")
    messages[1]["train"] = False
    assert contract.encode(messages)[0].ids == contract.encode(chat("a", "b", "c", "d"))[0].ids


def test_plain_text_is_trained_whole_and_closed() -> None:
    for own_bos in (False, True):
        tokenizer = byte_level(own_bos=own_bos)
        contract = PromptContract.load(tokenizer)
        encoded = contract.encode(Conversation((), "t:1", text="Hello world"))
        (example,) = encoded
        assert example.ids == [*tokenizer("Hello world")["input_ids"], tokenizer.eos_token_id]
        assert example.mask == [1] * len(example.ids)
        assert (encoded.turns, encoded.row) == (((),), "t:1")
        closed = contract.encode(Conversation((), "t:1", text="Hello world<|end|>"))
        assert closed[0].ids == example.ids


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("template", "messages", "code"),
    [
        ("UNKNOWN_TERMINATOR", TWO, "no-stop"),
        ("OPENS_THINKING", TWO, "thinking-only"),
        ("DELETING", chat("a", "<think>\nyes\n</think>\n\nno"), "target-dropped"),
        ("HYBRID", TWO, "target-invented"),
        ("HYBRID", chat("a", ""), "target-invented"),
        ("NO_SYSTEM", chat("a", "b", system="s"), "template-refuses"),
        ("PLAIN", chat("a", "yes<|end|>no"), "stop-in-answer"),
        ("PLAIN", chat("a", "<|end|>"), "stop-in-answer"),
        ("PLAIN", chat("a"), "no-assistant-turn"),
        ("PLAIN", [], "no-assistant-turn"),
        ("PLAIN", chat("a", "b", "c", "d")[1:], "no-prompt"),
    ],
)
def test_refused_with_a_code(template: str, messages: Any, code: str) -> None:
    contract = PromptContract.load(byte_level(), getattr(tiny, template))
    error = refused(contract, messages)
    assert error.code == code
    assert error.fix


def test_the_reason_names_what_it_saw() -> None:
    def reason(template: str, messages: Any) -> str:
        return str(refused(PromptContract.load(byte_level(), template), messages))

    assert "no system turn here" in reason(tiny.NO_SYSTEM, chat("a", "b", system="s"))
    assert r"'<think>\n'" in reason(tiny.OPENS_THINKING, TWO)
    assert "yes, no(end)" in reason(tiny.UNKNOWN_TERMINATOR, chat("a", "yes, no"))
    assert "<think></think>" in reason(tiny.HYBRID, TWO)
    assert "--template-arg thinking=false" in reason(tiny.HYBRID, TWO)
    assert "'<|end|>'" in reason(tiny.PLAIN, chat("a", "yes<|end|>"))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("reasoning_content", "because of this", "the reasoning"),
        ("tool_calls", [{"function": {"name": "add", "arguments": {"a": 1}}}], "'add'"),
        ("tool_calls", [{"function": {"name": "Hello", "arguments": {"a": "deep"}}}], "tool call"),
    ],
)
@pytest.mark.parametrize("content", ["Hello there.", ""])
def test_a_template_that_ignores_a_part_of_the_answer(
    field: str, value: Any, named: str, content: str
) -> None:
    messages = chat("Sum?", content)
    messages[1][field] = value
    error = refused(PromptContract.load(byte_level()), messages)
    assert error.code == "target-dropped"
    assert named in str(error)


def test_a_part_that_the_template_rewrites() -> None:
    shouting = tiny.PLAIN.replace("m.content", "m.content | upper")
    contract = PromptContract.load(byte_level(), shouting)
    assert refused(contract, chat("a", "yes")).code == "target-dropped"
    assert supervised_texts(contract, contract.encode(chat("a", "YES"))) == ["YES<|end|>"]


def test_an_unknown_token_is_refused() -> None:
    contract = PromptContract.load(prefix_space())
    messages = chat("Hello", "yes \u6f22")
    assert refused(contract, messages).code == "unknown-token"
    # In the question it stands as the server sends it.
    require_equation(contract, chat("\u6f22", "yes"), contract.encode(chat("\u6f22", "yes")))


def test_a_template_that_fails_is_a_refusal_whatever_it_raises() -> None:
    for source in (
        "{{ 1 // 0 }}",
        "{{ messages[9].content }}",
        "{{ messages.x.y }}",
        "{{ 1 + 'a' }}",
    ):
        contract = PromptContract.load(byte_level(), tiny.PLAIN + source)
        error = refused(contract, TWO)
        assert "refuses this conversation" in error.what
    missing = refused(PromptContract.load(byte_level(), tiny.PLAIN + "{{ tone }}{{ x.y }}"), TWO)
    assert "--template-arg x=VALUE" in missing.fix
    changing = PromptContract.load(byte_level(), tiny.PLAIN + "{{ messages.append(1) }}")
    assert "sandbox" in refused(changing, TWO).why


def test_many_rows_at_once_are_each_row_alone() -> None:
    contract = PromptContract.load(byte_level())
    rows = [Conversation(tuple(chat("a", "b" * n)), f"f:{n}") for n in range(600)]
    rows[3] = Conversation(tuple(chat("a", "<|end|>")), "f:3")
    rows[7] = Conversation((), "f:7", text="Hello")
    rows[9] = Conversation(tuple(chat("a")), "f:9")
    progress: list[int] = []
    results = contract.encode_all(rows, on_progress=progress.append)
    assert (len(results), progress[-1]) == (600, 600)
    assert progress == sorted(set(progress))
    for row, result in zip(rows, results, strict=True):
        assert result.row == row.where
        if row.where in ("f:3", "f:9"):
            assert isinstance(result, Refused)
            assert result.error.where.startswith(row.where)
        else:
            assert not isinstance(result, Refused)
            assert list(result) == list(contract.encode(row))


# ---------------------------------------------------------------- any text

ODD = ["", " ", "\n", "\n\n", " \n", "\r\n", "\t", "\u00a0", "\u2581", "\x00", "e\u0301"]
ODD += ["\U0001f468\u200d\U0001f469", "{{ x }}", "</s>", "<think>", "<|user|>", "###"]
WORD = st.text(max_size=10) | st.sampled_from(ODD)
CONTENT = st.lists(WORD, max_size=3).map("".join)


@pytest.fixture(scope="module")
def contracts() -> dict[str, PromptContract]:
    names = {"plain": None, "ir": "instruction-response", "lite": "chatml-lite"}
    return {key: PromptContract.load(byte_level(), name) for key, name in names.items()}


@pytest.mark.parametrize("template", ["plain", "ir", "lite"])
@settings(max_examples=60)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_the_equation_holds_for_any_text(
    contracts: dict[str, PromptContract], template: str, contents: list[str]
) -> None:
    contract = contracts[template]
    messages = chat(*contents)
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    answers = [text + "<|end|>" for text in contents[1::2]]
    assert supervised_texts(contract, encoded) == answers
    if template == "lite":
        whole = contract.prompt_text(messages)
        assert whole == ChatTemplate.render(messages) + "<|assistant|>\n"


@settings(max_examples=40)
@given(contents=st.lists(CONTENT, min_size=2, max_size=4))
def test_a_stop_inside_an_answer_is_always_refused(
    contracts: dict[str, PromptContract], contents: list[str]
) -> None:
    contents[1] += "<|end|>" + contents[0]
    assert refused(contracts["plain"], chat(*contents)).code == "stop-in-answer"


def test_a_long_row_is_rendered_once_and_its_messages_are_written_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    render = sandbox.render

    def counted(source: str, special: Any, date: str, texts: Any, jobs: Any) -> Any:
        asked.append((len(texts), len(jobs)))
        return render(source, special, date, texts, jobs)

    contract = PromptContract.load(byte_level(), tiny.TOOLS)
    contract.behaviour()
    row: list[dict[str, Any]] = []
    for number in range(40):
        function = {"name": "roll", "arguments": {"sides": number + 1, "fair": True}}
        calls = [{"id": f"call{number:05d}", "type": "function", "function": function}]
        row += [*chat("Roll!", ""), {"role": "tool", "content": "4"}, *chat("", "Four.")[1:]]
        row[-3]["tool_calls"] = calls
    monkeypatch.setattr(sandbox, "render", counted)
    encoded = contract.encode(row)
    whole = list(asked)
    require_equation(contract, row, encoded)
    # A prompt and a rendering of each turn; one twin, turned and not, for all of the calls.
    assert sum(jobs for _, jobs in whole) == 2 * 80 + 2
    assert max(texts for texts, _ in whole) < 160 + 3
