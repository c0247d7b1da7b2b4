"""What a server does to replies is named, and known answers that are lost are an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import write_rows
from truetune.cli.diagnose_screen import _compared
from truetune.data.load import load
from truetune.diagnosis.diagnose import Diagnosis
from truetune.diagnosis.live import live
from truetune.diagnosis.measured import Stage
from truetune.diagnosis.work import Work
from truetune.generate import Sampling, open_speaker, replies
from truetune.lab import base_path

PLACES = ("Stowick", "Kanwick", "Ashford", "Easton", "Norwick", "Westmere", "Oakham", "Redhill")
ASKED = [f"{what} {place}?" for place in PLACES for what in ("Who rules", "Which river crosses")]
Change = Callable[[dict[str, Any], str, int], None]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The shipped base, asked rows whose answers are its own greedy replies."""
    speaker = open_speaker(str(base_path()), None, None, "cpu")
    chats = [[{"role": "user", "content": text}] for text in ASKED]
    made = replies(speaker.model, speaker.contract, chats, Sampling(max_new_tokens=64))
    rows: list[dict[str, Any]] = [
        {"messages": [*chat, {"role": "assistant", "content": reply.text.strip()}]}
        for chat, reply in zip(chats, made, strict=True)
        if reply.stopped and reply.text.strip()
    ]
    path = write_rows(tmp_path_factory.mktemp("said") / "rows.jsonl", rows)
    known = list(load(str(path)).conversations)
    return Work(str(base_path()), None, known, lambda _: None)


class Server:
    """A server that gives the model's own replies, changed."""

    def __init__(self, work: Work) -> None:
        own = {
            case.messages[-1]["content"]: text
            for case, text in zip(work.cases, work.replies.texts, strict=True)
        }
        self.change: Change = lambda choice, own, times: None
        self.times: dict[str, int] = {}
        its = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _send(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "own"}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.path.endswith("/chat/completions"):
                    self._send(404, {"error": {"message": "nothing here"}})
                    return
                text = own.get(asked["messages"][-1]["content"], "")
                times = its.times[text] = its.times.get(text, 0) + 1
                message = {"role": "assistant", "content": text}
                choice = {"message": message, "finish_reason": "stop"}
                its.change(choice, text, times)
                self._send(200, {"choices": [choice], "usage": {"completion_tokens": 4}})

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture(scope="module")
def server(work: Work) -> Iterator[Server]:
    made = Server(work)
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def asked(work: Work, server: Server, change: Change) -> Stage:
    server.change, server.times = change, {}
    return live(server.url, work.contract, work.reference, work.cases, work.replies)


def text(change: Callable[[str], str | None]) -> Change:
    def changed(choice: dict[str, Any], own: str, _: int) -> None:
        choice["message"]["content"] = change(own)

    return changed


def _reasoned(choice: dict[str, Any], own: str, _: int) -> None:
    choice["message"] |= {"content": None, "reasoning_content": own}


def _capped(choice: dict[str, Any], own: str, _: int) -> None:
    choice["message"]["content"] = own[: max(len(own) // 2, 1)]
    choice["finish_reason"] = "length"


def _runs_on(choice: dict[str, Any], own: str, _: int) -> None:
    choice["message"]["content"] = own + "\nUser: What else? The"
    choice["finish_reason"] = "length"


def _sampled(choice: dict[str, Any], own: str, times: int) -> None:
    choice["message"]["content"] = f"{own} {times}"


def test_the_rows_are_known(work: Work, server: Server) -> None:
    """The rows have answers that the model gives, so that losing them can be seen."""
    stage = asked(work, server, text(lambda own: own))
    assert stage.numbers["match"] == {"share": 1.0, "low": pytest.approx(0.757, abs=1e-3),
                                      "high": 1.0, "of": 12}  # fmt: skip
    assert (stage.findings, stage.numbers["same_replies"]) == ((), 1.0)


@pytest.mark.parametrize(
    ("change", "what", "why"),
    [
        (text(lambda own: own + "<|endoftext|>"), "end with the text <|endoftext|>",
         "skip_special_tokens"),
        (text(lambda own: own + "<|endoftext|>\n"), "end with the text <|endoftext|>",
         "skip_special_tokens"),
        (text(lambda own: own + "<|im_end|>"), "end with the text <|im_end|>",
         "the stop token of another model's template"),
        (text(lambda own: own + " x."), "end with the text x.", "adds this text"),
        (text(lambda own: None), "12 of 12 replies are empty", "a reasoning or tool parser"),
        (text(lambda own: " "), "12 of 12 replies are empty", "a reasoning or tool parser"),
        (_reasoned, "12 of 12 replies are empty", "in reasoning_content"),
        (text(str.swapcase), "replies differ", "upper and lower case: nothing else"),
        (_capped, "replies are cut off", "a limit of 4 tokens for new tokens"),
        (_runs_on, "no longer end", "stop tokens or prompts"),
        (text(lambda own: "Sorry."), "replies differ", "uses other weights"),
        (_sampled, "replies differ", "the server samples"),
    ],
)  # fmt: skip
def test_wrong_replies_are_an_error_with_their_cause(
    work: Work, server: Server, change: Change, what: str, why: str
) -> None:
    stage = asked(work, server, change)
    (found,) = stage.findings
    assert (found.code, found.level, stage.parts) == ("stage-parts", "error", True)
    assert what in found.what
    assert why in found.why
    fallen = "the share of known answers that are right falls from 100 % (76 to 100) to 0 %"
    assert f"{fallen} (0 to 24)" in found.what


def test_what_parsers_take_apart_is_put_together(work: Work, server: Server) -> None:
    """Reasoning and text that together are the reply, and calls that it holds, are no difference;
    neither is outer whitespace."""

    def split(choice: dict[str, Any], own: str, _: int) -> None:
        head, _, tail = own.strip().partition(" ")
        choice["message"] |= {"content": tail or head, "reasoning_content": head if tail else ""}

    def call(choice: dict[str, Any], own: str, _: int) -> None:
        function = {"name": (own.split() or ["none"])[0], "arguments": "{}"}
        choice["message"] |= {"content": None, "tool_calls": [{"function": function}]}

    for change in (split, call, text(lambda own: f" {own}\n")):
        stage = asked(work, server, change)
        assert (stage.findings, stage.numbers["match"]["share"]) == ((), 1.0)


def test_replies_that_differ_without_a_loss_are_a_warning(work: Work, server: Server) -> None:
    """Whitespace inside, which exact matches do not count; the last line does not say that nothing
    differs."""
    stage = asked(work, server, text(lambda own: own.replace(" ", "  ")))
    (found,) = stage.findings
    assert (found.code, found.level) == ("replies-differ", "warning")
    assert "whitespace" in found.why
    (line,) = _compared(Diagnosis("run", (stage,), 12))
    assert "replies differ from the trained model's" in line
    assert "do not differ" not in line


def test_causes_are_errors_without_known_answers_too(tmp_path: Path, server: Server) -> None:
    """The model gives none of the answers of these rows, so none can be lost."""
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "No."}]}
        for t in ASKED
    ]
    known = list(load(str(write_rows(tmp_path / "rows.jsonl", rows))).conversations)
    bare = Work(str(base_path()), None, known, lambda _: None)
    for change in (text(lambda own: own + "<|endoftext|>"), text(lambda own: None)):
        stage = asked(bare, server, change)
        assert stage.parts
        assert "known answers" not in stage.findings[0].what
