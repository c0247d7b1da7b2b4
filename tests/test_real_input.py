"""The main job on real rows: a random model with a real tokenizer and template, through the
command line's own pipeline. Slow: about a quarter of an hour on two quiet cores.

Run with `scripts/test -m slow tests/test_real_input.py -s` to see the numbers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from truetune.contract.contract import PromptContract
from truetune.generate import Sampling, replies
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.recipe.sources import make_recipe
from truetune.run.pipeline import RunResult, train
from truetune.run.prepare import prepare

SHARED = Path(__file__).parents[2] / "shared"
TOKENIZER = SHARED / "models" / "qwen2.5-0.5b-instruct"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TOKENIZER.is_dir(), reason="the real tokenizers and rows are not beside the checkout"
    ),
]


def random_model(folder: Path, width: int) -> Path:
    """Four random layers under the real Qwen2.5-instruct tokenizer, template and stop set."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(TOKENIZER)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 4, width, 2 * width
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.layer_types = config.layer_types[:4]
    config.dtype = torch.float32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "qwen", 128)


def run(model: Path, data: Path, output: Path, **settings: object) -> RunResult:
    recipe = make_recipe(
        ("test", {"model": str(model), "data": str(data), "output": str(output), **settings})
    )
    return train(recipe)


def unigram_entropy(model: Path, data: Path, **settings: object) -> float:
    """Nats per token of the answers' own unigram distribution: what a model that has learned
    nothing but token frequencies would reach."""
    recipe = make_recipe(("test", {"model": str(model), "data": str(data), **settings}))
    prepared = prepare(recipe, Listener())
    counts: Counter[int] = Counter()
    for ids, mask in [*prepared.examples, *prepared.eval_examples]:
        counts.update(i for i, supervised in zip(ids, mask, strict=True) if supervised)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


@pytest.mark.parametrize(
    ("data", "width", "settings"),
    # Alpaca's short answers of many subjects need all of their rows, and a wider model at a gentler
    # rate; GSM8K's are of one kind.
    [
        (
            "gsm8k_train.jsonl",
            128,
            {"max_train_samples": 500, "batch_size": 16, "epochs": 2, "learning_rate": 3e-3},
        ),
        (
            "alpaca_en_demo.json",
            256,
            {"batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "weight_decay": 0.1},
        ),
    ],
    ids=["math-word-problems", "instructions"],
)
def test_full_weights_learn_more_than_token_frequencies(
    tmp_path: Path, data: str, width: int, settings: dict[str, float]
) -> None:
    model = random_model(tmp_path / "qwen", width)
    rows = SHARED / "data" / data
    settings = {"max_length": 512, "max_dropped": 0.2, **settings}
    entropy = unigram_entropy(model, rows, **settings)
    result = run(model, rows, tmp_path / "run", **settings, eval_steps=1000, save_steps=1000)
    print(f"\n{data}: held-out loss {result.eval_loss:.3f}, unigram entropy {entropy:.3f} nats")
    assert result.eval_loss is not None
    assert result.eval_loss < entropy
    assert complete(result)


@pytest.mark.parametrize("data", ["gsm8k_train.jsonl", "alpaca_en_demo.json"])
def test_lora_runs_and_its_adapter_opens(model_folder: Path, tmp_path: Path, data: str) -> None:
    from peft import AutoPeftModelForCausalLM

    result = run(
        model_folder, SHARED / "data" / data, tmp_path / "run", max_train_samples=500,
        max_length=512, max_dropped=0.2, lora=True, max_steps=12, eval_steps=1000,
    )  # fmt: skip
    print(f"\n{data}, LoRA: loss {result.train_loss:.3f}, held-out {result.eval_loss:.3f}")
    opened = AutoPeftModelForCausalLM.from_pretrained(result.artifact)
    assert any("lora" in name for name, _ in opened.named_parameters())
    assert complete(result)


def test_eight_rows_are_learned_by_heart_and_end(model_folder: Path, tmp_path: Path) -> None:
    lines = (SHARED / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in sorted(lines[:500], key=len)[:8]]
    data = tmp_path / "eight.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(
        model_folder, data, tmp_path / "run",
        learning_rate=3e-3, max_steps=120, batch_size=8, save_steps=1000,
    )  # fmt: skip
    model = load_model(result.artifact, purpose="inference")
    contract = PromptContract.load(result.artifact)
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    answers = replies(model, contract, chats, Sampling(max_new_tokens=400))
    print(f"\neight rows: loss {result.train_loss:.4f}")
    assert result.train_loss < 0.05
    assert [a.text for a in answers] == [row["answer"] for row in rows]
    assert all(a.stopped for a in answers)


def complete(result: RunResult) -> bool:
    names = {path.name for path in result.run.path.iterdir()}
    return names >= {
        "recipe.yaml", "contract.json", "data.json", "env.json", "metrics.jsonl",
        "findings.jsonl", "samples.jsonl", "manifest.json", result.artifact.name,
    }  # fmt: skip
