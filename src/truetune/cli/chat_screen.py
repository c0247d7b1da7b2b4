"""Chat with one model, or with two side by side.

A run is opened through its artifact (or its last checkpoint), whose template, stop set and
tokenizer are what was trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from truetune.cli.screen import Screen
from truetune.errors import TruetuneError, UsageError
from truetune.findings import visible
from truetune.generate import Sampling, Speaker, open_speaker, replies, stream
from truetune.recipe.sources import read_recipe
from truetune.run_dir import RECIPE, RunDir

_COMMAND = re.compile(r"/[a-z]+")


@dataclass
class Talk:
    """A conversation with one speaker or two; each has its own history."""

    screen: Screen
    speakers: list[Speaker]
    sampling: Sampling
    system: str | None
    histories: list[list[dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        screen: Screen,
        model: str,
        *,
        compare: str | None,
        chat_template: str | None,
        revision: str | None,
        device: str,
        system: str | None,
        sampling: Sampling,
    ) -> Talk:
        """Load the models.

        Raises:
            UsageError, ModelError: it cannot be opened.
        """
        if screen.console.is_terminal:  # in a pipe the answer is all there is
            screen.stage("loading the weights")
        first = open_speaker(model, chat_template, revision, device)
        speakers = [first]
        if compare:
            other = _base_of(model) if compare == "base" else compare
            # A plain model is asked through the first one's contract: the same prompt for both.
            same = None if RunDir(other).looks_like_one() else first.contract
            speakers.insert(0, open_speaker(other, chat_template, revision, device, same))
        screen.close()
        talk = cls(screen, speakers, sampling, system)
        talk.reset()
        return talk

    def reset(self) -> None:
        _require_text(self.system or "")
        start = [{"role": "system", "content": self.system}] if self.system else []
        self.histories = [list(start) for _ in self.speakers]

    def ask(self, question: str) -> None:
        """Send a question to all models, show the answers, and add them to the histories.

        Raises:
            UsageError: the question is no text, or leaves no room for an answer.
        """
        _require_text(question)
        for speaker, history in zip(self.speakers, self.histories, strict=True):
            history.append({"role": "user", "content": question})
            if len(self.speakers) == 1:
                answer = self._streamed(speaker, history)
            else:
                answer = self._whole(speaker, history)
            history.append({"role": "assistant", "content": answer})

    def loop(self) -> None:
        """Read questions until /exit or the end of the input."""
        names = " and ".join(speaker.name for speaker in self.speakers)
        self.screen.line(f"chatting with {names}; /reset clears the history, /exit quits", "dim")
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.screen.line()
                return
            except UnicodeDecodeError:
                self.screen.line("the input was not UTF-8 text; please enter it again", "yellow")
                continue
            if question in ("/exit", "/quit"):
                return
            if question == "/reset":
                self.reset()
            elif _COMMAND.fullmatch(question):
                self.screen.line(
                    f"unknown command {question}; /reset clears the history, /exit quits", "yellow"
                )
            elif question:
                self._ask_safely(question)

    def _ask_safely(self, question: str) -> None:
        """Ask a question; a failed answer does not end the conversation."""
        kept = [len(history) for history in self.histories]
        try:
            self.ask(question)
        except (TruetuneError, KeyboardInterrupt) as error:
            for history, length in zip(self.histories, kept, strict=True):
                del history[length:]
            self.screen.line()
            if isinstance(error, TruetuneError):
                self.screen.error(error)

    def _streamed(self, speaker: Speaker, history: list[dict[str, Any]]) -> str:
        console = self.screen.console
        pieces = stream(speaker.model, speaker.contract, history, self.sampling)
        while True:
            try:
                console.print(Text(visible(next(pieces))), end="")
            except StopIteration as done:
                reply = done.value
                break
        console.print()
        if not reply.stopped:
            self.screen.line(f"(did not end within {len(reply.ids)} tokens)", "yellow")
        return str(reply.text)

    def _whole(self, speaker: Speaker, history: list[dict[str, Any]]) -> str:
        (reply,) = replies(speaker.model, speaker.contract, [history], self.sampling)
        self.screen.line(f"{speaker.name}:", "bold")
        self.screen.line(reply.text)
        if not reply.stopped:
            self.screen.line(f"(did not end within {len(reply.ids)} tokens)", "yellow")
        return reply.text


def _base_of(source: str) -> str:
    """The model a run started from."""
    run = RunDir(source)
    model = read_recipe(run.file(RECIPE)).get("model") if run.looks_like_one() else None
    if not model:
        raise UsageError(
            f"--compare base needs a run, but {source} is not one",
            fix="pass the model to compare with: --compare MODEL",
            code="no-run",
        )
    return str(model)


def _require_text(text: str) -> None:
    """Bytes of a terminal that are no UTF-8 arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "the message is not UTF-8 text", fix="enter the message as UTF-8", code="not-utf8"
        ) from error
