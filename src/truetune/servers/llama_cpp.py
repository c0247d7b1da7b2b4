"""Serve a GGUF file with llama.cpp's own server in a child process, and ask it.

input   a GGUF file
does    starts llama.cpp's server on a free port of this machine, in a separate process, because an
        untrusted file may crash it
output  LlamaCpp: prompts, ids, log-probabilities and replies as that server makes them
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import TruetuneError, UsageError
from truetune.findings import visible
from truetune.servers.client import Client, ServerError
from truetune.system import child, threads

_WORKER = "truetune.servers.llama_worker"
# Lines of llama.cpp's own words that are kept for an error.
_LINES = 40


class LlamaError(TruetuneError):
    """llama.cpp could not load a file, or crashed."""

    default_code = "llama-cpp-failed"


def require_llama_cpp(what: str) -> None:
    """Raise if llama.cpp is missing.

    Args:
        what: needs it.

    Raises:
        UsageError: the extra is not installed.
    """
    missing = [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed",
            why="gguf writes the file; xllamacpp contains llama.cpp, which verifies and serves it",
            fix="pip install 'truetune[gguf]'",
            code="extra-missing",
        )


def require_gguf(path: Path, where: str = "") -> None:
    """Raise if a file is not a GGUF file.

    Raises:
        UsageError: the file does not begin as GGUF files do.
    """
    try:
        with path.open("rb") as file:
            first = file.read(24)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            where=where,
            fix="make it readable, or specify another file",
            code="no-such-file",
        ) from error
    if first.startswith(b"GGUF"):
        return
    pointer = first.startswith(b"version https://git-lfs")
    raise UsageError(
        f"{path} is not a GGUF file",
        where=where,
        why="it is empty"
        if not first
        else "it is a Git LFS pointer: the file itself was not downloaded"
        if pointer
        else f"its first bytes are {first[:4]!r} instead of {b'GGUF'!r}",
        fix="fetch it with git lfs pull"
        if pointer
        else "specify a GGUF file, or write one: truetune export RUN --to gguf -o DIR",
        code="not-gguf",
    )


@dataclass(frozen=True)
class Predicted:
    """A server's prediction after some ids.

    Attributes:
        logprobs: natural logarithms by token id, of the likeliest tokens.
        token: the likeliest.
    """

    logprobs: dict[int, float]
    token: int


class LlamaCpp:
    """One running server."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def url(self) -> str:
        return self.client.url

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a text in which special tokens are recognised."""
        asked = {"content": text, "add_special": add_special, "parse_special": True}
        return [int(i) for i in self.client.post("/tokenize", asked)["tokens"]]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the server makes of messages, which it tokenizes with `add_special`."""
        asked: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        if tools:
            asked["tools"] = [dict(tool) for tool in tools]
        if template_kwargs:
            asked["chat_template_kwargs"] = dict(template_kwargs)
        return str(self.client.post("/apply-template", asked)["prompt"])

    def predict(self, ids: Sequence[int], top: int) -> Predicted:
        """Predict the token after these ids.

        Raises:
            ServerError: it returns no probabilities, or they are not numbers.
        """
        answer = self.client.post(
            "/completion",
            # Where the likeliest token ends the reply, or is a part of a character, llama.cpp would
            # tell nothing: it is made to take another, which changes nothing of what it tells.
            {**_GREEDY, "prompt": list(ids), "n_predict": 1, "n_probs": top}
            | {"logit_bias": [[self._printable, 1e4]]},
        )
        if not answer.get("completion_probabilities"):
            raise ServerError("the server returns no probabilities", where=self.url)
        first = answer["completion_probabilities"][0]
        if any(t.get("logprob") is None for t in first["top_logprobs"]):
            # JSON has no NaN.
            raise ServerError("the model's predictions are not numbers", where=self.url)
        logprobs = {int(t["id"]): float(t["logprob"]) for t in first["top_logprobs"]}
        return Predicted(logprobs, max(logprobs, key=lambda i: logprobs[i]))

    def reply(self, ids: Sequence[int], most: int) -> tuple[list[int], bool]:
        """The greedy continuation, and whether the server ended it by itself; the token that ended
        it is left out."""
        answer = self.client.post(
            "/completion",
            {**_GREEDY, "prompt": list(ids), "n_predict": most, "return_tokens": True},
        )
        return [int(i) for i in answer["tokens"]], answer.get("stop_type") == "eos"

    def ends_on(self, ids: Sequence[int], token: int) -> bool:
        """Whether the server ends a reply on a token, found by making it write that token."""
        asked = {**_GREEDY, "prompt": list(ids), "n_predict": 2, "logit_bias": [[token, 1e4]]}
        return bool(self.client.post("/completion", asked).get("stop_type") == "eos")

    @functools.cached_property
    def _printable(self) -> int:
        """A token that is a character of its own."""
        return next((i for text in "a.e1" for i in self.tokenize(text)[-1:]), 0)

    def props(self) -> dict[str, Any]:
        """The server's properties: chat template, tokens, build."""
        found: dict[str, Any] = self.client.get("/props")
        return found


