"""The two cases of a widely used notebook, end to end, on a small model of Qwen2.5's architecture
with its own tokenizer: LoRA, and LoRA on a base in 4 bits. Train on Alpaca rows in the
Instruction/Response form, save, reload on the (4-bit) base, generate with sampling, merge.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tiny_models import tiny_config
from tiny_runs import command
from truetune.contract.contract import PromptContract
from truetune.generate import Sampling, replies
from truetune.model.load import load_model

SHARED = Path(__file__).parents[2] / "shared"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SHARED.is_dir(), reason="the published tokenizers and rows are not here"
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 2 layers, the whole vocabulary, tied."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("notebook") / "qwen2.5-small"
    shutil.copytree(SHARED / "models/qwen2.5-0.5b-base", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = tiny_config(
        "qwen2", vocab_size=151_936, hidden_size=128, intermediate_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        eos_token_id=151_643, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("verified_runs")
@pytest.mark.parametrize("method", ["--lora", "--qlora"])
def test_train_save_reload_generate_merge(base: Path, tmp_path: Path, method: str) -> None:
    if method == "--qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the bitsandbytes extra is missing")
    run, merged = tmp_path / "run", tmp_path / "merged"
    shown = command(
        *("train", base, SHARED / "data/alpaca_en_demo.json", method, "-o", run),
        *("--chat-template", "instruction-response", "--max-train-samples", 400),
        *("--target-modules", "q_proj,v_proj", "--lora-r", 16, "--lora-alpha", 32),
        *("--lora-dropout", 0.05, "--learning-rate", 2e-4, "--lr-scheduler-type", "cosine"),
        # Short rows: what costs is 152 k logits a position. Those left out are counted.
        *("--warmup-ratio", 0.03, "--max-length", 128, "--max-dropped", 0.9),
        *("--max-steps", 12, "--batch-size", 8, "--eval-steps", 6, "--bad-rows", "drop"),
    )
    assert shown.code == 0, shown.err
    assert "verified by a fresh process: 4 checks passed" in shown.out
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    losses = [
        line["eval_loss"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in line
    ]
    assert losses[-1] < losses[0]

    loaded = load_model(run / "adapter", purpose="inference", device="cpu")
    assert loaded.quantised == ("4bit" if method == "--qlora" else None)
    contract = PromptContract.load(loaded.tokenizer)
    sampling = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9, top_k=50, seed=1)
    question = [{"role": "user", "content": "Describe a river."}]
    first, again = (replies(loaded, contract, [question], sampling)[0] for _ in range(2))
    assert first.ids == again.ids
    assert len(first.ids) == 8 or first.stopped

    shown = command("export", run, "--merge", "-o", merged)
    assert shown.code == 0, shown.err
    verdict = json.loads((merged / "verify.json").read_text())
    (check,) = [c for c in verdict["checks"] if c["name"] == "merge"]
    # Merged and saved in float32, as the base lies: onto the rounded weights under QLoRA.
    assert check["numbers"]["max_difference"] < 1e-4
    plain = load_model(merged, purpose="inference", device="cpu")
    assert not plain.is_adapter
    assert plain.model.get_output_embeddings().weight is plain.model.get_input_embeddings().weight
