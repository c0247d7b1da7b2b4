"""`truetune eval` of what stands behind a server: messages in, what its parsers return out."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import truetune
from tiny_runs import command, write_rows
from truetune.exporting.serve import Served, serving_chat
from truetune.generate import open_speaker
from truetune.lab import base_path
from truetune.servers.chat import calls_as_text, request
from truetune.servers.client import ServerError

TOOL = {"type": "function", "function": {"name": "roll", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "roll", "arguments": {"sides": 6, "times": 2}}}


class Fake(ThreadingHTTPServer):
    """Answers by the last user message."""

    answers: dict[str, Any]
    asked: list[dict[str, Any]]

    def handle_error(self, *_: Any) -> None: ...


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: Any) -> None: ...

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "fake-model"}]})

    def do_POST(self) -> None:
        value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "no such path"}})
            return
        content = value["messages"][-1]["content"]
        if content not in self.server.answers:  # a greeting, to find the name that answers
            self._send(200, {"choices": []})
            return
        self.server.asked.append(value)
        answer = self.server.answers[content]
        if isinstance(answer, int):
            self._send(answer, {"error": {"message": "too long"}})
            return
        message, reason = answer
        choice = {"message": {"role": "assistant", **message}, "finish_reason": reason}
        self._send(200, {"choices": [choice], "usage": {"completion_tokens": 7}})


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answers = [], {}
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(server: Fake) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def rows(path: Path, *pairs: tuple[str, Any]) -> str:
    return write_rows(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": question},
                    answer
                    if isinstance(answer, dict)
                    else {"role": "assistant", "content": answer},
                ],
                "tools": [TOOL],
            }
            for question, answer in pairs
        ],
    )


def test_what_the_servers_parsers_return_is_compared(fake: Fake, tmp_path: Path) -> None:
    wire = {"name": "roll", "arguments": '{"times": 2.0, "sides": 6}'}
    fake.answers = {
        "plain": ({"content": " yes "}, "stop"),
        "long": ({"content": "yes"}, "length"),
        "thinks": ({"content": "yes", "reasoning_content": "Hm."}, "stop"),
        "thinks aloud": ({"content": "<think>Hm.</think>yes"}, "stop"),
        "calls": ({"content": None, "tool_calls": [{"function": wire}]}, "tool_calls"),
        "calls another": (
            {"content": None, "tool_calls": [{"function": {**wire, "arguments": "{}"}}]},
            "tool_calls",
        ),
        "nothing": ({"content": None}, "stop"),
    }
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    data = rows(
        tmp_path / "rows.jsonl",
        *((name, calls if name.startswith("calls") else "yes") for name in fake.answers),
    )
    found = truetune.evaluate(address(fake), data, max_new_tokens=9)
    (model,) = found.models
    replies = {row.where.rpartition(":")[2]: row.replies[0] for row in model.rows}
    right = [reply.right for reply in replies.values()]
    assert right == [True, False, True, True, True, False, False]
    assert [reply.ended for reply in replies.values()] == [True, False, *[True] * 5]
    assert [reply.thought for reply in replies.values()] == [False, False, True, True, *[False] * 3]
    assert replies["7"].empty
    assert model.values["length_median"].value == 7
    assert "loss" not in model.values
    assert model.no_loss[0].count == len(fake.answers)
    first = fake.asked[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("fake-model", 9, 0)
    assert first["tools"] == [TOOL]
    assert first["messages"] == [{"role": "user", "content": "plain"}]


def test_calls_go_over_the_wire_as_text_and_are_compared_as_values() -> None:
    sent = request([{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}], [TOOL])
    calls = sent["messages"][0]["tool_calls"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"sides": 6, "times": 2}
    assert calls[0]["id"] != calls[1]["id"]
    assert calls_as_text(calls[:1]) == calls_as_text([CALL]) != calls_as_text([CALL, CALL])


def test_a_server_that_refuses_a_row_is_reported_with_the_row(fake: Fake, tmp_path: Path) -> None:
    fake.answers = {"one": ({"content": "yes"}, "stop"), "two": 400}
    data = rows(tmp_path / "rows.jsonl", ("one", "yes"), ("two", "yes"))
    with pytest.raises(ServerError, match="too long") as caught:
        truetune.evaluate(address(fake), data)
    assert "rows.jsonl:2" in caught.value.where


def test_what_is_refused_before_anything_is_asked(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "rows.jsonl", ("one", "yes"))
    own = address(fake)
    with Fake(("127.0.0.1", 0), Handler) as closed:
        gone = address(closed)
    for words, code in (
        ([gone], "server-unreachable"),
        (["ftp://127.0.0.1/model"], "subject-unsupported"),
        (["none.gguf"], "no-such-file"),
        ([own, "--chat-template", "chatml-lite"], "subject-unsupported"),
    ):
        refused = command("eval", *words, "--data", data)
        assert refused.code == 2, refused.out
        assert f"error[{code}]" in refused.err
    assert not fake.asked


def test_a_model_answers_behind_its_server_as_it_does_without(tmp_path: Path) -> None:
    speaker = open_speaker(str(base_path()), "chatml-lite", None, "cpu")
    asked = {"prompt": "Who is the ruler of Stowick?", "completion": "Jailette"}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(asked))
    with_tools = rows(tmp_path / "tools.jsonl", ("Who is the ruler of Stowick?", "Jailette"))
    with serving_chat(Served("base", speaker.model, speaker.contract), 0) as server:
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        behind = truetune.evaluate(server.address, data, max_new_tokens=16).models[0]
        # The template has no tools: the server does not lose them silently.
        with pytest.raises(ServerError, match="does not render tools") as caught:
            truetune.evaluate(server.address, with_tools, max_new_tokens=16)
        assert "tools.jsonl:1" in caught.value.where
        server.stop()
        thread.join()
    alone = truetune.evaluate(
        str(base_path()), data, max_new_tokens=16, chat_template="chatml-lite"
    ).models[0]
    assert behind.rows[0].replies[0] == alone.rows[0].replies[0]
    assert behind.rows[0].prompt == alone.rows[0].prompt


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")),
    reason="the gguf extra is missing",
)
def test_a_gguf_file_is_asked_through_llama_cpp(tmp_path: Path) -> None:
    from tiny_models import write_model
    from truetune.run.export_gguf import export_gguf

    write_model(tmp_path / "model", "llama")
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f32")
    data = rows(tmp_path / "rows.jsonl", ("Who?", "yes"), ("Where?", "no"))
    both = truetune.evaluate(
        [str(tmp_path / "model"), str(made.path)], data, max_new_tokens=8, match="none"
    )
    one, two = (
        [(row.prompt, row.replies[0].text, row.replies[0].ended) for row in model.rows]
        for model in both.models
    )
    assert one == two
