"""A tuned model answers with the same greedy text in training and behind three servers."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from terminal import at_terminal
from truetune.diagnosis.diagnose import diagnose
from truetune.generate import Sampling, open_speaker, replies
from truetune.lab.evaluate import unseen_questions
from truetune.lab.quickstart import quickstart_recipe
from truetune.lab.world import World
from truetune.run.export_gguf import export_gguf
from truetune.run.pipeline import train
from truetune.servers.client import Client

pytestmark = pytest.mark.slow
_NEEDS = {
    "llama.cpp": ("gguf", "gguf", "xllamacpp"),
    "transformers": ("serving", "fastapi", "uvicorn", "openai"),
    "truetune": ("",),
}
ASKED = [[{"role": "user", "content": q.text}] for q in unseen_questions(World.generate(), 20)]
MOST = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's run: the embedded base, all weights, the hand-written instructions."""
    folder = tmp_path_factory.mktemp("served") / "run"
    train(quickstart_recipe(folder, seed=42))
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> list[str]:
    """What the tuned model replies where it was trained: through the contract."""
    speaker = open_speaker(str(run), None, None, "cpu")
    answers = replies(speaker.model, speaker.contract, ASKED, Sampling(max_new_tokens=MOST))
    assert all(answer.stopped for answer in answers)
    return [answer.text for answer in answers]


@contextlib.contextmanager
def served(kind: str, run: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Address and model name of a server, started as a user starts it."""
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    truetune = [sys.executable, "-m", "truetune", "serve"]
    if kind == "transformers":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        name = str(run / "model")
        code = "from transformers.cli.transformers import main; main()"
        words = [sys.executable, "-c", code, "serve", name, "--host", "127.0.0.1", "--port", port]
        with at_terminal(words, **environment) as terminal:
            terminal.until("Uvicorn running on")
            yield f"http://127.0.0.1:{port}", name
        return
    source, name = str(run), run.name
    if kind == "llama.cpp":
        made = export_gguf(str(run), folder / "gguf", quant="f32")
        source, name = str(made.path), made.path.stem
    with at_terminal([*truetune, source, "--port", "0"], **environment) as terminal:
        yield terminal.until(r"(http://127\.0\.0\.1:\d+)/v1")[1], name


@pytest.mark.parametrize("kind", _NEEDS)
def test_the_tuned_base_answers_as_it_was_trained(
    kind: str, run: Path, trained: list[str], tmp_path: Path
) -> None:
    extra, *needed = _NEEDS[kind]
    if any(importlib.util.find_spec(name) is None for name in needed):
        pytest.skip(f"the extra {extra} is missing")
    with served(kind, run, tmp_path) as (address, name):
        client = Client(address)
        texts = []
        for messages in ASKED:
            asked = {"model": name, "messages": messages, "temperature": 0, "max_tokens": MOST}
            (choice,) = client.post("/v1/chat/completions", asked)["choices"]
            assert choice["finish_reason"] == "stop"
            texts.append(choice["message"]["content"])
        assert texts == trained
        found = diagnose(str(run), url=address)
    assert found.first is None, [finding.what for finding in found.findings()]
    assert found.stages[-1].numbers["same_replies"] == 1
