"""A server of this machine: the prompts of training, the replies of `generate`."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from terminal import at_terminal
from tiny_models import write_model
from tiny_runs import command
from truetune.contract.contract import PromptContract
from truetune.contract.render import Renderer
from truetune.diagnosis.diagnose import diagnose
from truetune.errors import UnfaithfulTemplate, UsageError
from truetune.exporting.serve import Served, _Template, serving_chat, serving_gguf
from truetune.generate import Sampling, open_speaker, replies
from truetune.lab import base_path
from truetune.model.tokenizer import load_tokenizer
from truetune.run.export_gguf import export_gguf
from truetune.servers.client import Client, ServerError
from truetune.system.local_http import LocalServer, require_port

needs_llama = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")),
    reason="the gguf extra is missing",
)
ASKED = [{"role": "user", "content": "Who is the ruler of Stowick?"}]


@pytest.fixture(scope="module")
def served() -> Served:
    speaker = open_speaker(str(base_path()), "chatml-lite", None, "cpu")
    return Served("base", speaker.model, speaker.contract)


@contextlib.contextmanager
def running(server: LocalServer) -> Iterator[str]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server.address
    finally:
        server.stop()
        thread.join()


@pytest.fixture
def address(served: Served) -> Iterator[str]:
    with serving_chat(served, 0) as server, running(server) as address:
        yield address


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp with the embedded base in float32."""
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")):
        pytest.skip("the gguf extra is missing")
    made = export_gguf(str(base_path()), tmp_path_factory.mktemp("gguf") / "out", quant="f32")
    with (
        serving_gguf(made.path, 0, fast=False, name="base", aliases=("base.gguf",)) as server,
        running(server) as address,
    ):
        yield address


@pytest.fixture(params=["transformers", "llama.cpp"])
def either(request: pytest.FixtureRequest) -> str:
    """The address of a server with either back end."""
    name = "address" if request.param == "transformers" else "gguf"
    return str(request.getfixturevalue(name))


