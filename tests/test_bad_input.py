"""Wrong input at the command line: one clear error with place and remedy, the right exit code, and
nothing half-written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_tokenizer, write_model
from tiny_runs import Shown, command, sums, write_rows

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", sums(6))


def refused(folder: Path, code: int, name: str, *parts: str, words: tuple[Any, ...]) -> Shown:
    """Train, and look at how it is refused: `parts` must all be on the screen."""
    before = sorted(folder.rglob("*"))
    shown = command("train", *words, "-o", folder / "out", "--max-steps", "1")
    assert shown.code == code, shown
    assert f"error[{name}]: " in shown.err
    assert "  fix    " in shown.err or name == "no-assistant-turn"
    for part in parts:
        assert part in shown.err
    assert "Traceback" not in shown.err
    # No more than which stage it came to, and when.
    assert re.fullmatch(r"( *\d+:\d\d  [a-z' ,]+\n)*", shown.out)
    assert not (folder / "out").exists()
    assert sorted(folder.rglob("*")) == before
    return shown


# Rows.


def test_no_such_file(tmp_path: Path, tiny: Path, rows: Path) -> None:
    missing = tmp_path / "rowz.jsonl"
    words = (tiny, missing)
    refused(tmp_path, 2, "no-such-file", str(missing), f"did you mean {rows}?", words=words)


def test_an_empty_file(tmp_path: Path, tiny: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [])
    refused(tmp_path, 2, "empty-file", str(data), words=(tiny, data))


def test_broken_json_on_line_17(tmp_path: Path, tiny: Path) -> None:
    rows: list[Any] = sums(20)
    rows[16] = '{"prompt": "x", "completion": }'
    data = write_rows(tmp_path / "rows.jsonl", rows)
    refused(tmp_path, 2, "broken-json", f"{data}:17", "sed -n 17p", words=(tiny, data))


def test_rows_of_mixed_schemas(tmp_path: Path, tiny: Path) -> None:
    data = write_rows(
        tmp_path / "rows.jsonl", [*sums(3), {"text": "x"}, {"instruction": "i", "output": "o"}]
    )
    shown = refused(
        tmp_path,
        1,
        "mixed-schemas",
        f"{data}:4",
        f"{data}:5",
        "2 rows cannot be trained",
        "--bad-rows drop",
        words=(tiny, data),
    )
    assert "error[bad-rows]" in shown.err


def test_an_unknown_role(tmp_path: Path, tiny: Path) -> None:
    chat = [{"role": "wizard", "content": "x"}, CHAT[1]]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": chat}])
    refused(
        tmp_path,
        1,
        "unknown-role",
        "'wizard'",
        f"{data}:2",
        "1 row cannot be trained",
        words=(tiny, data),
    )


def test_no_assistant_turn(tmp_path: Path, tiny: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT[:1]}, {"messages": CHAT}])
    refused(tmp_path, 1, "no-assistant-turn", f"{data}:1", "--bad-rows drop", words=(tiny, data))


def test_many_bad_rows_fill_one_screen(tmp_path: Path, tiny: Path) -> None:
    chats = [[{"role": f"role{i}", "content": "x"}, CHAT[1]] for i in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": c} for c in [CHAT, *chats]])
    shown = refused(tmp_path, 1, "unknown-role", "40 rows cannot be trained", words=(tiny, data))
    assert "and 28 more findings" in shown.err
    assert len(shown.err.splitlines()) < 60


def test_an_absent_column(tmp_path: Path, tiny: Path, rows: Path) -> None:
    refused(
        tmp_path,
        2,
        "no-such-column",
        "'promt'",
        str(rows),
        "did you mean prompt=prompt?",
        words=(tiny, rows, "--columns", "prompt=promt,completion=completion"),
    )


def test_columns_of_no_schema(tmp_path: Path, tiny: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"frage": "x", "antwort": "y"}])
    refused(
        tmp_path, 2, "no-schema", "--columns prompt=frage,completion=antwort", words=(tiny, data)
    )


@pytest.mark.parametrize(
    ("words", "name", "told"),
    [
        (("--schema", "alpacca"), "unknown-schema", "alpaca"),
        (("--chat-template", "nope.jinja"), "no-such-template", "chatml-lite"),
        (("--stop", "<|nope|>"), "stop-not-a-token", "<|nope|>"),
        (("--report-to", "tensorbord"), "tracker", "tensorboard"),
        (("--lora", "--target-modules", "q_prog"), "lora-targets", "q_proj"),
        (("--device", "cuda"), "device", "--device auto"),
        (("--device", "gpu"), "recipe", "auto, cuda, mps or cpu"),
        (("--learning-rate", "fast"), "recipe", "learning_rate must be a number"),
        (("--lora-r", "1.5"), "recipe", "lora_r must be a whole number"),
        (("--batch-size", "8", "--micro-batch-size", "16"), "recipe", "is more than"),
        (
            ("--batch-size=8", "--micro-batch-size=3", "--gradient-accumulation-steps=2"),
            "recipe",
            "= 6: omit one of them",
        ),
        (("--epochs", "2"), "recipe", "epochs and max_steps"),
    ],
)
def test_settings(
    tmp_path: Path, tiny: Path, rows: Path, words: tuple[str, ...], name: str, told: str
) -> None:
    if words[:2] == ("--device", "cuda"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has what is asked for")
    refused(tmp_path, 2, name, told, words=(tiny, rows, *words))


# Models.


def broken(change: Callable[[Path], None]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tiny: Path) -> Path:
        copy = Path(shutil.copytree(tiny, folder / "broken"))
        change(copy)
        return copy

    return make


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbled(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def only_config(kind: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, _: Path) -> Path:
        from transformers import AutoConfig

        path = folder / kind
        AutoConfig.for_model(kind).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        return path

    return make


MODELS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "no folder": (lambda folder, _: folder / "none" / "deep" / "m", "model-not-found"),
    "a file": (lambda folder, _: folder / "rows.jsonl", "model-is-file"),
    "an empty folder": (broken(remove("*")), "model-no-config"),
    "no tokenizer": (broken(remove("token*")), "model-no-tokenizer"),
    "no weights": (broken(remove("*.safetensors")), "model-no-weights"),
    "pickled weights": (broken(pickled), "model-pickle"),
    "broken config": (broken(garbled), "model-config-unreadable"),
    "cut off weights": (broken(cut_off), "model-weights-damaged"),
    "an encoder-decoder": (only_config("t5"), "model-not-causal"),
    "an encoder": (only_config("bert"), "model-not-causal"),
    "a vision model": (only_config("vit"), "model-not-causal"),
}


@pytest.mark.parametrize("what", list(MODELS))
def test_models_that_cannot_be_trained(tmp_path: Path, tiny: Path, rows: Path, what: str) -> None:
    make, name = MODELS[what]
    model = make(tmp_path, tiny)
    refused(tmp_path, 2, name, words=(model, rows))
    # The other verbs say the same.
    for verb in ("inspect", "chat"):
        shown = command(verb, model, *(["--prompt", "x"] if verb == "chat" else []))
        if verb == "inspect" and ("weights" in what):
            continue  # inspect reads small files only
        assert shown.code == 2
        assert f"error[{name}]: " in shown.err


# Output folders.


def test_output_folders_that_hold_something(tmp_path: Path, tiny: Path, rows: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for words in ([], ["--overwrite"]):
        shown = command("train", tiny, rows, "-o", out, *words)
        assert shown.code == 2
        assert "error[output-not-ours]" in shown.err
        assert "thesis.txt" in shown.err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    shown = command("train", tiny, rows, "-o", out / "thesis.txt")
    assert shown.code == 2
    assert "is a file" in shown.err


# Recipes.


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("lerning_rate: 1e-4\n", "recipe", ["lerning_rate", "did you mean 'learning_rate'?"]),
        ("model: a\n  b: [\n", "input", ["not valid YAML", "r.yaml:2"]),
        ("- a\n", "input", ["not a list of settings"]),
        ("lora: perhaps\nlora_r: many\n", "recipe", ["2 settings", "lora must", "lora_r must"]),
        ("model: m\n", "recipe", ["missing: data, output"]),
    ],
)
def test_recipes(tmp_path: Path, text: str, code: str, parts: list[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    shown = command("train", recipe)
    assert shown.code == 2
    assert f"error[{code}]: " in shown.err
    for part in parts:
        assert part in shown.err


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    shown = command("train", tmp_path / "none.yaml")
    assert shown.code == 2
    assert "error[no-recipe]" in shown.err


def test_errors_send_nothing_of_a_row_to_the_terminal(tmp_path: Path, tiny: Path) -> None:
    # A row can hold whatever it likes; the error shows it and sends none of it.
    evil = "\x1b[31m\x07[red]boo[/red]\u202e"
    chat = [{"role": evil, "content": "x"}, CHAT[1]]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": chat}])
    shown = refused(tmp_path, 1, "unknown-role", "[red]boo[/red]", words=(tiny, data))
    assert not any(char in shown.err for char in "\x1b\x07\u202e")
    assert "\\x1b[31m" in shown.err
