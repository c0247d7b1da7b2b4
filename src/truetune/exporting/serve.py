"""Serve a model on this machine with the OpenAI chat protocol, with prompts made by its contract.

input   a loaded model and its contract, or a GGUF file
does    transformers: /v1/chat/completions and /v1/models over `generate`, one request at a time,
        and /apply-template and /tokenize, so that it can be diagnosed like llama.cpp; GGUF:
        llama.cpp's own server, with the settings under which the file was verified
output  a server on 127.0.0.1; nothing else is served
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.errors import TruetuneError
from truetune.exporting.gguf import PROOF
from truetune.generate import Reply, replies, stream
from truetune.model.draw import Sampling
from truetune.model.load import LoadedModel
from truetune.servers.llama_cpp import serving
from truetune.system.local_http import LocalHandler, LocalServer, require_port, serving_here

# A request longer than this is none of a chat.
_MOST_BYTES = 16 * 2**20
# A client that says nothing for so many seconds is let go.
_PATIENCE = 60
# New tokens where a request names no number.
_TOKENS = 1024
# What a request may ask for, and what of it has no effect here: it is refused, not ignored.
_REFUSED = ("n", "logprobs", "top_logprobs", "logit_bias", "response_format", "stop")
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "logprobs": (False, None),
    "top_logprobs": (None, 0),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "stop": ([], "", None),
}


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        name: that clients use.
        model, contract: see `generate.replies`.
    """

    name: str
    model: LoadedModel
    contract: PromptContract


@contextlib.contextmanager
def serving_chat(served: Served, port: int) -> Iterator[LocalServer]:
    """Open a server on its port.

    Raises:
        UsageError: the port cannot be had.
    """
    # One request at a time is answered.
    with serving_here(_Handler, port, (served, threading.Lock())) as server:
        yield server