def openai_client(address: str) -> Any:
    openai = pytest.importorskip("openai", reason="the openai package is missing")
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def error_of(address: str, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    """Status and error of a request that is refused."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(address + path, raw), timeout=60)
    with caught.value as answer:
        return answer.code, json.loads(answer.read())["error"]


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


def test_it_samples_freshly_without_a_seed_and_again_with_one(either: str) -> None:
    chat = openai_client(either).chat.completions

    def ask(**more: Any) -> str:
        made = chat.create(model="base", messages=ASKED, max_tokens=24, temperature=2.0, **more)
        return str(made.choices[0].message.content)

    assert len({ask() for _ in range(4)}) > 1
    # -1 asks for a fresh one, as of llama.cpp and vLLM.
    assert len({ask(seed=-1) for _ in range(4)}) > 1
    assert ask(seed=7) == ask(seed=7)
    assert len({ask(seed=seed) for seed in range(7, 11)}) > 1
    # OpenAI's have 64 bits.
    assert ask(seed=2**40 + 1) == ask(seed=2**40 + 1)
    # Where nothing is asked for, nothing is drawn.
    greedy = {chat.create(model="base", messages=ASKED, max_tokens=8).choices[0].message.content
              for _ in range(3)}  # fmt: skip
    assert len(greedy) == 1


def test_stop_texts_end_a_reply_and_never_show(either: str) -> None:
    chat = openai_client(either).chat.completions

    def ask(**more: Any) -> tuple[str, str, int]:
        asked = {"model": "base", "messages": ASKED, "max_tokens": 24, **more}
        choice = (made := chat.create(**asked)).choices[0]
        pieces = list(chat.create(**asked, stream=True))
        said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert said == choice.message.content
        assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == choice.finish_reason
        return said, choice.finish_reason, made.usage.completion_tokens

    whole, reason, most = ask()
    assert reason == "length"
    # The middle of a word, over several tokens, at most four of which the first to come counts.
    stop = whole[len(whole) // 2 : len(whole) // 2 + 7]
    cut = whole[: whole.index(stop)]
    for texts in (stop, [stop], ["never written", stop, whole[-3:], "~"]):
        said, reason, tokens = ask(stop=texts)
        assert (said, reason) == (cut, "stop")
        assert tokens < most
    # One that only begins, and none at all.
    for texts in (whole[-4:] + "\u2603", [], "", None):
        assert ask(stop=texts) == (whole, "length", most)
    assert ask(stop=whole[:1])[:2] == ("", "stop")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("more", "status", "param", "words"),
    [
        ({"messages": []}, 400, "messages", "at least one message"),
        ({"messages": ["x"]}, 400, "messages", 'messages[0] is "x", but must be an object'),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "has no content"),
        (
            {"messages": [{"role": "user", "content": None}]},
            400,
            "messages[0].content",
            "messages[0] (user) has no content",
        ),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": None}, *ASKED]},
            400,
            "messages[1].content",
            "has no content",
        ),
        ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "needs a role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "is 3, but"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content",
            "not text",
        ),
        ({"model": "gpt-4"}, 404, "model", 'the model "gpt-4" does not exist here'),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0, but must be at least 1"),
        ({"max_completion_tokens": -1}, 400, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "a whole number"),
        ({"temperature": "hot"}, 400, "temperature", 'is "hot", but must be a number'),
        ({"temperature": True}, 400, "temperature", "is true, but must be a number"),
        ({"temperature": -1}, 400, None, "temperature is -1.0, but must not be negative"),
        ({"top_p": 2}, 400, None, "top_p is 2.0"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "5 strings, at most 4"),
        ({"stop": 3}, 400, "stop", "a string or a list of strings"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"n": 2}, 400, "n", "n is not supported"),
        ({"tools": [TOOL]}, 400, "tools", "does not render tools"),
        ({"tools": "f"}, 400, "tools", "a list of objects"),
        ({"functions": [TOOL]}, 400, "functions", "functions is not supported"),
        ({"modalities": ["audio"]}, 400, "modalities", "not supported"),
        ({"temprature": 1}, 400, "temprature", "did you mean temperature?"),
    ],
)
def test_it_refuses_what_it_would_lose(
    either: str, more: Any, status: int, param: str | None, words: str
) -> None:
    told, error = error_of(either, {"messages": ASKED, "model": "base", **more})
    assert told == status
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


WITH_TOOLS = """{%- for tool in tools or [] %}[{{ tool.function.name }}]{% endfor -%}
{%- for m in messages %}{% if m.role != 'developer' %}<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}
{%- if m.role == 'assistant' %}<|end|>{% endif %}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_tools_reach_a_template_that_has_them(served: Served) -> None:
    tokenizer = served.contract.tokenizer
    contract = PromptContract.load(tokenizer, WITH_TOOLS)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    with (
        serving_chat(Served("base", served.model, contract), 0) as server,
        running(server) as address,
    ):
        asked = {"model": "base", "messages": turns, "tools": [TOOL], "max_tokens": 1}
        made = openai_client(address).chat.completions.create(**asked)
        prompt = contract.prompt_ids(turns, [TOOL])
        assert made.usage.prompt_tokens == len(prompt)
        # What this template does not render.
        other = [{"role": "developer", "content": "Be brief."}, *ASKED]
        status, error = error_of(address, {"messages": other})
        assert (status, error["param"]) == (400, "messages[0]")
        assert "role developer" in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"5": 1}},
        {"tools": [TOOL], "tool_choice": "required"},
        {"chat_template_kwargs": {"x": 1}},
    ],
)
def test_it_refuses_what_only_llama_cpp_can(address: str, more: Any) -> None:
    status, error = error_of(address, {"messages": ASKED, **more})
    assert status == 400
    assert error["param"] == list(more)[-1]
    assert error["message"].startswith(f"{list(more)[-1]} is not supported")