# Every sampler that could move a probability is off.
_GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "samplers": ["temperature"],
    "seed": 0,
    "cache_prompt": True,
    "repeat_penalty": 1.0,
    "stream": False,
}


@contextlib.contextmanager
def serving(
    path: str | Path,
    *,
    exact: bool = True,
    context: int = 0,
    port: int = 0,
    key: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    template: str = "",
    name: str = "",
    adapter: str | Path | None = None,
) -> Iterator[LlamaCpp]:
    """Serve one file until the block ends.

    Args:
        exact: keys and values in float32 and plain attention; else llama.cpp's own defaults.
        context: tokens; 0 takes what the model was made for.
        port: 0 takes any that is free.
        key: required in requests; None creates one, so that other programs on this machine cannot
            use the server.
        template_kwargs: template arguments that requests do not name.
        template: instead of the file's own.
        name: that `/v1/models` lists.
        adapter: a GGUF file of a LoRA adapter that is added.

    Raises:
        UsageError: the extra is not installed.
        LlamaError: it cannot be loaded.
    """
    require_llama_cpp("llama.cpp")
    secret = secrets.token_hex(16) if key is None else key
    settings = {
        "path": str(Path(path).resolve()),
        "exact": exact,
        "context": context,
        "port": port,
        "key": secret,
        "threads": _threads(),
        "gpu_layers": 0,
        "template_kwargs": dict(template_kwargs or {}),
        "template": template,
        "name": name,
        "adapter": str(Path(adapter).resolve()) if adapter else "",
        "verbose": False,
    }
    pipe = subprocess.PIPE
    process = child.start(_WORKER, stdin=pipe, stdout=pipe, stderr=pipe)
    said: collections.deque[str] = collections.deque(maxlen=_LINES)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    errors = process.stderr

    silent = threading.Event()

    def listen() -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in errors:
                said.append(line.decode("utf-8", "replace").rstrip())
        silent.set()

    threads.begin(listen)
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(settings).encode("utf-8") + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        try:
            shown = json.loads(line)
        except ValueError:
            process.wait(10)
            silent.wait(2)
            raise _died(Path(path), process.returncode, said) from None
        if "error" in shown:
            silent.wait(0.5)
            raise _refused(Path(path), shown["error"], said)
        server = LlamaCpp(Client(shown["address"], secret))
        try:
            yield server
        except ServerError as error:
            if process.poll() is not None or error.code == "server-unreachable":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                if process.returncode is not None:
                    silent.wait(2)
                    raise _died(Path(path), process.returncode, said) from error
            raise
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.close()


def _threads() -> int:
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() and int(named) else max((os.cpu_count() or 2) // 2, 1)


def _refused(path: Path, error: str, said: Sequence[str]) -> LlamaError:
    return LlamaError(
        f"llama.cpp cannot load {path.name}: {visible(_cause(said) or error, keep_newlines=False)}",
        where=str(path),
        why="this version of llama.cpp does not support the file, or memory is short",
        fix="export it again, or install a newer xllamacpp",
    )


def _died(path: Path, status: int | None, said: Sequence[str]) -> LlamaError:
    ended = f"exit code {status}"
    if status and status < 0:
        with contextlib.suppress(ValueError):
            ended = f"signal {signal.Signals(-status).name}"
    cause = visible(_cause(said), keep_newlines=False)
    return LlamaError(
        f"llama.cpp exited while it was serving {path.name}" + (f": {cause}" if cause else ""),
        where=str(path),
        why=f"{ended}, which is how the system ends a process if memory runs out"
        if ended.endswith("SIGKILL")
        else ended,
        fix="free some memory and try again"
        if ended.endswith("SIGKILL")
        else "export it again, or install a newer xllamacpp",
    )


def _cause(said: Sequence[str]) -> str:
    """The line of llama.cpp's output that says why."""
    telling = [line for line in said if any(w in line.lower() for w in _TELLING)]
    # Behind the time, the level and who says it.
    return re.sub(r"^[\d.]+ [EWI] (\w+: )*", "", telling[0].strip())[:300] if telling else ""


_TELLING = ("error loading", "failed to", "ggml_assert", "unknown", "missing", "terminate called")
