"""`truetune check MODEL DATA`: what it prints, its exit codes, its JSON."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from refused_folders import REFUSED, REFUSED_ADAPTERS
from tiny_families import APART, FAMILIES, MORE, family
from tiny_models import tiny_config, tiny_tokenizer, write_model
from tiny_runs import command
from truetune.cli.verbs import main
from truetune.contract.contract import PromptContract
from truetune.errors import ModelError
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.save import save_model
from truetune.model.whole import require_whole_folder
from truetune.recipe.sources import make_recipe
from truetune.run.checkup import check_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config(max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    return folder


WORDS = "river boat salt bread house bridge rain roof market cloth".split()  # noqa: SIM905


def answer(i: int) -> str:
    return " ".join(WORDS[(i * k + k * k) % 10] for k in range(1, 14)) + f" {i}"


def write_rows(path: Path, answers: list[str]) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{answer(i + 500)}?"},
                {"role": "assistant", "content": a},
            ]
        }
        for i, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main(["check", *map(str, words)])
    return int(left.value.code or 0)


def test_sound_rows_are_ok(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [answer(i) for i in range(40)])
    assert run(model, data) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("ok: nothing found")
    few = "fewer than 100 rows; pass your own with --eval-data"
    assert f"40 for training, 0 held out ({few}), 0 dropped" in " ".join(shown.split())
    assert "to start the run, replace `check` with `train`" in shown
    assert "keep 99 % of the rows whole" in shown


def test_why_nothing_is_held_out_of_many_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of one prompt stay together."""
    few = tmp_path / "few.jsonl"
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": ""})
    for number, all_trained in ((10, True), (60, False)):
        rows = [
            [{**turns[0], "content": answer(i % number)}, {**turns[1], "content": answer(i)}]
            for i in range(120)
        ]
        few.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        assert run(model, few, "--all") == 0
        shown = " ".join(capsys.readouterr().out.split())
        told = "no rows are held out: 120 rows have 10 different prompts" in shown
        assert told == all_trained
        assert ("120 for training, 0 held out, 0 dropped" in shown) == told


def test_an_error_is_exit_code_1_and_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [answer(i) for i in range(40)]
    rows[3] = rows[3] + "<|end|>" + rows[4]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert run(model, data) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("error[stop-in-answer]")
    assert f"{data}:4" in shown
    # What else is wrong with a refused row is no news.
    assert "control-token-in-content" not in shown
    assert "not ok: 1 error" in shown


def test_json_has_the_same_facts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [answer(i % 38) for i in range(40)])
    assert run(model, data, "--json", "--lr", "1e-4") == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"ok", "findings", "summary"}
    assert told["ok"] is True
    codes = {finding["code"] for finding in told["findings"]}
    assert "prompt-repeated" not in codes
    assert told["summary"]["counts"] == {
        level: sum(f["level"] == level for f in told["findings"])
        for level in ("error", "warning", "note")
    }
    assert told["summary"]["run"]["learning_rate"] == 1e-4
    assert told["summary"]["run"]["train"]["examples"] == 40
    assert told["summary"]["lengths"]["examples"] == 40
    assert sum(b["rows"] for b in told["summary"]["lengths"]["histogram"]) == 40


def test_a_limit_that_cuts_reasoning_is_told_in_one_line(model: Path, tmp_path: Path) -> None:
    rows = [f"<think>{answer(i) * (8 if i < 63 else 1)}</think>yes {i}" for i in range(80)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make_recipe(("here", {"model": str(model), "data": str(data), "max_length": 400}))
    (found,) = [f for f in check_run(recipe, Listener()).findings if f.code == "rows-overlong"]
    assert found.level == "error"
    assert "78.8 % of the examples" in found.what
    assert (
        "78.8 % of the rows (63 of 80) are cut at 400 tokens: 78.8 % lose the token that ends the "
        "answer, 78.8 % of those with reasoning never close it" in found.why
    )
    assert "keeps 99 % of the rows whole" in found.fix


def test_a_row_that_training_would_refuse_is_not_called_dropped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [answer(i) if i else "" for i in range(40)])
    assert run(model, data) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 dropped, 1 refused (--bad-rows drop would leave them out); schema" in shown
    assert run(model, data, "--bad-rows", "drop", "--json") == 0
    told = json.loads(capsys.readouterr().out)["summary"]["run"]
    assert (told["dropped"], told["refused"]) == (1, 0)
    # A run stops at what the file itself shows, and says what else is listed where.
    stopped = command("train", model, data, "-o", tmp_path / "run")
    assert (stopped.code, "`truetune check` also lists" in stopped.err) == (1, True)


def test_a_rank_that_no_matrix_has_is_refused_before_it_fills_the_memory(
    model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [answer(i) for i in range(8)])
    for verb in ("check", "train"):
        shown = command(
            *(verb, model, data, "--lora", "--lora-r", 1_000_000),
            *(["-o", tmp_path / "run"] if verb == "train" else []),
        )
        assert (shown.code, "error[lora-rank-too-large]" in shown.err) == (2, True)
    assert not (tmp_path / "run").exists()
    # The rank of a real recipe, tried on a tiny model.
    assert command("check", model, data, "--lora", "--lora-r", 64).code == 0


