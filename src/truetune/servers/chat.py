"""A client of OpenAI's chat protocol.

input   a client, messages and tools as rows hold them
does    writes requests as OpenAI's clients do, and reads what comes back
output  Answer
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.contract.shape import as_object, in_json, with_arguments
from truetune.servers.client import Client, ServerError


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    Attributes:
        text, reasoning: as its parsers have them, "" for none.
        calls: of tools.
        ended: by itself, not at the limit.
        tokens: as it counts them; 0 if it does not.
    """

    text: str
    reasoning: str
    calls: tuple[Mapping[str, Any], ...]
    ended: bool
    tokens: int


# Names of a server's list that are tried.
_NAMES = 8


def require_reachable(client: Client) -> None:
    """Raise ServerError if nothing listens there."""
    _listed(client)


def first_model(client: Client) -> str:
    """The name under which a server answers; "" if requests need none.

    An adapter that vLLM serves names its base as its parent, and is what was trained. transformers
    lists the models of its cache, of which it serves none where it was started with one.

    Raises:
        ServerError: nothing listens there.
    """
    entries = sorted(_listed(client), key=lambda entry: not entry.get("parent"))
    names = [str(entry["id"]) for entry in entries if entry.get("id")]
    hello = [{"role": "user", "content": "Hi."}]
    for name in names[:_NAMES]:
        asked = {"model": name, "messages": hello, "max_tokens": 1, "temperature": 0}
        try:
            client.post("/v1/chat/completions", asked)
            return name
        except ServerError as error:
            if not error.status:
                raise
    return ""


def _listed(client: Client) -> list[Mapping[str, Any]]:
    try:
        return [entry for entry in client.get("/v1/models")["data"] if isinstance(entry, dict)]
    except ServerError as error:
        if not error.status:
            raise
    except (KeyError, TypeError):
        pass
    return []


def request(
    messages: Iterable[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Messages and tools as clients send them: arguments of calls as text, with identifiers."""
    made: dict[str, Any] = {"messages": [_message(message) for message in messages]}
    if tools:
        made["tools"] = [dict(tool) for tool in tools]
    if template_kwargs:
        made["chat_template_kwargs"] = dict(template_kwargs)
    return made


def complete(client: Client, asked: Mapping[str, Any]) -> Answer:
    """One reply.

    Raises:
        ServerError: there was no valid reply.
    """
    answer = client.post("/v1/chat/completions", asked)
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        return Answer(
            str(message.get("content") or ""),
            str(message.get("reasoning_content") or message.get("reasoning") or ""),
            tuple(message.get("tool_calls") or ()),
            choice.get("finish_reason") in ("stop", "tool_calls", "function_call"),
            int((answer.get("usage") or {}).get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ServerError(
            "the server's answer is not a chat completion",
            where=client.url,
            why="a different kind of server listens there",
            fix="use a server that speaks the OpenAI protocol",
        ) from error


def calls_as_text(calls: Iterable[Mapping[str, Any]]) -> str:
    """Calls as one text, the same for the same names and equal arguments; "" for none."""
    made = []
    for call in calls:
        function = call.get("function") or {}
        arguments = as_object(function.get("arguments"))
        made.append({"name": function.get("name"), "arguments": arguments})
    return json.dumps(made, sort_keys=True, ensure_ascii=False) if made else ""


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    made = with_arguments(message, in_json)
    if calls := made.get("tool_calls"):
        made["tool_calls"] = [{"id": f"call{n:05d}", **call} for n, call in enumerate(calls)]
    return made
