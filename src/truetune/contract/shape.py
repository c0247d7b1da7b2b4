"""Messages in the forms that templates take.

Rows have one form (`data/conversation.py`), but templates read several: reasoning in one of three
fields, in typed parts, or between markers in the content; arguments of tool calls as an object or
as JSON text; content as a string or as a list of parts. `behaviour.py` finds out which of them a
template reads, and this module creates them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from truetune.data.messages import content_of
from truetune.data.rows import BadRow
from truetune.data.tools import calls_of
from truetune.errors import UnfaithfulTemplate

Message = dict[str, Any]
# Routes on which the template does not write the reasoning; the completion is composed from it.
COMPOSED = ("opened", "filled", "inline")
FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Shape:
    """The form in which a template expects messages.

    Attributes:
        content: "string", or "parts" if it reads only lists of typed parts.
        arguments: "object", or "string" if it would write an object as Python instead of JSON.
    """

    content: Literal["string", "parts"] = "string"
    arguments: Literal["object", "string"] = "object"


def canonical(message: Mapping[str, Any]) -> Message:
    """Return a message in the form of rows: string content, `reasoning_content`, arguments as
    objects.

    Messages from `data/` already have this form; those of a caller may have any form that OpenAI's
    clients send.

    Raises:
        UnfaithfulTemplate: the message has no role, no content, two different reasoning texts, a
            call without a name or with arguments that are not JSON, or content that is not text,
            reasoning or tool calls.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UnfaithfulTemplate(
            "a message has no role",
            why=f"it reads {str(message)[:80]!r}",
            fix="set a role for each message: system, developer, user, assistant or tool",
            code="unknown-role",
        )
    if not message.keys() & {"content", "tool_calls", *FIELDS}:
        raise UnfaithfulTemplate(
            f"a message of the role {message['role']} has no content",
            why=f"its keys are {', '.join(map(str, message))}",
            fix='give it content, "" if it is empty',
            code="unsupported-content",
        )
    made = {key: value for key, value in message.items() if value is not None}
    reasoning = [made.pop(name) for name in FIELDS if made.get(name)]
    content = made.get("content", "")
    if not isinstance(content, str):
        try:
            text, thought, calls = content_of(content)
        except BadRow as error:
            raise _refused(error) from error
        content = text
        reasoning += [thought] if thought else []
        if calls:
            made["tool_calls"] = [*made.get("tool_calls", []), *calls]
    made["content"] = content
    for name in ("function_call", "refusal"):
        if made.get(name):
            raise UnfaithfulTemplate(
                f"a message has a {name}, which no chat template renders",
                fix="write the call under tool_calls"
                if name == "function_call"
                else "write it as content, or leave the row out",
                code="unsupported-content",
            )
    if len(dict.fromkeys(reasoning)) > 1:
        raise UnfaithfulTemplate(
            "a message has two different reasoning texts",
            fix="keep one of them",
            code="unsupported-content",
        )
    if reasoning:
        made["reasoning_content"] = reasoning[0]
    try:
        calls = calls_of(made.pop("tool_calls")) if "tool_calls" in made else []
    except BadRow as error:
        raise _refused(error) from error
    if calls:
        made["tool_calls"] = calls
    for value in (made["content"], made.get("reasoning_content"), made.get("tool_calls")):
        _require_text(value)
    return made


def _refused(error: BadRow) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(error.what, why=error.why, fix=error.fix, code=error.code)


def _require_text(value: Any) -> None:
    """Raise UnfaithfulTemplate for a value that JSON or a tokenizer cannot represent."""
    if not value or (isinstance(value, str) and value.isascii()):
        return
    try:
        text = (
            value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False, allow_nan=False)
        )
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnfaithfulTemplate(
            "a message contains an unpaired surrogate, which is not a character",
            fix="write the character itself, or drop the row",
            code="invalid-text",
        ) from error
    except (TypeError, ValueError) as error:
        raise UnfaithfulTemplate(
            "a tool call has an argument that is not valid JSON",
            why=str(error),
            fix="write dates and other objects as text",
            code="bad-tool-call",
        ) from error


