"""A model behind a server, as its clients see it: messages in, text out.

input   the address of a server that speaks OpenAI's chat protocol, or a GGUF file
does    asks the server each question as messages, so that its own template, stop tokens and parsers
        are what is evaluated; a GGUF file is served by llama.cpp in a child process
output  what `Subject` gives: prompts, and what was written to them
"""

from __future__ import annotations

import contextlib
import json
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.behaviour.replies import Thinking
from truetune.errors import InputError, UsageError
from truetune.evaluation.questions import Question
from truetune.evaluation.subject import Asking, Prompt, Said, Written
from truetune.servers.chat import (
    calls_as_text,
    complete,
    first_model,
    request,
    require_reachable,
)
from truetune.servers.client import Client, ServerError
from truetune.servers.llama_cpp import require_llama_cpp, serving

# Of a reply whose reasoning the server left in the content.
_THINKING = Thinking(False, (("<think>", "</think>"),))
# Seconds in which a server says that it is there.
_FIRST = 10.0
_NO_LOSS = "a server does not return the loss of an answer"


def is_served(name: str) -> bool:
    """Whether a name is an address or a GGUF file, and no model folder."""
    return "://" in name or name.lower().endswith(".gguf")


def require_served(name: str, chat_template: str | None) -> None:
    """Refuse an invalid name before any question is sent.

    Raises:
        UsageError, InputError: no address of HTTP, nobody answers there, no file, llama.cpp is
            missing, or a template is given that a server does not take.
    """
    if chat_template is not None:
        raise UsageError(
            f"--chat-template has no effect on {name}",
            why="servers and GGUF files use their own templates",
            fix="omit --chat-template, or pass the model's folder",
            code="subject-unsupported",
        )
    if name.lower().endswith(".gguf") and "://" not in name:
        if not Path(name).is_file():
            raise InputError(
                f"{name} does not exist",
                fix="truetune export RUN --to gguf -o DIR writes one",
                code="no-such-file",
            )
        require_llama_cpp(f"evaluating {name}")
        return
    if urllib.parse.urlsplit(name).scheme not in ("http", "https"):
        raise UsageError(
            f"{name} is neither the address of a server nor a model",
            why="what can be evaluated is a run, a folder, a Hub id, a GGUF file, or the HTTP "
            "address of a server",
            fix="pass an address such as http://127.0.0.1:8000",
            code="subject-unsupported",
        )
    try:
        require_reachable(Client(name, seconds=_FIRST))
    except ServerError as error:
        raise UsageError(
            f"no server answers at {name}",
            why=error.what,
            fix="start it, or correct the address",
            code="server-unreachable",
        ) from error


@dataclass(frozen=True)
class Served:
    """A model that receives its questions as messages.

    Attributes:
        name: as the user wrote it.
    """

    name: str
    context: int | None = None

    def prompts(self, questions: Sequence[Question]) -> list[Prompt | str]:
        """Each question as messages."""
        made: list[Prompt | str] = []
        for question in questions:
            answer = question.answer or {}
            calls = calls_as_text(answer.get("tool_calls") or [])
            said = _THINKING.split(question.expected)[2].strip()
            expected = "\n".join(filter(None, (said, calls))) if calls else said
            why = _NO_LOSS if question.answer is not None else "the row has no answer"
            made.append(Prompt((), None, why, expected, _THINKING, question))
        return made

    def write(self, prompts: Sequence[Prompt], asking: Asking) -> Written:
        """Its replies.

        Raises:
            ServerError: it does not answer; it names the row.
        """
        asking.stage(f"generating replies with {self.name}")
        total = len(prompts) * asking.samples
        said: list[Said] = []
        shown: list[str] = []
        with self._client() as client:
            model = first_model(client)
            for prompt in prompts:
                assert prompt.question
                shown.append(_shown(client, prompt.question))
                for _ in range(asking.samples):
                    said.append(_reply(client, model, prompt.question, asking, len(said)))
                    if asking.progress:
                        asking.progress(len(said), total)
        return Written(tuple(said), (None,) * len(prompts), tuple(shown), ())

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        if "://" in self.name:
            yield Client(self.name)
            return
        # As `llama-server` would serve it by default.
        with serving(self.name, exact=False) as server:
            yield server.client


def _asked_of(question: Question) -> dict[str, Any]:
    asked = question.asked
    return request(asked.messages, asked.tools, asked.template_kwargs)


def _shown(client: Client, question: Question) -> str:
    """The prompt as the server makes it if it says so, else the messages."""
    asked = _asked_of(question)
    try:
        return str(client.post("/apply-template", asked)["prompt"])
    except (ServerError, KeyError, TypeError):
        return json.dumps(asked["messages"], ensure_ascii=False)


def _reply(client: Client, model: str, question: Question, asking: Asking, number: int) -> Said:
    drawn = asking.sampling
    asked: dict[str, Any] = {
        **_asked_of(question),
        **({"model": model} if model else {}),
        "temperature": drawn.temperature,
        "max_tokens": drawn.max_new_tokens,
        "seed": drawn.seed + number,
    }
    if drawn.top_p < 1:
        asked["top_p"] = drawn.top_p
    if drawn.top_k:
        asked["top_k"] = drawn.top_k
    try:
        answer = complete(client, asked)
    except ServerError as error:
        error.where = f"{question.where}, asked of {error.where}"
        raise
    calls = calls_as_text(answer.calls)
    whole = "\n".join(filter(None, (answer.text.strip(), calls))) if calls else answer.text
    split = (True, bool(whole), whole) if answer.reasoning else _THINKING.split(whole)
    return Said(whole, answer.tokens, answer.ended, split)
