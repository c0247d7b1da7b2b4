"""What a chat request asks for, and what of it would be lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from truetune.errors import UnfaithfulTemplate
from truetune.servers.protocol import LLAMA_CPP, TOKENS, Refused, lost, read_chat, require_rendered

HELLO = [{"role": "user", "content": "Hi."}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def read(more: frozenset[str] = frozenset(), **asked: Any) -> Any:
    return read_chat({"messages": HELLO, **asked}, ("first", "runs/first"), more)


def test_what_is_not_asked_for() -> None:
    one, two = read(), read()
    assert one.sampling.max_new_tokens == TOKENS
    assert (one.sampling.temperature, one.sampling.top_p, one.sampling.top_k) == (0, 1, 0)
    assert one.sampling.seed != two.sampling.seed
    assert (one.tools, one.stops, one.stream, one.with_usage) == (None, (), False, False)
    # null is not asked for.
    names = ("temperature", "seed", "stop", "tools", "n", "never_heard_of", "stream", "max_tokens")
    assert read(**dict.fromkeys(names)).stops == ()


def test_numbers_come_as_they_are() -> None:
    made = read(seed=2**60 + 1, temperature=1, top_p=0.5, top_k=-1, max_tokens=3.0).sampling
    assert made.seed == 2**60 + 1
    assert (made.temperature, made.top_p, made.top_k, made.max_new_tokens) == (1, 0.5, 0, 3)
    # The newer name counts.
    assert read(max_tokens=5, max_completion_tokens=7).sampling.max_new_tokens == 7


@pytest.mark.parametrize("model", ["first", "runs/first", "", None])
def test_names_of_the_model(model: str | None) -> None:
    assert read(model=model)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"model": "second"}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": "7"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [3]}, "stop"),
        ({"stream_options": [1]}, "stream_options"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"tool_choice": "none", "tools": [TOOL]}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ],
)
def test_what_is_refused(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        read(**asked)
    assert caught.value.param == param
    assert json.loads(json.dumps(caught.value.body))["error"]["param"] == param


def test_what_llama_cpp_knows_beside() -> None:
    for name, value in (("logprobs", True), ("grammar", "x"), ("tool_choice", "required")):
        assert read(LLAMA_CPP, **{name: value})
        with pytest.raises(Refused, match=name):
            read(**{name: value})


def test_control_characters_are_shown_and_not_sent() -> None:
    with pytest.raises(Refused) as caught:
        read(model="\x1b[31mred")
    assert "\x1b" not in str(caught.value)


def render(messages: Any, tools: Any) -> str:
    """A template that renders system, user and assistant, and nothing else."""
    known = [m for m in messages if m["role"] in ("system", "user", "assistant")]
    if any(m["content"] == "refused" for m in known):
        raise UnfaithfulTemplate("it refuses")
    return "".join(f"<{m['role']}>{m['content']}" for m in known)


def full(messages: Any, tools: Any) -> str:
    return json.dumps([messages, tools])


def test_what_does_not_reach_the_prompt() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    odd = [{"role": "developer", "content": "Be brief."}, *HELLO, calls,
           {"role": "tool", "content": "ok"}, {"role": "tool", "content": "ok"}]  # fmt: skip
    expected = {"tools": (), "tool_calls": (2,), "developer": (0,), "tool": (3, 4)}
    assert lost(render, odd, [TOOL]) == expected
    assert lost(full, odd, [TOOL]) == {}
    plain = [{"role": "system", "content": "x"}, *HELLO, {"role": "assistant", "content": "y"}]
    assert lost(render, plain, None) == lost(render, HELLO, None) == {}
    # Nothing was in them.
    assert lost(render, [{"role": "tool", "content": ""}, *HELLO], None) == {}
    with pytest.raises(Refused, match="messages with the role developer") as caught:
        require_rendered(render, odd[:2], None)
    assert caught.value.param == "messages[0]"
    with pytest.raises(UnfaithfulTemplate):
        lost(render, [{"role": "user", "content": "refused"}], [TOOL])


def test_a_template_that_refuses_the_change_has_seen_it() -> None:
    def strict(messages: Any, tools: Any) -> str:
        if any(m.get("tool_calls") for m in messages) and not tools:
            raise UnfaithfulTemplate("calls need tools")
        return render(messages, tools)

    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert "tools" not in lost(strict, [*HELLO, calls], [TOOL])