def test_it_ignores_what_changes_no_reply(either: str) -> None:
    chat = openai_client(either).chat.completions
    asked: Any = {"model": "base", "messages": ASKED, "max_completion_tokens": 8}
    plain = chat.create(**asked).choices[0].message.content
    harmless: Any = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
        "stop": None,
    }
    assert chat.create(**asked, **harmless).choices[0].message.content == plain
    last = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_the_model_has_a_name_and_others(either: str) -> None:
    client = openai_client(either)
    (listed,) = client.models.list().data
    assert listed.id == "base"
    assert listed.created > 1_700_000_000
    assert client.models.retrieve("base").id == "base"
    for name in ("base", "", None):
        Client(either).post("/v1/chat/completions",
                            {"model": name, "messages": ASKED, "max_tokens": 1})  # fmt: skip
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    assert caught.value.code == "model_not_found"
    assert "this server serves" in str(caught.value)


def test_paths_that_it_does_not_have(address: str, gguf: str) -> None:
    for path in ("/v1/completions", "/v1/embeddings", "/v1/responses", "/else"):
        status, error = error_of(address, {"prompt": "x", "input": "x"}, path)
        assert status == 404
        assert error["code"] == "unknown_url"
        assert f"POST {path}" in error["message"]
    # llama.cpp's own paths are its own.
    assert error_of(gguf, {}, "/else")[0] == 404
    assert Client(gguf).get("/props")["default_generation_settings"]
    for server in (address, gguf):
        connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=10)
        connection.request("DELETE", "/v1/models/base")
        answer = connection.getresponse()
        assert answer.status == 405
        assert json.loads(answer.read())["error"]["message"]


def test_a_refused_conversation_is_one_sentence(address: str) -> None:
    status, error = error_of(address, {"messages": [{"role": "wizard", "content": "y"}]})
    assert status == 400
    assert error["message"].startswith("the chat template refuses this conversation: ")
    assert error["message"].endswith(")")
    for raw, words in ((b"{", "not valid JSON"), (b"", "no body"), (b"[]", "not a JSON object")):
        status, error = error_of(address, raw)
        assert status == 400
        assert words in error["message"]


@needs_llama
def test_a_gguf_file_refuses_what_its_template_refuses(tmp_path: Path) -> None:
    """llama.cpp would write the system message into the user's; both back ends say the same."""
    folder = str(tmp_path / "model")
    write_model(tmp_path / "model")
    chatml = PromptContract.load(load_tokenizer(folder), "chatml-lite").chat_template
    (tmp_path / "model" / "chat_template.jinja").write_text(chatml)
    contract = PromptContract.load(load_tokenizer(folder))
    messages = [{"role": "system", "content": "You are a helpful assistant."}, *ASKED]
    with pytest.raises(UnfaithfulTemplate, match="knows the roles user and assistant") as own:
        contract.prompt_text(messages)
    made = export_gguf(folder, tmp_path / "out", quant="f16")
    with (
        serving_gguf(made.path, 0, fast=False, name="tiny") as server,
        running(server) as address,
    ):
        for path in ("/v1/chat/completions", "/apply-template"):
            status, error = error_of(address, {"messages": messages}, path)
            assert (status, error["type"]) == (400, "invalid_request_error")
            assert error["message"] == f"{own.value.what} ({own.value.why})"
        prompt = Client(address).post("/apply-template", {"messages": ASKED})["prompt"]
        assert prompt == contract.prompt_text(ASKED)
        asked = {"messages": ASKED, "max_tokens": 2}
        assert Client(address).post("/v1/chat/completions", asked)["choices"]


