"""Rows to conversations.

Input:  a row and, for each slot of its schema, the column that fills it.
Does:   builds the messages, then checks that there is something to ask and something to learn.
Output: `Conversation`s, and a finding for each part of the row that cannot be one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from truetune.data.conversation import Conversation, Message
from truetune.data.messages import messages_of
from truetune.data.rows import BadRow, Row, kind, missing, not_a_number
from truetune.data.schemas import Picks
from truetune.data.tools import tools_of
from truetune.findings import Finding

Cells = dict[str, Any]


def convert(
    row: Row, schema: str, picks: Picks, unused: Counter[str]
) -> Iterator[Conversation | Finding]:
    """What a row holds; nothing for an empty plain text.

    Args:
        row: the row.
        schema: its schema.
        picks: slot to column.
        unused: counts keys inside cells that nothing reads.
    """
    cells: Cells = {slot: row.fields.get(column) for slot, column in picks.items()}
    try:
        parts = _instances(cells) if schema == "instances" else [cells]
    except BadRow as bad:
        yield bad.finding(row.where)
        return
    for number, part in enumerate(parts):
        where = f"{row.where}, instances[{number}]" if schema == "instances" else row.where
        try:
            if isinstance(part, BadRow):
                raise part
            made = _conversation(part, schema, where, unused)
        except BadRow as bad:
            yield bad.finding(where)
        else:
            if made is not None:
                yield made


def _conversation(
    cells: Cells, schema: str, where: str, unused: Counter[str]
) -> Conversation | None:
    if schema == "text":
        text = _text(cells, "text")
        if not text.strip():
            return None
        made = Conversation((), where, text=text)
    else:
        messages = _with_system(_BUILDERS[schema](cells, unused), cells)
        check_turns(messages, turns=schema in ("messages", "sharegpt"))
        made = Conversation(
            tuple(messages),
            where,
            tools=tools_of(cells.get("tools")),
            template_kwargs=_template_kwargs(cells.get("chat_template_kwargs")),
        )
    _check_encodable(made)
    return made


def check_turns(messages: list[Message], *, turns: bool = True) -> None:
    """Refuses a conversation without a question, or without an answer to learn.

    Args:
        turns: the row has turns of its own, which can be marked; columns have none.

    Raises:
        BadRow: `prompt-missing`, `no-assistant-turn`, `empty-answer`.
    """
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise BadRow(
            "no-assistant-turn",
            "the conversation has no assistant turn",
            why="there is nothing to learn from it",
            fix="add the answer, remove the row, or name the column that holds it with --columns",
        )
    if not any(m.get("train", True) for m in answers):
        raise BadRow(
            "no-assistant-turn",
            'every assistant turn is marked "train": false',
            why="there is nothing to learn from it",
            fix='remove "train": false from the answer that is to be learned, or remove the row',
        )
    if messages[0] is answers[0] and answers[0].get("train", True):
        raise BadRow(
            "prompt-missing",
            "the conversation begins with an assistant turn",
            why="a server sends a prompt first; this answer has no prompt",
            fix='put a user turn before it, or mark it "train": false',
        )
    for message in answers:
        if message.get("train", True) and not (
            message["content"].strip() or message.get("tool_calls")
        ):
            raise BadRow(
                "empty-answer",
                "an assistant turn is empty",
                why="the model would learn to stop immediately",
                fix='drop the row, or mark the turn "train": false'
                if turns
                else "drop the row (--bad-rows drop), or fill in its answer",
            )


def _check_encodable(made: Conversation) -> None:
    # JSON may hold half of a surrogate pair; no tokenizer takes it.
    whole = [made.messages, made.tools, made.template_kwargs, made.text]
    try:
        json.dumps(whole, ensure_ascii=False, default=repr).encode("utf-8")
    except RecursionError as error:
        raise BadRow("unsupported-content", "the row is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise BadRow(
            "invalid-text",
            "the row contains an unpaired surrogate, which is not a character",
            why="the text was cut inside an emoji or another character above U+FFFF",
            fix="cut the text between characters, or drop the row",
        ) from error


# --- one builder for each schema ---------------------------------------------------------------


def _chat(cells: Cells, unused: Counter[str]) -> list[Message]:
    return messages_of(cells["messages"], unused)


def _alpaca(cells: Cells, unused: Counter[str]) -> list[Message]:
    return [
        *_history(cells.get("history")),
        _user(_instruction(cells, "instruction")),
        _assistant(_answer(cells, "output")),
    ]


def _prompt_completion(cells: Cells, unused: Counter[str]) -> list[Message]:
    prompt, completion = cells["prompt"], cells["completion"]
    asked = (
        messages_of(prompt, unused)
        if isinstance(prompt, list)
        else [_user(_asked(_text(cells, "prompt"), cells["prompt"]))]
    )
    # The prompt is given, whoever speaks in it; only the completion is to be learned.
    given = [{**m, "train": False} if m["role"] == "assistant" else m for m in asked]
    if not isinstance(completion, list):
        return [*given, _assistant(_answer(cells, "completion"))]
    if not completion:
        raise BadRow("empty-answer", "the completion is empty", fix="drop the row")
    return [*given, *messages_of(completion, unused)]


def _reasoning(cells: Cells, unused: Counter[str]) -> list[Message]:
    answer = _assistant(_answer(cells, "solution"))
    thinking = _text(cells, "thinking")
    if thinking.strip():
        answer["reasoning_content"] = thinking
    return [_user(_instruction(cells, "problem")), answer]


_BUILDERS: dict[str, Callable[[Cells, Counter[str]], list[Message]]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "instances": _alpaca,
    "prompt-completion": _prompt_completion,
    "reasoning": _reasoning,
}


def _instances(cells: Cells) -> list[Cells | BadRow]:
    """Self-instruct: one task, several inputs with their outputs; an alpaca row of each."""
    instances = cells["instances"]
    if not isinstance(instances, list) or not instances:
        raise BadRow(
            "no-assistant-turn", "the task has no instances", fix="add instances, or drop the row"
        )
    common = {slot: value for slot, value in cells.items() if slot != "instances"}
    return [
        {**common, "input": one.get("input"), "output": one.get("output")}
        if isinstance(one, dict)
        else BadRow(
            "bad-message",
            f"an instance is {kind(one)}, not an object",
            fix='write {"input": "...", "output": "..."}',
        )
        for one in instances
    ]


# --- cells -------------------------------------------------------------------------------------


def _text(cells: Cells, slot: str) -> str:
    value = cells.get(slot)
    if missing(value):
        return ""
    if not isinstance(value, str):
        raise BadRow(
            "unsupported-content",
            f"the {slot} is {kind(value)}, not text",
            fix="write it as text",
        )
    return value


def _answer(cells: Cells, slot: str) -> str:
    if isinstance(cells.get(slot), float) and missing(cells[slot]):
        raise not_a_number(f"the {slot}", "empty-answer")
    return _text(cells, slot)


def _asked(prompt: str, cell: Any) -> str:
    if isinstance(cell, float):
        raise not_a_number("the prompt", "prompt-missing")
    if not prompt.strip():
        raise BadRow("prompt-missing", "the prompt is empty", fix="drop the row")
    return prompt


def _instruction(cells: Cells, slot: str) -> str:
    instruction, extra = _text(cells, slot), _text(cells, "input")
    if not extra.strip():
        return _asked(instruction, cells.get(slot))
    return f"{instruction}\n\n{extra}" if instruction.strip() else extra


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _history(value: Any) -> list[Message]:
    if missing(value) or value == "":
        return []
    turns: list[Message] = []
    for pair in value if isinstance(value, list) else [value]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair))):
            raise BadRow(
                "bad-history",
                "the history is not a list of pairs of strings",
                fix='write [["question", "answer"], ...]',
            )
        turns += [_user(pair[0]), _assistant(pair[1])]
    return turns


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _with_system(messages: list[Message], cells: Cells) -> list[Message]:
    system = _text(cells, "system")
    if not system.strip():
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] == system:
            return messages
        raise BadRow(
            "two-systems",
            "the system column and the first turn contain different system messages",
            fix="keep one of them",
        )
    return [{"role": "system", "content": system}, *messages]


def _template_kwargs(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip():
        with suppress(ValueError):
            value = json.loads(value)
    if missing(value) or value == "":
        return {}
    if not isinstance(value, dict):
        raise BadRow(
            "bad-template-kwargs",
            f"chat_template_kwargs is {kind(value)}, not an object",
            fix='write {"enable_thinking": false}, or leave it out',
        )
    return value
