"""A server of this machine: the prompts of training, the replies of `generate`."""

from __future__ import annotations

import http.client
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from terminal import at_terminal
from tiny_models import write_model
from tiny_runs import command
from truetune.diagnosis.diagnose import diagnose
from truetune.errors import UsageError
from truetune.exporting.serve import Served, serving_chat, serving_gguf
from truetune.generate import Sampling, open_speaker, replies
from truetune.lab import base_path
from truetune.run.export_gguf import export_gguf
from truetune.servers.client import Client, ServerError
from truetune.system.local_http import require_port

needs_llama = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")),
    reason="the gguf extra is missing",
)
ASKED = [{"role": "user", "content": "Who is the ruler of Stowick?"}]


@pytest.fixture(scope="module")
def served() -> Served:
    speaker = open_speaker(str(base_path()), "chatml-lite", None, "cpu")
    return Served("base", speaker.model, speaker.contract)


@pytest.fixture
def address(served: Served) -> Iterator[str]:
    with serving_chat(served, 0) as server:
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        yield server.address
        server.stop()
        thread.join()


def expected(served: Served) -> Any:
    return replies(served.model, served.contract, [ASKED], Sampling(max_new_tokens=24))[0]


def test_it_answers_as_chat_does(served: Served, address: str) -> None:
    client = Client(address)
    assert client.get("/v1/models")["data"][0]["id"] == "base"
    answer = client.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 24})
    own = expected(served)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == own.text
    assert choice["finish_reason"] == ("stop" if own.stopped else "length")
    assert answer["usage"]["completion_tokens"] == len(own.ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": ASKED[0]["content"]}]}]
    again = client.post("/v1/chat/completions", {"messages": parts, "max_tokens": 24})
    assert again["choices"][0]["message"]["content"] == own.text


def test_it_streams_the_same_text(served: Served, address: str) -> None:
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    body = json.dumps({"messages": ASKED, "max_tokens": 24, "stream": True})
    connection.request("POST", "/v1/chat/completions", body)
    text = connection.getresponse().read().decode()
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
    said = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    assert said == expected(served).text
    assert chunks[-1]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": ["x"]}, 400),
        ("/v1/chat/completions", {"messages": ASKED, "n": 2}, 400),
        ("/v1/chat/completions", {"messages": ASKED, "temperature": "x"}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "x", "content": "y"}]}, 400),
        ("/v1/completions", {"messages": ASKED}, 404),
    ],
)
def test_what_it_refuses(address: str, path: str, body: Any, status: int) -> None:
    with pytest.raises(ServerError) as caught:
        Client(address).post(path, body)
    assert caught.value.status == status


def test_only_this_machine_reaches_it(address: str) -> None:
    host = address.removeprefix("http://")
    assert host.startswith("127.0.0.1:")
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", "/v1/models", headers=headers)
        assert connection.getresponse().status == 403
    with pytest.raises(UsageError, match="cannot be used"):
        require_port(int(host.rpartition(":")[2]))


def test_the_verb_says_what_is_wrong_before_it_loads(address: str, tmp_path: Path) -> None:
    port = address.rpartition(":")[2]
    for words, code in (
        ((tmp_path / "no.gguf",), "no-such-file"),
        ((tmp_path / "no", "--fast"), "usage"),
        ((tmp_path / "no",), "model-not-found"),
        ((base_path(), "--port", port), "port-taken"),
    ):
        told = command("serve", "--port", "0", *words)
        assert told.code == 2
        assert f"[{code}]" in told.err


def test_a_live_server_is_held_to_the_contract(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_model(tmp_path / "other")
    path = tmp_path / "other" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>", "<|assistant|> "))
    for name, parts in (("model", None), ("other", "url")):
        speaker = open_speaker(str(tmp_path / name), None, None, "cpu")
        with serving_chat(Served(name, speaker.model, speaker.contract), 0) as server:
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            found = diagnose(str(tmp_path / "model"), url=server.address)
            server.stop()
            thread.join()
        assert (found.first.name if found.first else None) == parts


@needs_llama
def test_a_gguf_file_answers_with_the_same_greedy_text(tmp_path: Path) -> None:
    """The embedded base, whose replies in transformers `generate` gives."""
    made = export_gguf(str(base_path()), tmp_path / "out", quant="f32")
    speaker = open_speaker(str(base_path()), None, None, "cpu")
    own = replies(speaker.model, speaker.contract, [ASKED], Sampling(max_new_tokens=24))[0]
    with serving_gguf(made.path, 0, fast=False, name="base") as address:
        asked = {"messages": ASKED, "max_tokens": 24, "temperature": 0}
        answer = Client(address).post("/v1/chat/completions", asked)
        assert answer["choices"][0]["message"]["content"].strip() == own.text.strip()
        found = diagnose(str(base_path()), url=address, gguf=str(made.path))
    assert found.first is None, [f.what for f in found.findings()]


@needs_llama
@pytest.mark.skipif(sys.platform == "win32", reason="no such terminal")
def test_ctrl_c_at_a_terminal_ends_it_at_once(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f16")
    for source in (made.path, tmp_path / "model"):
        words = [sys.executable, "-m", "truetune", "serve", str(source), "--port", "0"]
        with at_terminal(words) as terminal:
            address = terminal.until(r"(http://127\.0\.0\.1:\d+)/v1")[1]
            assert Client(address).get("/v1/models")["data"]
            terminal.press("\x03")
            assert terminal.wait(10) == 0, terminal.text
        assert "Traceback" not in terminal.text
        assert "rror" not in terminal.text
        # llama.cpp's process has ended too.
        with pytest.raises(ServerError):
            Client(address, seconds=2).get("/v1/models")