def test_a_gguf_file_takes_calls_in_either_form() -> None:
    """A template that joins arguments as text, and one that reads them as an object."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        *ASKED,
    ]
    for reads in ("'(' + c.arguments + ')'", "c.arguments.items() | list"):
        source = (
            "{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for t in m.tool_calls or [] "
            "%}{% set c = t.function %}{{ " + reads + " }}{% endfor %}{% endfor %}"
        )
        template = _Template((Renderer(source, {}),))
        template.require_accepted(turns, None, {})
    refusing = _Template((Renderer("{{ raise_exception('no') }}", {}),))
    with pytest.raises(UnfaithfulTemplate, match="no"):
        refusing.require_accepted(turns, None, {})


def test_only_this_machine_reaches_it(either: str) -> None:
    host = either.removeprefix("http://")
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
        ((base_path(), "--device", "mps" if sys.platform != "darwin" else "cuda"), "device"),
    ):
        told = command("serve", "--port", "0", *words)
        assert told.code == 2
        assert f"[{code}]" in told.err
        assert "loading" not in told.err


def test_a_live_server_is_held_to_the_contract(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_model(tmp_path / "other")
    path = tmp_path / "other" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>", "<|assistant|> "))
    for name, parts in (("model", None), ("other", "url")):
        speaker = open_speaker(str(tmp_path / name), None, None, "cpu")
        served = Served(name, speaker.model, speaker.contract)
        with serving_chat(served, 0) as server, running(server) as address:
            found = diagnose(str(tmp_path / "model"), url=address)
        assert (found.first.name if found.first else None) == parts


@needs_llama
def test_a_gguf_file_answers_with_the_same_greedy_text(tmp_path: Path) -> None:
    """The embedded base, whose replies in transformers `generate` gives."""
    made = export_gguf(str(base_path()), tmp_path / "out", quant="f32")
    speaker = open_speaker(str(base_path()), None, None, "cpu")
    own = replies(speaker.model, speaker.contract, [ASKED], Sampling(max_new_tokens=24))[0]
    with (
        serving_gguf(made.path, 0, fast=False, name="base") as server,
        running(server) as address,
    ):
        asked = {"messages": ASKED, "max_tokens": 24, "temperature": 0}
        answer = Client(address).post("/v1/chat/completions", asked)
        assert answer["choices"][0]["message"]["content"].strip() == own.text.strip()
        found = diagnose(str(base_path()), url=address, gguf=str(made.path))
    assert found.first is None, [f.what for f in found.findings()]


@needs_llama
@pytest.mark.skipif(sys.platform == "win32", reason="no such terminal")
def test_llama_cpp_that_ends_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil", reason="psutil is missing")
    write_model(tmp_path / "model")
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f16")
    words = [sys.executable, "-m", "truetune", "serve", str(made.path), "--port", "0"]
    with at_terminal(words) as terminal:
        address = terminal.until(r"(http://127\.0\.0\.1:\d+)/v1")[1]
        (worker,) = psutil.Process(terminal.process.pid).children(recursive=True)
        worker.kill()
        # Its parent has not asked for its end yet.
        while worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        status, error = error_of(address, {"messages": ASKED})
        assert (status, error["type"]) == (502, "server_error")
        assert terminal.wait(20) == 1
    assert "error[llama-cpp-failed]: llama.cpp exited while it was serving" in terminal.text
    assert "SIGKILL" in terminal.text


@needs_llama
@pytest.mark.skipif(sys.platform == "win32", reason="no such terminal")
def test_it_ends_as_it_is_asked_and_says_so(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f16")
    busy: list[http.client.HTTPConnection] = []
    for source, number in (
        (made.path, signal.SIGINT),
        (tmp_path / "model", signal.SIGINT),
        (tmp_path / "model", signal.SIGTERM),
    ):
        words = [sys.executable, "-m", "truetune", "serve", str(source), "--port", "0"]
        with at_terminal(words) as terminal:
            address = terminal.until(r"(http://127\.0\.0\.1:\d+)/v1")[1]
            assert Client(address).get("/v1/models")["data"]
            # Also while it writes, and somebody waits behind that.
            for _ in range(2):
                body = {"messages": ASKED, "max_tokens": 4000, "temperature": 1.5, "stream": True}
                connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
                connection.request("POST", "/v1/chat/completions", json.dumps(body))
                busy.append(connection)
            assert busy[-2].getresponse().read1(10)
            if number == signal.SIGINT:
                terminal.press("\x03")
            else:
                terminal.process.send_signal(number)
            assert terminal.wait(10) == 128 + number, terminal.text
        assert terminal.text.count("interrupted") == 1
        assert "Traceback" not in terminal.text
        assert "rror" not in terminal.text
        # llama.cpp's process has ended too.
        with pytest.raises(ServerError):
            Client(address, seconds=2).get("/v1/models")
