"""Convert turns to their canonical form.

Input:  a list of turns: OpenAI's role/content, sharegpt's from/value, typed content parts.
Does:   gives each OpenAI's roles and keys; refuses what that form cannot express.
Output: a list of messages as `Conversation.messages` describes them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from truetune.data.conversation import Message
from truetune.data.rows import BadRow, excerpt, kind, missing, not_a_number
from truetune.data.tools import calls_of

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
_CALLING = ("function_call", "tool_call")
_TURNS_FIX = 'write [{"role": "user", "content": "..."}, ...]'
_READ = frozenset(
    {"role", "from", "content", "value", "reasoning_content", "reasoning", "thinking"}
    | {"tool_calls", "function_call", "name", "tool_call_id", "train", "weight"}
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking", "think", "reasoning_text")
_CALL_PARTS = ("tool_call", "tool_calls", "tool_use", "function_call")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos", "file", "files")


def messages_of(value: Any, unused: Counter[str]) -> list[Message]:
    """A list of turns, or its JSON text.

    Args:
        value: the cell.
        unused: counts the keys of turns that nothing reads, as `messages[].key`.

    Raises:
        BadRow: `prompt-missing`, `bad-message`, `unknown-role`, `unsupported-content`,
            `bad-tool-call`, `bad-train-flag`.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                "bad-message", "the list of turns is text that is not valid JSON", fix=_TURNS_FIX
            ) from error
    if missing(value) or value in ("", []):
        raise BadRow("prompt-missing", "the list of turns is empty", fix="drop the row")
    if not isinstance(value, list | tuple):
        raise BadRow("bad-message", f"the turns are {kind(value)}, not a list", fix=_TURNS_FIX)
    return [message_of(turn, unused) for turn in value]


def message_of(turn: Any, unused: Counter[str]) -> Message:
    """One turn; see `messages_of`."""
    if not isinstance(turn, dict):
        raise BadRow("bad-message", f"a turn is {kind(turn)}, not an object", fix=_TURNS_FIX)
    if not turn.keys() <= _READ:
        _unread(turn, unused)
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        named = f"the role {excerpt(said)}" if isinstance(said, str) else "no role"
        raise BadRow(
            "unknown-role",
            f"a turn has {named}",
            why="a chat template renders system, developer, user, assistant and tool",
            fix="rename the role in the data",
        )
    content = turn.get("content", turn.get("value"))
    if len(turn) == 2 and isinstance(content, str) and role == said:
        return {"role": role, "content": content}  # most turns: half the time of a large file
    if isinstance(said, str) and said.strip().lower() in _CALLING:
        text, reasoning, calls = "", "", calls_of(content)
        if not calls:
            raise BadRow(
                "bad-tool-call",
                "a function_call turn contains no call",
                fix="add the call, or drop the row",
            )
    else:
        text, reasoning, calls = content_of(content)
        if isinstance(content, float) and not (turn.get("tool_calls") or turn.get("function_call")):
            raise not_a_number("the content of a turn", "unsupported-content")
    fields = (_text(turn, key) for key in ("reasoning_content", "reasoning", "thinking"))
    thoughts = {thought for thought in (reasoning, *fields) if thought.strip()}
    calls = _one_of(calls, calls_of(turn.get("tool_calls")), calls_of(turn.get("function_call")))
    _only_assistant(role, thoughts, calls)
    message: Message = {"role": role, "content": text}
    if thoughts:
        message["reasoning_content"] = thoughts.pop()
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if extra := _text(turn, key):
            message[key] = extra
    train = _train(turn)
    if train is not None:
        message["train"] = train
    return message