def split_reasoning(message: Message, pairs: Iterable[tuple[str, str]]) -> Message:
    """Split the content of a message that begins with a think block into reasoning and content.

    Other messages are returned unchanged.
    """
    content = message.get("content", "")
    if message.get("role") != "assistant" or message.get("reasoning_content"):
        return message
    for opening, closing in pairs:
        inside, found, rest = content.lstrip().partition(closing)
        if found and inside.startswith(opening):
            reasoning = inside[len(opening) :].strip("\n")
            rest = rest.lstrip("\n")
            return {**message, "content": rest, **_reasoned(reasoning)}
    return message


def _reasoned(reasoning: str) -> Message:
    return {"reasoning_content": reasoning} if reasoning.strip() else {}


def shown(messages: Sequence[Message], shape: Shape, route: str, markers: Markers) -> list[Message]:
    """Return the messages in the form that a template of this shape reads.

    The reasoning is passed on by `route`.
    """
    return [_shown(message, shape, route, markers) for message in messages]


@dataclass(frozen=True)
class Markers:
    """The markers around reasoning.

    Attributes:
        open, close: the bare markers.
        open_text, close_text: the markers with their whitespace.
    """

    open: str = "<think>"
    close: str = "</think>"
    open_text: str = "<think>\n"
    close_text: str = "\n</think>\n\n"


def _shown(message: Message, shape: Shape, route: str, markers: Markers) -> Message:
    made = {key: value for key, value in message.items() if key != "train"}
    if shape.arguments == "string":
        made = with_arguments(made, in_json)
    reasoning = made.get("reasoning_content")
    if reasoning:
        put = _ROUTES.get(route) or _field(route.removeprefix(_OWN_FIELD))
        made = put(made, reasoning, markers)
    if shape.content == "parts" and isinstance(made.get("content"), str):
        made["content"] = [{"type": "text", "text": made["content"]}]
    return made


def with_arguments(message: Mapping[str, Any], form: Callable[[Any], Any]) -> Message:
    """Return a message with the arguments of its calls in another form; the rest is unchanged."""
    made = dict(message)
    if isinstance(calls := made.get("tool_calls"), list | tuple):
        made["tool_calls"] = [_formed(call, form) for call in calls]
    return made


def _formed(call: Any, form: Callable[[Any], Any]) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": form(function.get("arguments", {}))}}


def in_json(arguments: Any) -> str:
    """Return the arguments of a call as JSON text, as in the OpenAI protocol."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def as_object(arguments: Any) -> Any:
    """Return the arguments of a call as objects, as in rows; text that is not JSON is unchanged."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(arguments)
    return arguments


def _field(name: str) -> Callable[[Message, str, Markers], Message]:
    def put(message: Message, reasoning: str, markers: Markers) -> Message:
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        return {**rest, name: reasoning}

    return put


def _part(kind: str, key: str, nested: bool) -> Callable[[Message, str, Markers], Message]:
    def put(message: Message, reasoning: str, markers: Markers) -> Message:
        rest = {k: v for k, v in message.items() if k != "reasoning_content"}
        thought: Any = [{"type": "text", "text": reasoning}] if nested else reasoning
        parts: list[Message] = [{"type": kind, key: thought}]
        if rest.get("content"):
            parts.append({"type": "text", "text": rest["content"]})
        return {**rest, "content": parts}

    return put


def _content(message: Message, reasoning: str, markers: Markers) -> Message:
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    text = f"{markers.open_text}{reasoning}{markers.close_text}{rest.get('content', '')}"
    return {**rest, "content": text}


_OWN_FIELD = "field "


def field_route(name: str) -> str:
    """Return the name of the route through a field that only this template reads."""
    return _OWN_FIELD + name


# In the order in which they are tried.
_ROUTES: dict[str, Callable[[Message, str, Markers], Message]] = {
    **{name: _field(name) for name in FIELDS},
    "thinking part": _part("thinking", "thinking", nested=False),
    "thinking part of parts": _part("thinking", "thinking", nested=True),
    "reasoning part": _part("reasoning", "reasoning", nested=False),
    "reasoning text part": _part("reasoning", "text", nested=False),
    "markers in content": _content,
    "opened": _field("reasoning_content"),
    "filled": _field("reasoning_content"),
    "inline": _content,
    "none": lambda message, reasoning, markers: {
        key: value for key, value in message.items() if key != "reasoning_content"
    },
}
ROUTES = tuple(name for name in _ROUTES if name not in (*COMPOSED, "none"))
# Keys of typed parts. If a template prints them, it has printed the list instead of its text.
PART_KEYS = ("'type':", '"type":')
