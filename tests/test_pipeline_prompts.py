"""Runs whose template asks for something: the date, an argument, a place for reasoning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_contracts as tiny
from tiny_models import write_model
from tiny_runs import Shown, command, lines, sums, write_rows
from truetune import PromptContract
from truetune.run_dir import RunDir

SHORT = ("--max-steps", "2", "--batch-size", "4", "--no-check")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl", sums(12))
    reasoned = [
        {"problem": f"{i}+1?", "thinking": f"One more than {i}.", "solution": f"{i + 1}."}
        for i in range(12)
    ]
    write_rows(folder / "reasoned.jsonl", reasoned)
    for name in ("DATED", "HYBRID", "OPENS_THINKING", "PLAIN"):
        (folder / f"{name}.jinja").write_text(getattr(tiny, name), encoding="utf-8")
    return folder


def train(place: Path, run: Path, data: str, template: str, *more: Any) -> Shown:
    words = ["train", place / "tiny", place / data, "-o", run, *SHORT]
    return command(*words, "--chat-template", place / f"{template}.jinja", *more)


def codes(run: Path) -> Sequence[str]:
    return [finding["code"] for finding in lines(run / "findings.jsonl")]


def test_the_date_is_that_of_the_start_and_stays(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = train(place, run, "rows.jsonl", "DATED")
    assert shown.code == 0, shown.err
    contract = json.loads((run / "contract.json").read_text())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert contract["date"] == recipe["date"]["value"]
    # A resumed run takes it back: it is no default, which would be made anew.
    assert recipe["date"]["origin"] == "the day of the start"
    assert "template-date" in codes(run)
    other = tmp_path / "other"
    assert train(place, other, "rows.jsonl", "DATED", "--date", "2020-02-29").code == 0
    fixed = json.loads((other / "contract.json").read_text())
    assert fixed["date"] == "2020-02-29"
    hashes = [json.loads((r / "data.json").read_text())["train"]["sha256"] for r in (run, other)]
    assert hashes[0] != hashes[1]
    again = tmp_path / "again"
    assert train(place, again, "rows.jsonl", "DATED", "--date", "2020-02-29").code == 0
    assert json.loads((again / "data.json").read_text())["train"]["sha256"] == hashes[1]


def test_an_argument_is_saved_as_the_default(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = train(place, run, "rows.jsonl", "HYBRID", "--template-arg", "thinking=false")
    assert shown.code == 0, shown.err
    artifact = RunDir(run).path / "model"
    served = PromptContract.load(artifact).prompt_text([{"role": "user", "content": "a"}])
    assert served.endswith("<think>\n\n</think>\n\n")
    assert json.loads((run / "contract.json").read_text())["template_kwargs"] == {"thinking": False}


def test_rows_without_a_place_for_their_reasoning(place: Path, tmp_path: Path) -> None:
    shown = train(place, tmp_path / "a", "reasoned.jsonl", "PLAIN")
    assert shown.code == 1
    assert "target-dropped" in shown.err
    assert "--reasoning inline" in shown.err
    assert not (tmp_path / "a").exists()
    run = tmp_path / "b"
    assert train(place, run, "reasoned.jsonl", "PLAIN", "--reasoning", "inline").code == 0
    assert json.loads((run / "contract.json").read_text())["policy"]["reasoning"] == "inline"
    dropped = tmp_path / "c"
    assert train(place, dropped, "reasoned.jsonl", "PLAIN", "--reasoning", "drop").code == 0
    counts = [
        json.loads((r / "data.json").read_text())["train"]["supervised_tokens"]
        for r in (run, dropped)
    ]
    assert counts[0] > counts[1]


def test_plain_rows_where_the_prompt_opens_a_block(place: Path, tmp_path: Path) -> None:
    shown = train(place, tmp_path / "a", "rows.jsonl", "OPENS_THINKING")
    assert shown.code == 1
    assert "thinking-only" in shown.err
    run = tmp_path / "b"
    assert train(place, run, "rows.jsonl", "OPENS_THINKING", "--reasoning", "empty").code == 0
    assert "answer-reasoning-empty" in codes(run)


def test_rows_with_control_tokens_are_told_or_refused(place: Path, tmp_path: Path) -> None:
    rows = [*sums(11), {"prompt": "say <|end|>", "completion": "no."}]
    write_rows(place / "controls.jsonl", rows)
    words = ["train", place / "tiny", place / "controls.jsonl", "--max-steps", "1"]
    told = tmp_path / "told"
    shown = command(*words, "-o", told)
    assert shown.code == 0, shown.err
    assert "control-token-in-content" in codes(told)
    refused = command(*words, "-o", tmp_path / "refused", "--content-specials", "error")
    assert refused.code == 1
    assert "controls.jsonl:12, messages[0].content" in refused.err
    dropped = tmp_path / "dropped"
    more = ("--content-specials", "error", "--bad-rows", "drop")
    assert command(*words, "-o", dropped, *more).code == 0
    data = json.loads((dropped / "data.json").read_text())
    assert [d["code"] for d in data["dropped"]] == ["control-token-in-content"]


def test_a_marker_without_its_mode_is_told(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(place, run, "rows.jsonl", "PLAIN", "--think-markers", "<r>,</r>").code == 0
    assert "setting-without-effect" in codes(run)


@pytest.mark.parametrize(
    ("data", "template", "words"),
    [
        ("rows.jsonl", "DATED", ("--date", "2020-02-29")),
        ("reasoned.jsonl", "PLAIN", ("--reasoning", "inline")),
        ("rows.jsonl", "OPENS_THINKING", ("--reasoning", "empty")),
        ("rows.jsonl", "HYBRID", ("--template-arg", "thinking=true")),
    ],
)
def test_what_was_decided_is_verified_as_decided(
    place: Path, tmp_path: Path, data: str, template: str, words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    shown = train(place, run, data, template, *words)
    assert shown.code == 0, shown.err
    verified = command("verify", run)
    assert verified.code == 0, verified.out + verified.err
