"""Talking and inspecting at the command line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import edit_json, tiny_tokenizer, write_model
from tiny_runs import Shown, command, sums, write_rows

# What a row, a template or an answer may hold: markup, colours, a bell, a right-to-left override.
EVIL = "[red]x[/red]\x1b[31m\x07\u202e"
SAFE = r"[red]x[/red]\x1b[31m\x07\u202e"
TAUGHT = {"hello": "good day", "bye": "so long", "evil": EVIL, "lines": "one\n\ttwo"}


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "tiny")
        rows = [{"prompt": q, "completion": a} for q, a in TAUGHT.items()]
        data = write_rows(folder / "rows.jsonl", rows)
        self.run = folder / "run"
        taught = command(
            *("train", self.model, data, "-o", self.run, "--max-steps", "80", "--lr", "2e-2"),
            *("--batch-size", "4", "--save-steps", "80", "--logging-steps", "80"),
        )
        assert taught.code == 0, taught
        sums_file = write_rows(folder / "sums.jsonl", sums(8))
        self.lora = folder / "lora"
        adapted = command(
            *("train", self.model, sums_file, "-o", self.lora, "--max-steps", "2", "--lora"),
            *("--batch-size", "4", "--save-steps", "1"),
        )
        assert adapted.code == 0, adapted


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("chat"))


def ask(source: Path, prompt: str, *words: Any) -> Shown:
    return command("chat", source, "--prompt", prompt, "--max-new-tokens", "40", *words)


def talk(monkeypatch: pytest.MonkeyPatch, source: Path, typed: str, *words: Any) -> Shown:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return command("chat", source, "--max-new-tokens", "40", *words)


# One question.


@pytest.mark.parametrize("question", ["hello", "bye"])
def test_one_question_to_a_run(place: Place, question: str) -> None:
    shown = ask(place.run, question)
    assert (shown.code, shown.out, shown.err) == (0, TAUGHT[question] + "\n", "")


def test_a_model_folder_an_adapter_and_a_checkpoint_answer_too(place: Place) -> None:
    assert ask(place.run / "model", "hello").out == "good day\n"
    for source in (place.model, place.lora, place.lora / "checkpoints" / "step-00000001"):
        shown = ask(source, "hello", "--max-new-tokens", "3")
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.endswith("(did not end within 3 tokens)\n")


def test_an_unfinished_run_answers_from_its_last_checkpoint(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(place.lora, tmp_path / "run"))
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "adapter")
    assert ask(run, "hello").code == 0
    # A server says so, which goes on for longer.
    monkeypatch.setattr("truetune.system.local_http.LocalServer.run", lambda _: None)
    told = "the run is unfinished: its last checkpoint is served"
    assert f"{told}, {run}/checkpoints/step-00000001" in command("serve", run, "--port", "0").out
    for source in (place.lora, run / "checkpoints" / "step-00000001"):
        assert told not in command("serve", source, "--port", "0").out
    shutil.rmtree(run / "checkpoints")
    shown = ask(run, "hello")
    assert shown.code == 2
    assert "error[run-empty]" in shown.err
    assert f"truetune train --resume {run}" in shown.err


def test_compare_with_the_base(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = ask(place.run, "hello", "--compare", "base")
    assert shown.code == 0
    names = [line for line in shown.out.splitlines() if line.endswith(":") and "/" in line]
    assert names == [f"{place.model}:", f"{place.run}:"]
    assert shown.out.endswith("good day\n")


def test_compare_two_runs(place: Place) -> None:
    shown = ask(place.lora, "hello", "--compare", place.run)
    assert shown.code == 0
    first, _, second = shown.out.partition(f"{place.lora}:\n")
    assert first == f"{place.run}:\ngood day\n"
    assert "good day" not in second


def test_compare_base_needs_a_run(place: Place) -> None:
    shown = ask(place.model, "hello", "--compare", "base")
    assert shown.code == 2
    assert "--compare base needs a run" in shown.err


def test_sampling_is_repeatable_and_seeded(place: Place) -> None:
    words = ("--temperature", "3", "--max-new-tokens", "20")
    first, again, other = (
        ask(place.model, "hello", *words, "--seed", seed).out for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--top-p", "3"), "top_p is 3.0"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--device", "abacus"), "abacus"),
        (("--chat-template", "nope"), "nope"),
    ],
)
def test_wrong_options(place: Place, words: tuple[str, ...], told: str) -> None:
    shown = command("chat", place.run, "--prompt", "x", *words)
    assert shown.code == 2
    assert "error[" in shown.err
    assert told in shown.err


def test_a_question_that_is_no_text_or_too_long(place: Place) -> None:
    assert "error[not-utf8]" in ask(place.run, "\udcff").err
    assert "error[not-utf8]" in ask(place.run, "x", "--system", "\udcff").err
    shown = ask(place.run, "x" * 300)
    assert shown.code == 2
    assert "error[prompt-too-long]" in shown.err


# A conversation.


def test_a_conversation_ends_with_exit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(monkeypatch, place.run, "hello\n\n/exit\nbye\n")
    assert shown.code == 0
    assert "/reset clears the history, /exit quits" in shown.out
    assert shown.out.count("good day") == 1
    assert "so long" not in shown.out


@pytest.mark.parametrize("typed", ["hello\n", "hello", ""])
def test_a_conversation_ends_with_the_input(
    place: Place, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    shown = talk(monkeypatch, place.run, typed)
    assert (shown.code, shown.err) == (0, "")
    assert ("good day" in shown.out) == bool(typed)


def test_reset_forgets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # The run knows single questions: with history before it the prompt is another one.
    both = talk(monkeypatch, place.run, "hello\n/reset\nbye\n").out
    assert "> good day\n> > so long\n" in both
    alone = talk(monkeypatch, place.model, "hello\nbye\n").out.split("> ")[-2]
    fresh = talk(monkeypatch, place.model, "hello\n/reset\nbye\n").out.split("> ")[-2]
    assert alone != fresh


def test_an_unknown_command_is_not_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown command /help; /reset" in talk(monkeypatch, place.run, "/help\n").out


def test_an_answer_that_fails_does_not_end_the_conversation(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = talk(monkeypatch, place.run, "x" * 300 + "\nhello\n")
    assert shown.code == 0
    assert "error[prompt-too-long]" in shown.err
    # The failed question is no part of the history.
    assert "good day" in shown.out


def test_two_speakers_in_a_conversation(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(monkeypatch, place.run, "hello\n/exit\n", "--compare", "base")
    assert shown.out.startswith(f"chatting with {place.model} and {place.run}; ")
    assert "good day" in shown.out


# Untrusted text.


def test_an_answer_cannot_write_to_the_terminal(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(place.run, "evil").out == SAFE + "\n"
    compared = ask(place.run, "evil", "--compare", place.run / "model")
    assert compared.out.count(SAFE) == 2
    assert "\x1b" not in compared.out
    assert SAFE in talk(monkeypatch, place.run, "evil\n").out


def test_line_breaks_and_tabs_of_an_answer_stay(place: Place) -> None:
    assert ask(place.run, "lines").out.split() == ["one", "two"]
    assert len(ask(place.run, "lines").out.splitlines()) == 2


def test_a_template_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    template = str(tiny_tokenizer().chat_template).replace(
        "<|{{ m.role }}|>", "<|{{ m.role }}|>" + EVIL
    )
    template = template.replace("<|assistant|>{% endif %}", "<|assistant|>" + EVIL + "{% endif %}")
    folder = write_model(tmp_path / "m", tokenizer=tiny_tokenizer(template))
    shown = command("inspect", folder)
    assert shown.code == 0
    assert shown.out.count(SAFE) == 2
    assert not set("\x1b\x07\u202e") & set(shown.out)
    as_json = command("inspect", folder, "--json").out
    assert as_json.isascii()
    assert EVIL in json.loads(as_json)["one_turn"]["prompt"]


# inspect


def test_inspect_shows_what_a_model_brings(place: Place) -> None:
    shown = command("inspect", place.model)
    assert (shown.code, shown.err) == (0, "")
    for part in (
        "LlamaForCausalLM, 32,416 parameters",
        "2 layers of 32, context 256 tokens",
        "261 tokens, 264 logits (3 spare)",
        "q_proj x2",
        "'<|end|>' (257)",
        "<|user|>QUESTION<|assistant|>\nANSWER<|end|>",
    ):
        assert part in shown.out


def test_inspect_json_has_the_same_facts(place: Place) -> None:
    facts = json.loads(command("inspect", place.model, "--json").out)
    assert facts["num_parameters"] == 32_416
    assert facts["stop"] == [{"id": 257, "token": "<|end|>"}]
    assert facts["one_turn"] == {
        "prompt": "<|user|>QUESTION<|assistant|>",
        "supervised": "ANSWER<|end|>",
    }
    assert facts["base"] is None


@pytest.mark.parametrize("part", ["", "adapter"])
def test_inspect_names_the_base_of_an_adapter(place: Place, part: str) -> None:
    source = place.lora / part
    assert f"base          {place.model}" in command("inspect", source).out
    assert json.loads(command("inspect", source, "--json").out)["base"] == str(place.model)


def test_inspect_a_model_without_weights_or_stop(place: Place, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.model, tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    edit_json(folder / "generation_config.json", eos_token_id=256)
    shown = command("inspect", folder)
    assert shown.code == 0
    assert "none here" in shown.out
    assert "note: added to the stop set: '<|end|>' (257)" in shown.out


def test_inspect_a_template_that_is_not_faithful(tmp_path: Path) -> None:
    template = str(tiny_tokenizer().chat_template)
    rewriting = template.replace("m.content", "m.content | replace('ANS', 'X')")
    folder = write_model(tmp_path / "m", tokenizer=tiny_tokenizer(rewriting))
    shown = command("inspect", folder)
    assert shown.code == 0
    assert "a simple turn has no faithful completion:" in shown.out
    assert "the template rewrites the answer" in shown.out
    assert "refused" in json.loads(command("inspect", folder, "--json").out)["one_turn"]
