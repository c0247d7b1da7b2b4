"""Kinds of conversations for the oracle, and what truetune makes of them under a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
from template_corpus import said
from truetune import PromptContract, UnfaithfulTemplate


def call(name: str, number: int, arguments: Any) -> dict[str, Any]:
    # The order of keys in which OpenAI's servers write a call.
    function = {"name": name, "arguments": arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def result(text: str, number: int = 0, name: str = "weather") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": name, "content": text}


def _tool(name: str, **properties: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Asks for {name}.",
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": kind, "description": f"The {key}."}
                    for key, kind in properties.items()
                },
                "required": list(properties)[:1],
            },
        },
    }


TOOLS = (
    _tool("weather", place="string", days="integer", hourly="boolean"),
    _tool("roll", sides="integer"),
    _tool("store", record="object", tags="array"),
)


@dataclass(frozen=True)
class Row:
    """A kind of conversation: its name, messages, and whether tools are offered."""

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    loss_on: str = "assistant"


def _weather(place: str, number: int = 0) -> dict[str, Any]:
    return call("weather", number, {"place": place, "days": 3, "hourly": False})


_Q1, _Q2, _Q3 = (
    said("user", "Which river runs through Keth?"),
    said("user", "And through Velmar?"),
    said("user", "Thank you!"),
)
_A1, _A2, _A3 = (
    said("assistant", "The Orun does. It is wide."),
    said("assistant", "The Sill, since the flood."),
    said("assistant", "You are welcome."),
)
_R1 = {"reasoning_content": "Keth lies on a plain.\nThe only stream there is the Orun."}
_R2 = {"reasoning_content": "Velmar moved after the flood: now it lies on the Sill."}
_ASK = said("user", "Will it rain in Keth?")
_ANSWER = said("assistant", "No, Keth stays dry.")
_OFFER = TOOLS

ROWS = (
    Row("plain", (_Q1, _A1)),
    Row("system", (said("system", "Answer in one sentence."), _Q1, _A1, _Q2, _A2)),
    Row("three turns", (_Q1, _A1, _Q2, _A2, _Q3, _A3)),
    Row(
        "edges",
        (
            said("user", "  Say it\n\n"),
            said("assistant", "\n  caf\u00e9 \u2014 \u65e5\u672c \U0001f600\t{{ x }}  \n"),
            said("user", "Again "),
            said("assistant", " Two  spaces.\n\n\nThree lines.\n"),
        ),
    ),
    Row("reasoning", (_Q1, _A1 | _R1)),
    Row("reasoning turns", (_Q1, _A1 | _R1, _Q2, _A2 | _R2)),
    Row("one call", (_ASK, said("assistant", "", tool_calls=[_weather("Keth")])), _OFFER),
    Row(
        "two calls",
        (
            _ASK,
            said(
                "assistant",
                "",
                tool_calls=[_weather("Keth"), call("roll", 1, {"sides": 6})],
            ),
        ),
        _OFFER,
    ),
    Row(
        "equal calls",
        (
            said("user", "Roll two dice."),
            said(
                "assistant",
                "",
                tool_calls=[call("roll", 0, {"sides": 6}), call("roll", 1, {"sides": 6})],
            ),
        ),
        _OFFER,
    ),
    Row(
        "content as argument",
        (_ASK, said("assistant", "Keth", tool_calls=[_weather("Keth")])),
        _OFFER,
    ),
    Row(
        "content and nested call",
        (
            said("user", "Store it."),
            said(
                "assistant",
                "I store the record.",
                tool_calls=[
                    call(
                        "store",
                        0,
                        {
                            "record": {"zeta": "a", "alpha": 1, "depth": {"x": None, "b": True}},
                            "tags": ["a", '\u00e9"q"', 1],
                        },
                    )
                ],
            ),
        ),
        _OFFER,
    ),
    Row(
        "reasoned call, answer",
        (
            _ASK,
            said("assistant", "", tool_calls=[_weather("Keth")], **_R1),
            result('{"rain": false}'),
            _ANSWER | {"reasoning_content": "The tool says that it stays dry."},
        ),
        _OFFER,
    ),
    Row(
        "call, answer, question",
        (
            _ASK,
            said("assistant", "", tool_calls=[_weather("Keth")]),
            result('{"rain": false}'),
            _ANSWER,
            _Q3,
            _A3,
        ),
        _OFFER,
    ),
)
# Beside the kinds of the table.
MORE_ROWS = (
    Row(
        "thinking in content",
        (_Q1, said("assistant", "<think>\nOn a plain.\n</think>\n\nThe Orun.")),
    ),
    Row(
        "thinking in content, turns",
        (
            _Q1,
            said("assistant", "<think>\nOn a plain.\n</think>\n\nThe Orun."),
            _Q2,
            said("assistant", "<think>\nSince the flood.\n</think>\n\nThe Sill."),
        ),
    ),
    Row(
        "arguments as text",
        (
            _ASK,
            said("assistant", "", tool_calls=[call("weather", 0, '{"place": "Keth", "days": 3}')]),
            result("dry"),
            _ANSWER,
        ),
        _OFFER,
    ),
    Row("last only", (_Q1, _A1, _Q2, _A2, _Q3, _A3), loss_on="last"),
    Row("one untrained", (_Q1, _A1 | {"train": False}, _Q2, _A2)),
)

EXACT, REFUSED, WRONG, CRASHED, FALSE = (
    "exact",
    "refused",
    "WRONG",
    "CRASHED",
    "refused though possible",
)
_SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": False},
    {"thinking": True},
)


@dataclass(frozen=True)
class Outcome:
    """The oracle's word on one row: the verdict, and why."""

    verdict: str
    why: str = ""


