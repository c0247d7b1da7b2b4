"""Serve a model on this machine with the OpenAI chat protocol, with prompts made by its contract.

input   a loaded model and its contract, or a GGUF file
does    transformers: /v1/chat/completions and /v1/models over `generate`, one request at a time,
        and /apply-template and /tokenize, so that it can be diagnosed like llama.cpp; GGUF:
        llama.cpp's own server, with the settings under which the file was verified, behind the
        same reading of chat requests
output  a server on 127.0.0.1; nothing else is served
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.parse
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.contract.render import Renderer, RenderJob
from truetune.contract.shape import as_object, with_arguments
from truetune.errors import TruetuneError, UnfaithfulTemplate, is_out_of_memory
from truetune.exporting.gguf import PROOF
from truetune.findings import visible
from truetune.generate import Reply, stream
from truetune.model.load import LoadedModel
from truetune.model.stop_texts import StopTexts
from truetune.servers.client import ServerError
from truetune.servers.llama_cpp import LlamaCpp, serving
from truetune.servers.protocol import (
    LLAMA_CPP,
    ChatRequest,
    Messages,
    Refused,
    no_such_model,
    no_such_path,
    read_chat,
    read_messages,
    require_rendered,
)
from truetune.system.local_http import LocalHandler, LocalServer, require_port, serving_here
from truetune.system.threads import begin

# A request longer than this is none of a chat.
_MOST_BYTES = 16 * 2**20
# A client that says nothing for so many seconds is let go.
_PATIENCE = 60
# Seconds that a token may take when the server ends.
_LAST = 10
_CHAT, _MODELS = "/v1/chat/completions", "/v1/models"
# What llama.cpp takes for "any seed" is the number after these.
_SEEDS = 2**32 - 1


@dataclass(frozen=True)
class Served:
    """The model that is served.

    Attributes:
        name: that `/v1/models` lists.
        model, contract: see `generate.replies`.
        aliases: other names under which clients may ask for it.
    """

    name: str
    model: LoadedModel
    contract: PromptContract
    aliases: tuple[str, ...] = ()


@contextlib.contextmanager
def serving_chat(served: Served, port: int) -> Iterator[LocalServer]:
    """Open a server on its port.

    Raises:
        UsageError: the port cannot be had.
    """
    subject = _OwnModel((served.name, *served.aliases), served)
    with serving_here(_OwnHandler, port, subject) as server:
        try:
            yield server
        finally:
            # torch ends the process noisily while another thread is at work.
            subject.ending.set()
            if subject.lock.acquire(timeout=_LAST):
                subject.lock.release()


@contextlib.contextmanager
def serving_gguf(
    path: Path, port: int, *, fast: bool, name: str, aliases: tuple[str, ...] = ()
) -> Iterator[LocalServer]:
    """llama.cpp's own server for a file. It listens on a port of its own, with a key that nobody
    else has: every request passes through the one that is given here.

    Args:
        fast: llama.cpp's own settings: keys and values in half precision, fused attention.
        name, aliases: as of `Served`.

    Raises:
        UsageError: the port cannot be had.
        LlamaError: llama.cpp cannot load the file, or ended while it served.
    """
    arguments: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        # An export tells with which template arguments its prompts are those of training.
        proof = json.loads((path.parent / PROOF).read_text(encoding="utf-8"))
        if isinstance(proof, dict) and proof.get("file") == path.name:
            arguments = dict(proof.get("template_kwargs") or {})
    require_port(port)
    with serving(path, exact=not fast, template_kwargs=arguments, name=name) as llama:
        subject = _LlamaModel((name, *aliases), llama, _Template.of(llama, arguments))
        with serving_here(_LlamaHandler, port, subject) as server:
            yield server
        if subject.failed:
            raise subject.failed


@dataclass(frozen=True)
class _OwnModel:
    names: tuple[str, ...]
    served: Served
    # One request at a time is answered.
    lock: threading.Lock = field(default_factory=threading.Lock)
    ending: threading.Event = field(default_factory=threading.Event)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class _Template:
    """A GGUF file's own chat template, asked what it refuses: llama.cpp writes what some templates
    refuse, such as a system message, into another message, which was never trained."""

    renderers: tuple[Renderer, ...]

    @classmethod
    def of(cls, llama: LlamaCpp, arguments: Mapping[str, Any]) -> _Template:
        """The template that a server has loaded; nothing is refused if it has none."""
        props = llama.props()
        special = {key: str(props.get(key) or "") for key in ("bos_token", "eos_token")}
        source = props.get("chat_template")
        if not isinstance(source, str) or not source:
            return cls(())
        tools = props.get("chat_template_tool_use")
        other = tools if isinstance(tools, str) and tools else None
        return cls((Renderer(source, special, arguments, other),))

    def require_accepted(
        self, messages: Messages, tools: Any, arguments: Mapping[str, Any]
    ) -> None:
        """Raise UnfaithfulTemplate if the template refuses a conversation.

        Templates expect arguments of calls as text or as objects: either will do.
        """
        for renderer in self.renderers:
            first, *rest = renderer.render_many(
                [
                    RenderJob(form, tools, prompt=True, arguments=arguments)
                    for form in (messages, [with_arguments(m, as_object) for m in messages])
                ]
            )
            refused = [text for text in (first, *rest) if isinstance(text, UnfaithfulTemplate)]
            if len(refused) == 1 + len(rest) and refused[0].code == "template-refuses":
                raise refused[0]


@dataclass
class _LlamaModel:
    names: tuple[str, ...]
    llama: LlamaCpp
    template: _Template
    # Why it no longer answers.
    failed: ServerError | None = None


class _Handler(LocalHandler):
    """The common part of both servers: access control, and errors as the protocol defines them."""

    timeout = _PATIENCE
    _begun = False

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _get(self) -> None:
        raise NotImplementedError

    def _post(self) -> None:
        raise NotImplementedError

    @property
    def where(self) -> str:
        """The requested path."""
        return self.path.partition("?")[0].rstrip("/") or "/"

    def _answered(self, work: Any) -> None:
        try:
            try:
                self._require_local()
                work()
            except Refused as error:
                self._refuse(error)
            except TruetuneError as error:
                why = f" ({error.why})" if error.why else ""
                self._refuse(Refused(f"{error.what}{why}"))
            except OSError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    refusal = Refused(
                        "the server ran out of memory: send a shorter request", status=503
                    )
                else:
                    said = visible(f"{type(error).__name__}: {error}"[:300], keep_newlines=False)
                    refusal = Refused(f"the server failed: {said}", status=500)
                self._refuse(refusal)
        except OSError:
            # The client has gone away, or says nothing.
            self.close_connection = True

    def _refuse(self, error: Refused) -> None:
        if self._begun:
            # The status has been sent: the error is the last event.
            self._event(json.dumps(error.body))
        else:
            self._send(error.status, error.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What Python's server refuses: unknown methods, requests that are none of HTTP."""
        status = 405 if code == 501 else int(code)
        self.close_connection = True
        self._send(status, Refused(message or "this is not an HTTP request", status=status).body)

    def _require_local(self) -> None:
        """Refuse requests through foreign host names (DNS rebinding) and from pages of other
        origins."""
        if not self.is_named_rightly():
            raise Refused("this server accepts only requests from this machine", status=403)
        origin = self.headers.get("Origin")
        if origin is not None and origin.split("://")[-1].lower() not in self.hosts():
            raise Refused(
                "this server does not accept requests from pages of other origins", status=403
            )

    def _one_model(self, names: tuple[str, ...], entry: Mapping[str, Any]) -> None:
        """The model of the list, asked for by a name."""
        name = urllib.parse.unquote(self.where.removeprefix(f"{_MODELS}/"))
        if name not in names:
            raise no_such_model(name, names)
        self._send(200, entry)

    def _raw(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            raise Refused("Content-Length is not a number") from None
        if length > _MOST_BYTES:
            raise Refused(f"the request is longer than {_MOST_BYTES // 2**20} MiB", status=413)
        return self.rfile.read(length) if length > 0 else b""

    def _object(self, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused(
                "the request is not valid JSON" if raw else "the request has no body"
            ) from None
        if not isinstance(value, dict):
            raise Refused("the request is not a JSON object")
        return value

    def _event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode("utf-8"), "application/json")


class _OwnHandler(_Handler):
    """A loaded model, over `generate`."""

    @property
    def model(self) -> _OwnModel:
        model: _OwnModel = self.server.subject
        return model

    def _get(self) -> None:
        entry = {
            "id": self.model.names[0],
            "object": "model",
            "created": self.model.created,
            "owned_by": "truetune",
        }
        if self.where == "/health":
            self._send(200, {"status": "ok"})
        elif self.where == _MODELS:
            self._send(200, {"object": "list", "data": [entry]})
        elif self.where.startswith(f"{_MODELS}/"):
            self._one_model(self.model.names, entry)
        else:
            raise no_such_path("GET", self.path)

    def _post(self) -> None:
        raw = self._raw()
        if self.where not in (_CHAT, "/apply-template", "/tokenize"):
            raise no_such_path("POST", self.path)
        asked = self._object(raw)
        contract = self.model.served.contract
        if self.where == "/tokenize":
            text = str(asked.get("content", ""))
            self._send(200, {"tokens": contract.tokens.encode([text])[0]})
        elif self.where == "/apply-template":
            self._send(200, {"prompt": contract.prompt_text(*read_messages(asked))})
        else:
            self._chat(read_chat(asked, self.model.names))

    def _chat(self, request: ChatRequest) -> None:
        contract = self.model.served.contract
        if request.arguments:
            raise Refused(
                "chat_template_kwargs is not supported: prompts are rendered as in training",
                param="chat_template_kwargs",
            )
        require_rendered(contract.prompt_text, request.messages, request.tools)
        with self.model.lock:
            served = self.model.served
            pieces = stream(
                served.model,
                contract,
                request.messages,
                request.sampling,
                tools=request.tools,
                stop_texts=request.stops,
            )
            with contextlib.closing(pieces):
                answer = self._stream if request.stream else self._whole
                answer(_until(self.model.ending, pieces), request)

    def _whole(self, pieces: Generator[str, None, Reply], request: ChatRequest) -> None:
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                reply = end.value
                break
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": _reason(reply),
        }
        self._send(
            200, {**self._head("chat.completion"), "choices": [choice], "usage": _use(reply)}
        )

    def _stream(self, pieces: Generator[str, None, Reply], request: ChatRequest) -> None:
        head = self._head("chat.completion.chunk")
        # What is wrong with a request shows before the first piece.
        reply, first = None, ""
        try:
            first = next(pieces)
        except StopIteration as end:
            reply = end.value
        kind = "text/event-stream; charset=utf-8"
        self.begin(200, {"Content-Type": kind, "Connection": "close"})
        self._begun = self.close_connection = True

        def say(delta: Mapping[str, Any], reason: str | None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            self._event(json.dumps({**head, "choices": [choice]}))

        say({"role": "assistant", "content": first}, None)
        while reply is None:
            try:
                say({"content": next(pieces)}, None)
            except StopIteration as end:
                reply = end.value
        say({}, _reason(reply))
        if request.with_usage:
            self._event(json.dumps({**head, "choices": [], "usage": _use(reply)}))
        self._event("[DONE]")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model.names[0],
        }