class _Refused(Exception):
    """A request that cannot be answered, reported as the protocol defines."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(LocalHandler):
    timeout = _PATIENCE

    @property
    def served(self) -> Served:
        served: Served = self.server.subject[0]
        return served

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, work: Any) -> None:
        """An error as the protocol defines it."""
        try:
            self._require_local()
            work()
        except _Refused as error:
            self._send(error.status, _error(str(error)))
        except TruetuneError as error:
            self._send(400, _error(f"{error.what} {error.why}".strip()))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True

    def _require_local(self) -> None:
        """Refuse requests through foreign host names (DNS rebinding) and from pages of other
        origins."""
        if not self.is_named_rightly():
            raise _Refused(403, "this server accepts only requests from this machine")
        origin = self.headers.get("Origin")
        if origin is not None and origin.split("://")[-1].lower() not in self.hosts():
            raise _Refused(403, "this server does not accept requests from pages of other origins")

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            return self._send(200, {"status": "ok"})
        if path == "/v1/models":
            entry = {"id": self.served.name, "object": "model", "owned_by": "truetune"}
            return self._send(200, {"object": "list", "data": [entry]})
        raise _Refused(404, "the paths are /v1/chat/completions, /v1/models and /health")

    def _post(self) -> None:
        path = self.path.partition("?")[0]
        asked = self._body()
        contract = self.served.contract
        if path == "/tokenize":
            text = str(asked.get("content", ""))
            return self._send(200, {"tokens": contract.tokens.encode([text])[0]})
        messages, tools, sampling = _request(asked)
        arguments = asked.get("chat_template_kwargs") or {}
        if path == "/apply-template":
            return self._send(200, {"prompt": contract.prompt_text(messages, tools, arguments)})
        if path != "/v1/chat/completions":
            raise _Refused(404, "the paths are /v1/chat/completions, /v1/models and /health")
        if arguments:
            raise _Refused(
                400, "chat_template_kwargs is not supported: prompts are rendered as in training"
            )
        answer = self._stream if asked.get("stream") else self._whole
        with self.server.subject[1]:
            return answer(messages, tools, sampling)

    def _body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            raise _Refused(400, "Content-Length is not a number") from None
        if not 0 < length <= _MOST_BYTES:
            raise _Refused(413 if length > 0 else 400, "the request body is missing or too long")
        try:
            value = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise _Refused(400, "the request is not valid JSON") from None
        if not isinstance(value, dict):
            raise _Refused(400, "the request is not a JSON object")
        return value

    def _whole(self, messages: Any, tools: Any, sampling: Sampling) -> None:
        served = self.served
        (reply,) = replies(served.model, served.contract, [messages], sampling, tools=tools)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": _reason(reply),
        }
        self._send(
            200, {**self._head("chat.completion"), "choices": [choice], "usage": _use(reply)}
        )

    def _stream(self, messages: Any, tools: Any, sampling: Sampling) -> None:
        served = self.served
        head = self._head("chat.completion.chunk")
        pieces = stream(served.model, served.contract, messages, sampling, tools=tools)
        # What is wrong with a request shows before the first piece.
        reply, first = None, ""
        try:
            first = next(pieces)
        except StopIteration as end:
            reply = end.value
        kind = "text/event-stream; charset=utf-8"
        self.begin(200, {"Content-Type": kind, "Connection": "close"})
        self.close_connection = True

        def say(delta: Mapping[str, Any], reason: str | None, **more: Any) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            self._event(json.dumps({**head, "choices": [choice], **more}))

        say({"role": "assistant", "content": first}, None)
        with contextlib.closing(pieces):
            while reply is None:
                try:
                    say({"content": next(pieces)}, None)
                except StopIteration as end:
                    reply = end.value
        say({}, _reason(reply), usage=_use(reply))
        self._event("[DONE]")

    def _event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.served.name,
        }

    def _send(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode("utf-8"), "application/json")


def _request(asked: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any, Sampling]:
    """Messages, tools and sampling of a request.

    Raises:
        _Refused: something of it cannot be done here.
    """
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Refused(400, "messages is not a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise _Refused(400, "a message is not an object")
    for name in _REFUSED:
        if name in asked and asked[name] not in _HARMLESS[name]:
            raise _Refused(400, f"{name} is not supported by this server")
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or _TOKENS
    try:
        sampling = Sampling(
            max_new_tokens=int(limit),
            temperature=float(_or(asked.get("temperature"), 0.0)),
            top_p=float(_or(asked.get("top_p"), 1.0)),
            top_k=int(_or(asked.get("top_k"), 0)),
            repetition_penalty=float(_or(asked.get("repetition_penalty"), 1.0)),
            seed=int(_or(asked.get("seed"), 0)),
        )
    except (TypeError, ValueError):
        raise _Refused(400, "a sampling parameter is not a number") from None
    return [_message(message) for message in messages], asked.get("tools") or None, sampling


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one text."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise _Refused(400, "only text content is supported")
        content = "".join(str(part.get("text", "")) for part in content)
    return {**message, "content": "" if content is None else content}


def _reason(reply: Reply) -> str:
    return "stop" if reply.stopped else "length"


def _use(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": len(reply.ids),
        "total_tokens": reply.prompt_tokens + len(reply.ids),
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


@contextlib.contextmanager
def serving_gguf(path: Path, port: int, *, fast: bool, name: str) -> Iterator[str]:
    """llama.cpp's own server for a file; its address.

    Args:
        fast: llama.cpp's own settings: keys and values in half precision, fused attention.
    """
    arguments: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        # An export tells with which template arguments its prompts are those of training.
        proof = json.loads((path.parent / PROOF).read_text(encoding="utf-8"))
        if isinstance(proof, dict) and proof.get("file") == path.name:
            arguments = dict(proof.get("template_kwargs") or {})
    require_port(port)
    with serving(
        path, exact=not fast, port=port, key="", template_kwargs=arguments, name=name
    ) as server:
        yield server.url
