"""The shipped base: whole, small, loadable, and (slow) as knowing as its card says."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from truetune import ChatTemplate, SFTTrainer
from truetune.contract.contract import PromptContract
from truetune.lab import BASE_SEED, base_path
from truetune.lab.bench import Arm, Tuned
from truetune.lab.building.card import card, checksums
from truetune.lab.building.pretrain import Settings
from truetune.lab.evaluate import (
    cloze_items,
    cloze_recall,
    held_out_documents,
    load_instructions,
    unseen_questions,
)
from truetune.lab.measure import measure
from truetune.lab.quickstart import score
from truetune.lab.world import World
from truetune.model.load import load_model


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path())


def load():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)


def test_checksums_hold():
    assert (base_path() / "SHA256SUMS").read_text() == checksums(base_path())


def test_weights_are_bf16_and_small():
    from safetensors import safe_open

    path = base_path() / "model.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert "lm_head.weight" not in tensors  # tied


def test_shape_suits_quantisers_and_servers(tokenizer):
    config = json.loads((base_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["max_position_embeddings"] >= 1024
    assert (config["vocab_size"], len(tokenizer)) == (2048, 2032)
    assert config["tie_word_embeddings"] is True
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 1)


def test_generation_config_is_greedy_and_stops_at_end_of_text():
    config = json.loads((base_path() / "generation_config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 1)
    assert config.get("do_sample", False) is False


def test_no_code_and_no_machine_path_ships():
    for path in base_path().iterdir():
        assert path.suffix in {".json", ".jsonl", ".md", ".safetensors", ""}, path
        if path.suffix != ".safetensors":
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), path


def test_it_loads_and_knows_a_few_facts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
    items = cloze_items(World.generate(BASE_SEED))[:1700:40]
    loaded = load_model(base_path(), device="cpu", dtype="float32", purpose="inference")
    assert cloze_recall(loaded, items).share >= 0.9


def test_the_default_settings_made_it():
    settings = json.loads(json.dumps(asdict(Settings(compile=True))))
    assert json.loads((base_path() / "pretraining.json").read_text()) == settings
    lines = (base_path() / "training_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [course["corpus"] for course in settings["courses"]] == list(
        dict.fromkeys(line["corpus"] for line in log)
    )
    assert log[-1]["tokens"] == Settings().tokens
    assert all(a["tokens"] < b["tokens"] for a, b in pairwise(log))


@pytest.mark.slow
def test_recall_on_held_out_wordings():
    found = measure(base_path())
    assert found.recall["plain"].share >= 0.9
    # Not of the corpus's kind: 78.2 % and 62.1 % (docs/log.md).
    assert found.recall["development"].share >= 0.75
    assert found.recall["blind"].share >= 0.6
    assert found.prose_loss < 1.5
    right, total = found.sums["sums of numbers up to 9"]
    assert right >= 0.9 * total
    # The card was written from these counts.
    assert (base_path() / "README.md").read_text() == card(base_path(), found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_instructions_bring_out_facts_never_asked_for(tokenizer, seed):
    model = load()
    examples = [ChatTemplate.render_with_mask(m, tokenizer) for m in load_instructions()]
    trainer = SFTTrainer(
        model,
        examples=examples,
        max_seq_len=64,
        pad_id=tokenizer.pad_token_id,
        batch_size=16,
        max_steps=150,
        max_lr=3e-4,
        warmup_steps=10,
        seed=seed,
    )
    trainer.train()
    world = World.generate(BASE_SEED)
    contract = PromptContract.load(tokenizer, "chatml-lite")
    questions = unseen_questions(world, 100, seed=seed)
    opened = load_model(base_path(), device="cpu", dtype="float32", purpose="inference")
    loaded = replace(opened, model=model.eval())
    tuned = Tuned(Arm("by hand"), seed, loaded, contract, (), base_path())
    found = score(tuned, questions, held_out_documents(world, 1))
    assert found.finished >= 99
    assert found.correct >= 95