def content_of(content: Any) -> tuple[str, str, list[dict[str, Any]]]:
    """Text, reasoning and tool calls of a turn's content.

    Raises:
        BadRow: `unsupported-content`, `bad-tool-call`.
    """
    if isinstance(content, str):
        return content, "", []
    if missing(content):
        return "", "", []
    if not isinstance(content, list | tuple):
        raise _unsupported(f"the content of a turn is {kind(content)}, not text")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise _unsupported(f"a content part is {kind(part)}, not an object with a type")
        what = part.get("type")
        if what in _REASONING_PARTS:
            if texts or calls:
                raise _order("reasoning")
            thoughts.append(_part_text(part, ("value", "thinking", "reasoning", "text", "content")))
        elif what in _TEXT_PARTS:
            if calls:
                raise _order("text")
            texts.append(_part_text(part, ("text", "value", "content")))
        elif what in _CALL_PARTS:
            calls += calls_of(_part_call(part))
        else:
            if "role" in part:
                raise _unsupported(
                    "the content of a turn is a list of messages",
                    why="there is a message with a role where text or a typed part is expected",
                    fix="use the text of one turn as its content",
                )
            named = f"the type {excerpt(what)}" if isinstance(what, str) else "no type"
            raise _unsupported(f"a content part has {named}")
    return "".join(texts), "\n\n".join(filter(None, thoughts)), calls


def _part_text(part: dict[str, Any], keys: Iterable[str]) -> str:
    for key in keys:
        if isinstance(part.get(key), str):
            return part[key]
    raise _unsupported(f"a {part['type']} part holds no text")


def _part_call(part: dict[str, Any]) -> Any:
    for key in ("value", "tool_call", "tool_calls", "function_call"):
        if not missing(part.get(key)):
            return part[key]
    return part  # the call's own keys stand in the part, as in Anthropic's tool_use


def _order(late: str) -> BadRow:
    return _unsupported(
        f"{late} comes after what it should precede",
        why="a message is rendered as reasoning, text, tool calls: the order would change",
        fix="split the turn in two",
    )


def _unsupported(what: str, *, why: str = "", fix: str = "") -> BadRow:
    return BadRow(
        "unsupported-content",
        what,
        why=why or "truetune trains on text, reasoning and tool calls",
        fix=fix or "drop the row, or write the part as text",
    )


def _text(turn: Message, key: str) -> str:
    value = turn.get(key)
    if missing(value):
        return ""
    if not isinstance(value, str):
        raise _unsupported(f"`{key}` of a turn is {kind(value)}, not text")
    return value


def _only_assistant(role: str, thoughts: set[str], calls: list[dict[str, Any]]) -> None:
    if len(thoughts) > 1:
        raise _unsupported(
            "a turn has reasoning in two places, with different text", fix="keep one of them"
        )
    if role != "assistant" and thoughts:
        raise _unsupported(f"a {role} turn has reasoning", fix="remove it, or correct the role")
    if role != "assistant" and calls:
        raise BadRow("bad-tool-call", f"a {role} turn calls a tool", fix="correct the role")


def _one_of(*places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    filled = [calls for calls in places if calls]
    if len(filled) > 1:
        raise BadRow("bad-tool-call", "a turn has tool calls in two places", fix="keep one of them")
    return filled[0] if filled else []


def _train(turn: Message) -> bool | None:
    found = {key: turn[key] for key in ("train", "weight") if not missing(turn.get(key))}
    if any(value not in (0, 1) for value in found.values()):
        raise BadRow(
            "bad-train-flag",
            "`train` or `weight` of a turn is not true, false, 1 or 0",
            why="the model is either trained on a turn or not",
            fix="set it to true or false",
        )
    flags = {bool(value) for value in found.values()}
    if len(flags) > 1:
        raise BadRow(
            "bad-train-flag",
            "`train` and `weight` of a turn contradict each other",
            fix="keep one of them",
        )
    return flags.pop() if flags else None


def _unread(turn: Message, unused: Counter[str]) -> None:
    for key, value in turn.items():
        if key in _READ or missing(value) or value in ("", []):
            continue
        if key in _MEDIA:
            raise _unsupported(f"a turn has {key}")
        unused[f"messages[].{key}"] += 1