def outcome(contract: PromptContract, row: Row) -> Outcome:
    """What truetune makes of a row, judged by the oracle."""
    messages = [dict(m) for m in row.messages]
    tools = list(row.tools) if row.tools else None
    tokenizer = _with_template(contract)
    try:
        fitted = contract
        if contract.renderer.variables():  # else there is nothing to choose
            fitted = contract.fit([messages], tools, loss_on=row.loss_on)  # type: ignore[arg-type]
        encoded = fitted.encode(messages, tools, loss_on=row.loss_on)  # type: ignore[arg-type]
    except UnfaithfulTemplate as error:
        source = str(tokenizer.chat_template)
        switches = [some for some in _SWITCHES if all(name in source for name in some)]
        possible = oracle.could_be_trained(
            tokenizer, row.messages, tools, contract.stop_ids, switches, row.loss_on
        )
        why = f"{error.code}: {error.what}; {error.why}"
        return Outcome(FALSE if possible else REFUSED, why)
    except Exception as error:  # a crash is a finding as well
        return Outcome(CRASHED, f"{type(error).__name__}: {error}")
    trained = oracle.Trained(
        [(e.ids, e.mask) for e in encoded],
        encoded.turns,
        fitted.template_kwargs,
        fitted.stop_ids,
    )
    try:
        oracle.judge(tokenizer, row.messages, tools, trained, row.loss_on)
    except oracle.Wrong as error:
        return Outcome(WRONG, str(error))
    return Outcome(EXACT)


def _with_template(contract: PromptContract) -> Any:
    """The contract's tokenizer as a server has it: with the model's own template."""
    tokenizer = contract.tokenizer
    if tokenizer.chat_template is None or contract.origin != "tokenizer":
        tokenizer.chat_template = (
            contract.chat_template
            if contract.tool_template is None
            else {"default": contract.chat_template, "tool_use": contract.tool_template}
        )
    return tokenizer


def outcomes(contract: PromptContract, rows: Sequence[Row] = ROWS) -> dict[str, Outcome]:
    return {row.name: outcome(contract, row) for row in rows}