def test_no_limit_beyond_the_context_is_advised(model: Path, tmp_path: Path) -> None:
    """An answer that no model of this context can hold, and no shorter prompt makes room for."""
    rows = [answer(i) * (100 if i < 20 else 1) for i in range(80)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make_recipe(("here", {"model": str(model), "data": str(data)}))
    (found,) = [f for f in check_run(recipe, Listener()).findings if f.code == "rows-overlong"]
    assert "20 examples of more than 4,096 tokens" in found.what
    assert " keeps " not in found.why
    share = found.fix.removeprefix(
        "split the rows that exceed the model's context; or accept the loss with --max-dropped "
    )
    recipe = make_recipe(
        ("here", {"model": str(model), "data": str(data), "max_dropped": float(share)})
    )
    (found,) = [f for f in check_run(recipe, Listener()).findings if f.code == "rows-overlong"]
    assert (found.level, found.fix) == ("warning", "split the rows that exceed the model's context")


def test_rows_that_nothing_can_be_made_of(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ["", " "])
    assert run(model, data) == 1
    assert capsys.readouterr().out.startswith("error[empty-answer]")


def test_bad_input_is_exit_code_2(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [answer(1)])
    assert run(tmp_path / "none", data) == 2
    assert run(model, tmp_path / "none.jsonl") == 2
    assert run(model, data, "--no-such-option") == 2
    assert run() == 2


def test_all_shows_what_a_screen_does_not_hold(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [
        {"messages": [{"role": "user", "content": "a"}, {"role": f"role{i}", "content": "b"}]}
        for i in range(20)
    ]
    write_rows(path, [answer(i) for i in range(30)])
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bad)
    assert run(model, path) == 1
    short = capsys.readouterr().out
    assert "more; show them with --all" in short
    assert run(model, path, "--all") == 1
    whole = capsys.readouterr().out
    assert whole.count("error[unknown-role]") == 20 > short.count("error[unknown-role]")


def test_text_of_rows_cannot_draw_on_the_terminal(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "\x1b[31mred", "content": "a"}]}
    data.write_text(json.dumps(row) + "\n")
    assert run(model, data) == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that passes."""
    place = tmp_path_factory.mktemp("whole")
    folder = write_model(place / "base", max_position_embeddings=4096)
    data = write_rows(place / "rows.jsonl", [answer(i) for i in range(20)])
    assert run(folder, data) == 0
    return folder


@pytest.mark.parametrize("damage", REFUSED)
def test_what_training_refuses_of_the_files_is_an_error(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, code = REFUSED[damage]
    folder = shutil.copytree(whole, tmp_path / "base")
    change(folder)
    assert run(folder, whole.parent / "rows.jsonl", "--all") in (1, 2)
    shown = capsys.readouterr()
    assert f"error[{code}]" in shown.out + shown.err


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a base beside it."""
    place = tmp_path_factory.mktemp("adapter")
    write_model(place / "base", max_position_embeddings=4096)
    loaded = add_lora(
        load_model(place / "base", purpose="lora", device="cpu"), LoraSettings(r=4), seed=0
    )
    save_model(loaded, PromptContract.load(loaded.tokenizer), place / "adapter")
    return place / "adapter"


def test_a_sound_adapter_passes(adapter: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [answer(i) for i in range(20)])
    assert run(adapter, data, "--lora") == 0


@pytest.mark.parametrize("damage", REFUSED_ADAPTERS)
def test_an_adapter_that_training_refuses_is_an_error(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, code = REFUSED_ADAPTERS[damage]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change(folder)
    start = time.process_time()
    with pytest.raises(ModelError) as trained:
        load_model(folder, purpose="lora", device="cpu")
    assert trained.value.code == code
    data = write_rows(tmp_path / "rows.jsonl", [answer(i) for i in range(20)])
    assert run(folder, data, "--lora", "--all") in (1, 2)
    shown = capsys.readouterr()
    assert f"error[{code}]" in shown.out + shown.err
    exported = command("export", folder, "-o", tmp_path / "out")
    assert (exported.code, f"[{code}]" in exported.err) == (2, True), exported.err
    assert not (tmp_path / "out").exists()
    assert time.process_time() - start < 20


@pytest.mark.parametrize("kind", [*FAMILIES, *MORE, *APART])
def test_whole_folders_of_every_family_are_taken(tmp_path: Path, kind: str) -> None:
    """In one file and in shards; some store other names than the model has."""
    made = family(kind)
    for name, size in (("one", "5GB"), ("shards", "20KB")):
        made.save_pretrained(tmp_path / name, max_shard_size=size)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        require_whole_folder(tmp_path / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    # One shard is not the model.
    first = min((tmp_path / "shards").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(ModelError) as caught:
        require_whole_folder(tmp_path / "shards")
    assert caught.value.code == "model-shards-missing"
