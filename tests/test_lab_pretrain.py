"""Pretraining end to end, tiny; what it writes is a whole model folder."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch

from truetune.cli import verbs as cli
from truetune.errors import OutputExists
from truetune.lab import base_path
from truetune.lab.building.pretrain import (
    BaseShape,
    Course,
    Settings,
    StagedBatcher,
    corpus_ids,
    cut_blocks,
    pretrain,
)
from truetune.lab.building.prose import documents
from truetune.lab.world import World

HASHED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pretraining.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_log.jsonl",
]
PLAIN = Course("plain", 6 * 512, ((64, 0.5), (128, 0.5)), 3e-3)
TINY = Settings(
    courses=(PLAIN, Course("rich", 2 * 512, ((128, 1.0),), 1e-3)),
    step_tokens=512,
    autocast=False,
    shape=BaseShape(
        hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    lines = []
    out = tmp_path_factory.mktemp("lab") / "tiny"
    folder = pretrain(
        out, TINY, log_every=2, save_every=4, num_recall_items=20, on_progress=lines.append
    )
    return folder, lines


def test_it_learns_and_logs(run):
    folder, lines = run
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 1, 2]
    assert [line["corpus"] for line in lines] == ["plain"] * 4 + ["rich"] * 2
    assert lines[-1]["tokens"] == TINY.tokens == 8 * 512
    assert lines[3]["loss"] < lines[0]["loss"]
    assert lines[3]["lr"] < lines[2]["lr"] < 3e-3  # each course has its own schedule
    assert lines[4]["lr"] == 1e-3
    log = (folder / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == lines


def test_the_folder_opens_in_transformers(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (run[0], run[0] / "checkpoint"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert model.config.vocab_size == 2048
        assert model.generation_config.eos_token_id == 0
        assert len(AutoTokenizer.from_pretrained(folder)) == 2032


def test_card_and_checksums(run):
    folder, _ = run
    card = (folder / "README.md").read_text()
    assert "seed 7" in card
    assert re.search(r"\| all \| \d+ of 20 \(.*\) \| \d+ of 20 \(", card)  # development, blind
    assert "sums of numbers up to 30: " in card
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in HASHED
    }


def test_same_settings_same_weights(run, tmp_path):
    folder, _ = run
    again = pretrain(tmp_path / "again", TINY, log_every=2, num_recall_items=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["tokenizer.json", "training_log.jsonl", "notes.txt"])
def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "pretrain", "-o", str(tmp_path)])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "error[output-exists]" in shown
    assert name in shown
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def test_an_empty_folder_is_taken_and_its_own_output_is_not(tmp_path, monkeypatch):
    module = "truetune.lab.building.pretrain"
    monkeypatch.setattr(f"{module}._build", lambda run, *_: run.file("a").write_text("b"))
    monkeypatch.setattr(f"{module}.finish", lambda *_: None)
    pretrain(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(OutputExists, match="not empty: a"):
        pretrain(tmp_path, TINY)


def test_a_run_of_another_size_deals_its_tokens_in_proportion():
    run = Settings(courses=(PLAIN, replace(PLAIN, corpus="rich", tokens=3 * 512)), step_tokens=512)
    assert run.tokens == 9 * 512
    twice = run.of_size(18 * 512)
    assert [course.tokens for course in twice.courses] == [12 * 512, 6 * 512]
    assert [course.corpus for course in twice.courses] == ["plain", "rich"]


def test_a_run_too_small_for_its_stages_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "pretrain", "-o", str(tmp_path / "base"), "--tokens", "49999"])
    assert ended.value.code == 2
    assert "--tokens" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
    smallest = Settings().of_size(50_000)
    for course in smallest.courses:
        steps = smallest.num_steps(course)
        assert 0 < round(steps * course.stages[0][1]) < steps


def test_the_rich_course_has_its_own_documents(ids):
    _, tokenizer = ids
    rich = tokenizer.decode(list(islice(corpus_ids(World.generate(7), tokenizer, "rich"), 3000)))
    assert rich.startswith(next(documents(World.generate(7))).text)


@pytest.fixture(scope="module")
def ids():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    return list(islice(corpus_ids(World.generate(7), tokenizer, "plain"), 5000)), tokenizer


def test_corpus_ids_are_the_documents_in_order(ids):
    tokens, tokenizer = ids
    first, second = islice(documents(World.generate(7), "train", plain=True), 2)
    expected = f"{first.text}<|endoftext|>{second.text}<|endoftext|>"
    assert tokenizer.decode(tokens).startswith(expected)


def test_blocks_overlap_by_one_token_and_skip_none(ids):
    blocks = list(cut_blocks(iter(ids[0]), 64, 40))
    assert all(len(block.ids) == 65 and all(block.mask) for block in blocks)
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(blocks))
    joined = [token for block in blocks for token in block.ids[:-1]]
    assert joined == ids[0][: 64 * 40]


def test_stages_follow_each_other_and_every_token_is_trained_once(ids):
    batcher = StagedBatcher(PLAIN, TINY, iter(ids[0]), pad_id=1)
    assert batcher.num_steps == 6
    shapes, targets = [], []
    for step in range(batcher.num_steps):
        [batch] = batcher.micro_batches(step)
        assert batch.num_supervised == TINY.step_tokens
        shapes.append(tuple(batch.ids_BT.shape))
        targets += batch.targets_BT.flatten().tolist()
    assert shapes == [(8, 64)] * 3 + [(4, 128)] * 3
    # The first token of each stage has no predictor.
    half = 3 * 512
    assert sorted(targets) == sorted(ids[0][1 : half + 1] + ids[0][half + 2 : 2 * half + 2])


def test_importing_the_lab_imports_no_torch():
    code = (
        "import sys, truetune.lab.building.pretrain, truetune.lab.evaluate, truetune.lab.measure;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_users_run_needs_nothing_of_what_made_the_base():
    code = (
        "import sys, truetune.lab.measure, truetune.lab.quickstart, truetune.lab.reasoning;"
        "from truetune.lab import evaluate; from truetune.lab.world import World;"
        "evaluate.held_out_documents(World.generate()); evaluate.cloze_items(World.generate());"
        "evaluate.unseen_questions(World.generate());"
        "assert not [name for name in sys.modules if name.startswith('truetune.lab.building')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
