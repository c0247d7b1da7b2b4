"""Reasoning traces from rows to artifact: plain markers, native thinking, markers of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tiny_models import NUM_TOKENS, tiny_config, tiny_tokenizer, write_model
from tiny_runs import command, write_rows
from truetune.contract import PromptContract
from truetune.model import load_model

SHARED = Path(__file__).parents[2] / "shared"
OWN = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<|think_start|>{{ m.reasoning_content }}<|think_end|>{% endif %}"
    "{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def triplets(count: int) -> list[dict[str, str]]:
    return [
        {"problem": f"{i}+2?", "thinking": f"{i} and 2 more.", "solution": f"{i + 2}."}
        for i in range(count)
    ]


def test_markers_of_ones_own(tmp_path: Path) -> None:
    write_model(tmp_path / "base", tokenizer=tiny_tokenizer(None), tie_word_embeddings=True)
    (tmp_path / "own.jinja").write_text(OWN)
    shown = command(
        *("train", tmp_path / "base", write_rows(tmp_path / "rows.jsonl", triplets(110)), "--lora"),
        *("--chat-template", tmp_path / "own.jinja", "-o", tmp_path / "run", "--max-steps", 3),
        *("--add-token", "<|think_start|>", "--add-token", "<|think_end|>", "--eval-steps", 3),
    )
    assert shown.code == 0, shown.err
    report = json.loads((tmp_path / "run/new_tokens.json").read_text())
    assert [t["id"] for t in report["tokens"]] == [NUM_TOKENS, NUM_TOKENS + 1]
    assert all(c > 0 for changes in report["largest_change"].values() for c in changes)
    rows = [json.loads(line) for line in (tmp_path / "run/verify_rows.jsonl").open()]
    (ids, mask) = rows[0]["examples"][0]
    supervised = [i for i, on in zip(ids, mask, strict=True) if on]
    assert supervised[0] == NUM_TOKENS
    assert NUM_TOKENS + 1 in supervised


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers and rows are not here")
@pytest.mark.slow
def test_gsm8k_on_a_template_with_native_thinking(tmp_path: Path) -> None:
    """The worked answer is the thinking, the number after #### the solution."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "qwen3-small"
    shutil.copytree(SHARED / "models/qwen3-0.6b", base, copy_function=shutil.copyfile)
    base.chmod(0o755)
    config = tiny_config(
        "qwen3", vocab_size=151_936, hidden_size=64, tie_word_embeddings=True,
        eos_token_id=151_645, max_position_embeddings=1024,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    rows = []
    for line in list((SHARED / "data/gsm8k_train.jsonl").open(encoding="utf-8"))[:300]:
        row = json.loads(line)
        worked, _, number = row["answer"].partition("####")
        triplet = {"thinking": worked.strip(), "solution": number.strip()}
        rows.append({"problem": row["question"], **triplet})
    shown = command(
        *("train", base, write_rows(tmp_path / "gsm8k.jsonl", rows), "--lora"),
        *("-o", tmp_path / "run", "--max-steps", 2, "--batch-size", 4, "--eval-steps", 2),
    )
    assert shown.code == 0, shown.err
    contract = PromptContract.load(tmp_path / "run/adapter")
    (example,) = contract.encode(
        [
            {"role": "user", "content": rows[0]["problem"]},
            {
                "role": "assistant",
                "content": rows[0]["solution"],
                "reasoning_content": rows[0]["thinking"],
            },
        ]
    )
    text = contract.tokens.decode([i for i, on in zip(*example, strict=True) if on])
    assert rows[0]["thinking"] in text
    assert "</think>" in text
    assert text.endswith(f"{rows[0]['solution']}<|im_end|>")
    load_model(tmp_path / "run/adapter", purpose="inference")