class _LlamaHandler(_Handler):
    """llama.cpp's own server: chat requests are read here first, all else is handed on."""

    @property
    def model(self) -> _LlamaModel:
        model: _LlamaModel = self.server.subject
        return model

    def _answered(self, work: Any) -> None:
        super()._answered(work)
        if self.model.failed:
            # The command ends with the reason.
            begin(self.server.shutdown)

    def _get(self) -> None:
        if self.where.startswith(f"{_MODELS}/"):
            (entry,) = self.model.llama.client.get(_MODELS)["data"]
            self._one_model(self.model.names, entry)
        else:
            self._hand_on("GET", None)

    def _post(self) -> None:
        raw = self._raw()
        cut = None
        if self.where == _CHAT:
            asked = self._object(raw)
            request = read_chat(asked, self.model.names, LLAMA_CPP)
            self.model.template.require_accepted(request.messages, request.tools, request.arguments)
            self._require_rendered(request)
            made = _for_llama(asked, request, self.model.names[0])
            if request.stream and request.stops:
                # llama.cpp loses what it holds back of a stream that ends at the limit.
                cut = request
                del made["stop"]
                made["timings_per_token"] = True
            raw = json.dumps(made).encode("utf-8")
        elif self.where == "/apply-template":
            self.model.template.require_accepted(*read_messages(self._object(raw)))
        self._hand_on("POST", raw, cut)

    def _require_rendered(self, request: ChatRequest) -> None:
        def render(messages: Messages, tools: Any) -> str:
            return self.model.llama.prompt(messages, tools, request.arguments)

        # Why llama.cpp refuses a conversation is its answer to the request itself.
        with contextlib.suppress(ServerError):
            require_rendered(render, request.messages, request.tools)

    def _hand_on(self, method: str, body: bytes | None, cut: ChatRequest | None = None) -> None:
        """Pass on a request, and its answer as it comes.

        Args:
            cut: a request whose stream ends at its stop texts.
        """
        try:
            answer = self.model.llama.client.raw(method, self.path, body)
        except ServerError as error:
            self.model.failed = error
            raise Refused(
                "llama.cpp has stopped; see the terminal for the reason", status=502
            ) from error
        with contextlib.closing(answer):
            kept = ("Content-Type", "Content-Length")
            headers = {name: answer.headers[name] for name in kept if name in answer.headers}
            self.begin(answer.status, {**headers, "Connection": "close"})
            self._begun = self.close_connection = True
            if cut and answer.status == 200:
                for event in _until_stop(answer, cut):
                    self._event(event)
                return
            while piece := answer.read1(65536):
                self.wfile.write(piece)
                self.wfile.flush()


