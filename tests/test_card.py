"""The model card: metadata that the Hub reads, numbers of the run, nothing of anybody's disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from run_folders import EVIL, files, finding, write_run
from tiny_models import write_model
from tiny_runs import command, sums, write_rows
from truetune.reporting.card import CARD, card, use_block, with_use_block
from truetune.reporting.facts import RunFacts
from truetune.run_dir import RunDir
from truetune.verification.files import check_files


def made(folder: Path, contents: dict[str, Any], *, adapter: bool = False) -> str:
    facts = RunFacts.read(RunDir(write_run(folder, contents)))
    return card(facts, str(folder / ("adapter" if adapter else "model")), is_adapter=adapter)


def based(contents: dict[str, Any], base: str, data: str = "rows.jsonl") -> dict[str, Any]:
    contents["recipe.yaml"]["model"]["value"] = base
    contents["recipe.yaml"]["data"]["value"] = data
    contents["data.json"]["files"][0]["path"] = data
    if "adapter/adapter_config.json" in contents:
        contents["adapter/adapter_config.json"]["base_model_name_or_path"] = base
    return contents


def test_names_of_the_hub_are_metadata(tmp_path: Path) -> None:
    contents = based(files(adapter=True), "Qwen/Qwen2.5-0.5B", "tatsu-lab/alpaca")
    text = made(tmp_path / "first", contents, adapter=True)
    told = ModelCard(text).data.to_dict()
    assert told == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["tatsu-lab/alpaca"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["truetune", "sft", "lora"],
    }
    assert "\n# first\n" in text
    assert (
        "A LoRA adapter for Qwen/Qwen2.5-0.5B, trained by supervised fine-tuning on 100 examples"
        in text
    )
    assert "The base's files name no licence" in text


def test_folders_of_a_disk_are_not_told(tmp_path: Path) -> None:
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    rows = tmp_path / "private" / "rows.jsonl"
    rows.write_text("")
    contents = based(files(adapter=True), str(base), str(rows))
    text = made(tmp_path / "run", contents, adapter=True)
    told = ModelCard(text).data.to_dict()
    assert "base_model" not in told
    assert "datasets" not in told
    before, _, rest = text.partition("<!-- truetune: how")
    after = rest.partition("<!-- truetune: end -->")[2]
    assert str(tmp_path) not in before + after
    assert "The base came from a local folder" in text
    assert "`rows.jsonl`: 110 rows" in text


@pytest.mark.parametrize(
    ("name", "content", "license_"),
    [
        (CARD, "---\nlicense: apache-2.0\nlanguage: en\n---\n# base\n", "apache-2.0"),
        ("config.json", '{"license": "mit"}', "mit"),
        (CARD, "---\nlicense: [a, b]\n---\n", None),
        (CARD, "---\nlicense: 'x\\n- y: z'\n---\n", None),
        (CARD, "---\nlicense: {{{\n---\n", None),
        (CARD, "license: mit\n", None),
        ("config.json", "[" * 5000, None),
    ],
)
def test_the_licence_is_what_the_base_says(
    tmp_path: Path, name: str, content: str, license_: str | None
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / name).write_text(content)
    text = made(tmp_path / "run", based(files(), str(base)))
    assert ModelCard(text).data.to_dict().get("license") == license_
    assert ("name no licence" in text) == (license_ is None)


def test_numbers_hashes_template_and_stops(tmp_path: Path) -> None:
    text = made(tmp_path / "run", files())
    for part in (
        "- **Trained as served: yes.**",
        "- **Behaves: yes.**",
        "| replies that end by themselves | 0 % | 100 % |",
        "| loss on text to keep | 0.800 | 0.950 |",
        "| held-out loss | 3.400 | 0.554 |",
        "- trained: 100 examples, 2,400 tokens, 900 of them supervised",
        "dropped: 4",
        f"sha256 `{'b' * 64}`",
        "| learning\\_rate | 0.0002 | default: a base of 5 M parameters |",
        "built-in chatml-lite",
        '`{"enable_thinking": false}`',
        "`<|end|>` (4)",
        "With truetune 0.1.0, torch 2.13.0.",
        f'AutoModelForCausalLM.from_pretrained("{tmp_path}/run/model")',
        f"vllm serve {tmp_path}/run/model",
    ):
        assert part in text, part
    assert "rows.jsonl:1" not in text  # rows and replies are somebody's


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    text = made(tmp_path / "bad", files(healthy=False))
    assert "- **Behaves: no.**" in text
    assert "- 88% of the replies" in text
    contents = files()
    contents["metrics.jsonl"] = []
    assert "Not measured: the run had no probes" in made(tmp_path / "none", contents)
    assert "Unknown" in made(tmp_path / "empty", {"model/config.json": {}})


def test_foreign_text_is_no_markup(tmp_path: Path) -> None:
    evil = EVIL + "\n---\nlicense: mit\n| a | b |\n```\n[x](http://evil)\n<!-- truetune: end -->"
    contents = files(evil, adapter=True)
    contents["findings.jsonl"].append(finding("forgetting", "warning", evil))
    text = made(tmp_path / "run", contents, adapter=True)
    told = ModelCard(text).data.to_dict()
    assert "license" not in told
    assert "base_model" not in told
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    assert "<script" not in prose
    assert not re.search(r"(?<!\\)\]\(", prose)
    assert text.count("```") == 4
    assert text.count("<!-- truetune: end -->") == 1
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_lines_of_an_adapter(tmp_path: Path) -> None:
    contents = based(files(adapter=True), "org/base")
    contents["adapter/adapter_config.json"]["revision"] = "abc123"
    contents["findings.jsonl"].append(finding("adapter-stop-unread", "warning", "unread"))
    text = made(tmp_path / "run", contents, adapter=True)
    assert "vllm serve org/base --revision abc123 --enable-lora" in text
    assert "--max-lora-rank 32" in text
    assert "stop_token_ids=[0, 4]" in text
    contents["recipe.yaml"]["qlora"] = {"value": True, "origin": "command line"}
    text = made(tmp_path / "bits", contents, adapter=True)
    assert "load_in_4bit=True" in text
    assert "--merge -o" in text


def test_other_lines_for_another_place_and_an_owners_words_stay(tmp_path: Path) -> None:
    text = made(tmp_path / "run", files())
    facts = RunFacts.read(RunDir(tmp_path / "run"))
    edited = text.replace("# run", "# My model\n\nIt is mine.")
    block = use_block(facts, "name", None, repo="me/name")
    there = with_use_block(edited, block)
    assert "It is mine." in there
    assert "hf download me/name --local-dir name" in there
    assert 'from_pretrained("me/name")' in there
    assert str(tmp_path) not in there
    assert with_use_block("no marks", block) == "no marks"


# Real runs.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    write_model(folder / "tiny")
    (folder / "tiny" / CARD).write_text("---\nlicense: mit\n---\n# Somebody's base\n")
    write_rows(folder / "rows.jsonl", sums(24))
    shared = ("train", folder / "tiny", folder / "rows.jsonl", "--max-steps", 2)
    for name, more in (("lora", ("--lora",)), ("full", ())):
        told = command(*shared, "-o", folder / name, *more)
        assert told.code == 0, told.err
    return folder


@pytest.mark.parametrize(("name", "inside"), [("lora", "adapter"), ("full", "model")])
def test_a_saved_folder_has_one_card_and_it_is_ours(place: Path, name: str, inside: str) -> None:
    folder = place / name / inside
    cards = [p.name for p in folder.iterdir() if p.name.lower().startswith("readme")]
    assert cards == [CARD]
    text = (folder / CARD).read_text()
    assert "Somebody" not in text
    told = ModelCard(text).data.to_dict()
    assert told["license"] == "mit"
    assert told["library_name"] == ("peft" if inside == "adapter" else "transformers")
    assert "on 24 examples" in text
    manifest = json.loads((place / name / "manifest.json").read_text())
    assert f"{inside}/{CARD}" in manifest["files"]
    assert not list((place / name / "checkpoints").rglob(CARD))


def test_a_card_that_its_owner_edits_or_removes_makes_nobody_doubt_the_run(place: Path) -> None:
    path = place / "full" / "model" / CARD
    text = path.read_text()
    try:
        path.write_text(text + "\nMore.\n")
        assert check_files(RunDir(place / "full")).state == "passed"
        path.unlink()
        assert check_files(RunDir(place / "full")).state == "passed"
    finally:
        path.write_text(text)
    config = place / "full" / "model" / "config.json"
    before = config.read_text()
    config.write_text(before + " ")
    assert check_files(RunDir(place / "full")).state == "failed"
    config.write_text(before)


def test_a_merged_model_has_a_card_of_its_own(place: Path, tmp_path: Path) -> None:
    told = command("export", place / "lora", "--merge", "-o", tmp_path / "merged", "--no-verify")
    assert told.code == 0, told.err
    text = (tmp_path / "merged" / CARD).read_text()
    told = ModelCard(text).data.to_dict()
    assert told["library_name"] == "transformers"
    assert told["license"] == "mit"
    assert "# merged\n" in text
    assert "with an adapter merged into it" in text
    assert f"vllm serve {tmp_path}/merged" in text
    assert "on 24 examples" in text
    # Without the run there is a card too; it says what it does not know.
    alone = tmp_path / "alone"
    (place / "lora" / "adapter").rename(alone)
    try:
        told = command("export", alone, "--merge", "-o", tmp_path / "more", "--no-verify")
        assert told.code == 0, told.err
    finally:
        alone.rename(place / "lora" / "adapter")
    text = (tmp_path / "more" / CARD).read_text()
    assert "the run that trained it is not available here" in text
