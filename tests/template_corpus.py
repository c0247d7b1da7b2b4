"""Chat templates and kinds of conversations: what every template is judged on.

The templates in tests/templates are of our own writing, one per habit that templates have. Those of
other people lie beside the repository where it is developed, and are no part of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tiny_contracts import byte_level
from truetune import PromptContract

FOLDER = Path(__file__).with_name("templates")
SHARED = Path(__file__).parents[2] / "shared"
OFFICIAL = sorted((SHARED / "templates").glob("*.jinja"))
MODELS = sorted(p for p in (SHARED / "models").glob("*") if p.is_dir())

# The control tokens of our own templates, beside those of the tiny tokenizers. Some are missing on
# purpose: many templates write markers that are plain text to their tokenizer.
CONTROL: dict[str, tuple[str, ...]] = {
    "plain": ("<|begin|>", "<|done|>", "<|call|>", "<|/call|>"),
    "history_without_thinking": ("<turn:user>", "<turn:assistant>", "<eot>"),
    "hybrid_switch": ("<|im_begin|>", "<|im_stop|>"),
    "hybrid_mode": ("]~user~[", "]~assistant~[", "[end~", "<seed:think>", "</seed:think>"),
    "opens_thinking": (),
    "opens_thinking_deletes": ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
    "empty_block_always": ("<|m_user|>", "<|m_assistant|>", "<|m_system|>", "<|m_end|>"),
    "other_end_last": ("<|start|>", "<|message|>", "<|return|>"),
    "next_role_ends": ("[START]", "<|observation|>", "<tool_call>", "</tool_call>"),
    "closed_by_nothing": (),
    "channels": ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"),
    "always_prompts": ("<</>>", "<<user>>", "<<assistant>>"),
    "system_moves": ("[INST]", "[/INST]", "[CALLS]", "[RESULTS]", "[/RESULTS]"),
    "typed_parts": ("<|role:user|>", "<|role:assistant|>", "<|role:end|>", "[THINK]", "[/THINK]"),
    "string_arguments": ("<|stop|>", "<|tools|>", "<|fn|>", "<|args|>", "<|/fn|>"),
    "single_call": ("<|head|>", "<|/head|>", "<|eot|>", "<|eom|>"),
    "dated": ("<|info|>", "<|/turn|>"),
    "no_system": ("<turn_start>", "<turn_end>"),
    "named": ("<|over|>", "<|tools|>", "<|action|>"),
}
# The end that the model itself brings, where it is not that of the tiny tokenizers.
EOS = {"channels": "<|return|>"}
# A template that writes the day is given one, so that texts can be compared.
DATE = "2026-03-05"


def sources(name: str) -> str | dict[str, str]:
    """Jinja source of one of our own templates; a mapping where it is several by name."""
    several = {p.stem.partition(".")[2]: p for p in FOLDER.glob(f"{name}.*.jinja")}
    if several:
        return {kind: path.read_text(encoding="utf-8") for kind, path in sorted(several.items())}
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def own_tokenizer(name: str, base: Any = None) -> Any:
    """A tiny tokenizer that has one of our own templates and its control tokens."""
    tokenizer = byte_level() if base is None else base
    tokenizer.add_tokens(_control(CONTROL[name]))
    tokenizer.eos_token = EOS.get(name, tokenizer.eos_token)
    tokenizer.chat_template = sources(name)
    return tokenizer


def own_contract(name: str, base: Any = None, **arguments: Any) -> PromptContract:
    return PromptContract.load(own_tokenizer(name, base), date=DATE, **arguments)


def official_tokenizer(path: Path) -> Any:
    """A tokenizer with one of other people's templates, whose markers are its control tokens."""
    source = path.read_text(encoding="utf-8")
    folder = "llama-3.2-1b-instruct" if "bos_token" in source else "qwen2.5-0.5b-instruct"
    tokenizer = copy.deepcopy(_tokenizer(SHARED / "models" / folder))
    tokenizer.add_tokens(_control(dict.fromkeys(_MARKER.findall(source))))
    tokenizer.chat_template = source
    return tokenizer


def official_contract(path: Path) -> PromptContract:
    """One of other people's templates, its own markers put into a tokenizer as control tokens."""
    tokenizer = official_tokenizer(path)
    return PromptContract.load(tokenizer, tokenizer.chat_template, date=DATE)


def model_contract(folder: Path) -> PromptContract:
    return PromptContract.load(folder, date=DATE)


# Something in brackets, as control tokens are written.
_MARKER = re.compile(
    r"<[|\uff5c]?[\w\uff5c\u2581/|:.-]{1,40}>|\[/?[A-Z_]{3,30}\]|\]~[a-z!]\[?|\[e~\[|\]~b\]"
)


def _control(texts: Any) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(text, special=True, normalized=False) for text in sorted(texts)]


@cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------ kinds of conversations


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str, number: int = 0) -> dict[str, Any]:
    arguments = {"city": city, "days": 3, "hourly": False}
    function = {"name": "weather", "arguments": arguments}
    return {"type": "function", "id": f"call{number:05d}", "function": function}


def result(text: str, number: int = 0) -> dict[str, Any]:
    return said("tool", text, name="weather", tool_call_id=f"call{number:05d}")


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city."},
                "days": {"type": "integer", "description": "How many days."},
                "hourly": {"type": "boolean", "description": "By the hour."},
            },
            "required": ["city"],
        },
    },
}

_U1, _A1 = said("user", "What is the capital of France?"), said("assistant", "It is Paris.")
_U2, _A2 = said("user", "And of Italy?"), said("assistant", "Rome, since 1871.")
_U3, _A3 = said("user", "Thank you!"), said("assistant", "You are welcome.")
_SYSTEM = said("system", "Answer in one sentence.")
_R1 = {"reasoning_content": "France is a country in Europe. Its seat of government is Paris."}
_R2 = {"reasoning_content": "Italy moved its capital twice.\nSince 1871 it is Rome."}
_R3 = {"reasoning_content": "Only thanks: a short reply."}
_ASK = said("user", "Will it be clear in Oslo tomorrow?")
_CALLS = said("assistant", "", tool_calls=[call("Oslo")])
_RESULT = result('{"sky": "clear", "high": 21}')
_CLEAR = said("assistant", "Yes, it will be clear in Oslo.")


@dataclass(frozen=True)
class Kind:
    """A kind of conversation.

    Attributes:
        name: short, for a column.
        messages: OpenAI messages.
        tools: schemas offered.
        loss_on: what is trained.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    loss_on: Literal["assistant", "last"] = "assistant"


_T = (WEATHER,)
KINDS = (
    Kind("one turn", (_U1, _A1)),
    Kind("three turns", (_U1, _A1, _U2, _A2, _U3, _A3)),
    Kind("system", (_SYSTEM, _U1, _A1, _U2, _A2)),
    Kind("train: false", (_U1, _A1 | {"train": False}, _U2, _A2)),
    Kind("last only", (_U1, _A1, _U2, _A2, _U3, _A3), loss_on="last"),
    Kind("reasoning last", (_U1, _A1, _U2, _A2 | _R2), loss_on="last"),
    Kind("reasoning every", (_U1, _A1 | _R1, _U2, _A2 | _R2, _U3, _A3 | _R3)),
    Kind("tools offered", (_ASK, _A3), _T),
    Kind("one call", (_ASK, _CALLS), _T),
    Kind("parallel calls", (_ASK, _CALLS | {"tool_calls": [call("Oslo"), call("Bergen", 1)]}), _T),
    Kind("call, answer", (_ASK, _CALLS, _RESULT, _CLEAR), _T),
    Kind("reasoned call", (_ASK, _CALLS | _R1, _RESULT, _CLEAR | _R3), _T),
)