def _until(
    ending: threading.Event, pieces: Generator[str, None, Reply]
) -> Generator[str, None, Reply]:
    while not ending.is_set():
        try:
            yield next(pieces)
        except StopIteration as end:
            reply: Reply = end.value
            return reply
    raise Refused("the server is being stopped", status=503)


def _until_stop(lines: Iterable[bytes], request: ChatRequest) -> Iterator[str]:
    """The events of llama.cpp's stream, up to a stop text and without what begins it."""
    stops = StopTexts(request.stops)
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        said = line.decode("utf-8").removeprefix("data:").strip()
        if said == "[DONE]":
            yield said
            continue
        event = json.loads(said)
        timings = event.pop("timings", None)
        choice = next(iter(event.get("choices") or ()), None)
        if choice is None:
            yield json.dumps(event)
            continue
        delta = choice.setdefault("delta", {})
        if isinstance(piece := delta.get("content"), str):
            delta["content"] = stops.add(piece)
        elif choice.get("finish_reason"):
            # The reply has ended otherwise.
            delta["content"] = stops.finish()
        if delta.get("content") != "" or choice.get("finish_reason"):
            yield json.dumps(event)
        if stops.found:
            last = {**choice, "delta": {}, "finish_reason": "stop"}
            yield json.dumps({**event, "choices": [last]})
            if request.with_usage:
                counted = timings or {}
                prompt = counted.get("cache_n", 0) + counted.get("prompt_n", 0)
                use = _counts(prompt, counted.get("predicted_n", 0))
                yield json.dumps({**event, "choices": [], "usage": use})
            yield "[DONE]"
            return


def _for_llama(asked: Mapping[str, Any], request: ChatRequest, name: str) -> dict[str, Any]:
    """A request as llama.cpp reads it: what it does not name is as with transformers, not as
    llama.cpp has it (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05)."""
    drawn = request.sampling
    made = {"min_p": 0.0, **{key: value for key, value in asked.items() if value is not None}}
    for key in ("stop", "max_completion_tokens", "repetition_penalty"):
        made.pop(key, None)
    made |= {
        "model": name,
        "temperature": drawn.temperature,
        "top_p": drawn.top_p,
        "top_k": drawn.top_k,
        "seed": drawn.seed % _SEEDS,
    }
    if "n_predict" not in made:
        made["max_tokens"] = drawn.max_new_tokens
    if request.stops:
        made["stop"] = list(request.stops)
    if drawn.repetition_penalty != 1:
        made |= {"repeat_penalty": drawn.repetition_penalty, "repeat_last_n": -1}
    return made


def _reason(reply: Reply) -> str:
    return "stop" if reply.stopped else "length"


def _use(reply: Reply) -> dict[str, int]:
    return _counts(reply.prompt_tokens, len(reply.ids))


def _counts(prompt: int, written: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }
