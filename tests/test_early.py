"""What can be known in the first second is asked in the first second, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Processor seconds of one refusal, the first one's imports included: 0.7 on a quiet machine, and
# torch with transformers alone takes more than this anywhere.
SECOND = 3.0

RUN_CASES = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from tests.tiny_runs import command
found = []
for words in json.loads(sys.argv[2]):
    began = time.process_time()
    shown = command(*words)
    spent = time.process_time() - began
    found.append([shown.code, shown.out + shown.err, spent, "torch" in sys.modules])
print(json.dumps(found))
"""


def refused(cases: list[list[str]], **environment: str) -> list[list[Any]]:
    """(exit code, screen, processor seconds, whether torch was imported by then) of each."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", RUN_CASES, str(Path(__file__).parents[1]), json.dumps(cases)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=True,
    )
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and model folders that are only looked at."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "rows.jsonl").write_text('{"prompt": "1+1?", "completion": "2."}\n' * 3)
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "2."}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text('{"text": " "}\n')
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "copies").mkdir()
    (folder / "copies" / "a.gguf").write_bytes(b"GGUF")
    (folder / "commas.jsonl").write_text('{"prompt": "1+1?", "completion": "2."},\n' * 3)
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    (folder / "a-file").write_text("no folder")
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("keep me")
    (folder / "axolotl.yaml").write_text("base_model: x\nadapter: lora\n")
    return folder


def train(place: Path, *words: str, model: str = "model", rows: str = "rows.jsonl") -> list[str]:
    there = ["train", str(place / model), str(place / rows)]
    output = [] if "-o" in words else ["-o", str(place / "out")]
    return [*there, *output, *words]


def cases(place: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> command line, and what its refusal says."""
    new = str(place / "out")
    return {
        "a data file": (train(place, rows="row.jsonl"), "no-such-file"),
        "held-out rows": (train(place, "--eval-data", str(place / "none.csv")), "no-such-file"),
        "a wrong encoding": (train(place, rows="latin.jsonl"), "not-utf8"),
        "an empty file": (train(place, rows="empty.jsonl"), "empty-file"),
        "a text to keep": (train(place, "--keep-text", str(place / "no.txt")), "no-such-file"),
        "an empty one": (train(place, "--keep-text", str(place / "empty.jsonl")), "empty-file"),
        "one of no words": (
            train(place, "--keep-text", str(place / "blank.jsonl")),
            "keep-text-unreadable",
        ),
        "one that is no text": (
            train(place, "--keep-text", str(place / "latin.jsonl")),
            "not-utf8",
        ),
        "patience without rows": (train(place, "--patience", "2"), "patience-without-rows"),
        "a model folder": (train(place, model="modle"), "model-not-found"),
        "a Hub model": (["train", "no/model", str(place / "rows.jsonl"), "-o", new], "offline"),
        "weights": (train(place, model="bare"), "model-no-weights"),
        "a tracker": (train(place, "--report-to", "trackio"), "tracker-missing"),
        "an unknown tracker": (train(place, "--report-to", "wandbb"), "unknown tracker"),
        "a device": (train(place, "--device", "mps"), "device 'mps' is not available"),
        "a template": (train(place, "--chat-template", "no/such.jinja"), "no-such-template"),
        "an output": (["train", str(place / "model"), str(place / "rows.jsonl")], "output"),
        "an output taken": (train(place, "-o", str(place / "run")), "output-not-ours"),
        "an output under a file": (
            train(place, "-o", str(place / "a-file/run")),
            "is a file or a broken link",
        ),
        "an output that cannot be": (train(place, "-o", "/proc/run"), "output-not-writable"),
        "two lengths": (train(place, "--epochs", "1", "--max-steps", "2"), "omit one of them"),
        "a learning rate": (train(place, "--learning-rate", "5"), "learning_rate 5"),
        "a batch": (train(place, "--batch-size", "0"), "batch_size must be at least 1"),
        "check's data": (["check", str(place / "model"), str(place / "no.jsonl")], "no-such-file"),
        "check's model": (["check", str(place / "no")], "model-not-found"),
        "check's smoke test": (
            ["check", str(place / "model"), "--smoke-test"],
            "no data was given, so --smoke-test would be ignored",
        ),
        "check's settings": (
            ["check", str(place / "model"), "--lora", "--lr", "1e-4"],
            "--lora, --learning-rate would be ignored",
        ),
        "a GGUF file": (train(place, model="a.gguf"), "a copy for llama.cpp"),
        "a folder of GGUF files": (train(place, model="copies"), "a copy for llama.cpp"),
        "commas between rows": (
            train(place, rows="commas.jsonl"),
            "sed 's/,[[:space:]]*$//' <",
        ),
        "a recipe": (["train", str(place / "no.yaml")], "no-recipe"),
        "a resumed run": (["train", "--resume", str(place / "run")], "no-run"),
        "a chat": (["chat", str(place / "no")], "model-not-found"),
        "an inspection": (["inspect", str(place / "no")], "model-not-found"),
        "a verification": (["verify", str(place / "no")], "error[no-run]"),
        "an export": (["export", str(place / "no"), "--merge", "-o", new], "error["),
    }


def test_refusals_come_in_the_first_second_before_torch(place: Path) -> None:
    asked = cases(place)
    before = sorted(path.name for path in place.iterdir())
    found = refused([words for words, _ in asked.values()])
    for (name, (_, said)), (code, screen, spent, with_torch) in zip(
        asked.items(), found, strict=True
    ):
        assert code == 2, (name, code, screen)
        assert said in screen, (name, screen)
        assert not with_torch, name
        assert spent < SECOND, (name, spent)
    assert not (place / "out").exists()
    assert (place / "run" / "mine.txt").read_text() == "keep me"
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_gpu_that_is_not_there_is_known_without_torch(place: Path) -> None:
    """Where every GPU is hidden, or the build of torch has no use for one."""
    ((code, screen, spent, with_torch),) = refused(
        [train(place, "--device", "cuda")], CUDA_VISIBLE_DEVICES=""
    )
    assert (code, with_torch) == (2, False)
    assert "device 'cuda' is not available" in screen
    assert spent < SECOND


@pytest.mark.parametrize("option", [["--qlora"], ["--lora", "--optim", "adamw_8bit"]])
def test_a_missing_extra_is_asked_for_at_once(
    place: Path, option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from tests.tiny_runs import command

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    shown = command(*train(place, *option))
    assert (shown.code, "extra-missing" in shown.err) == (2, True)
