"""Reasoning traces from rows to artifact: plain markers, native thinking, markers of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tiny_models import NUM_TOKENS, tiny_config, tiny_tokenizer, write_model
from tiny_runs import command, write_rows
from truetune.contract.contract import PromptContract
from truetune.exporting.merged import write_merged
from truetune.lab import base_path
from truetune.model.load import load_model

SHARED = Path(__file__).parents[2] / "shared"
MARKERS = ("<|think_start|>", "<|think_end|>")
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
    assert "keep 99 % of the rows whole" in shown.out
    lengths = json.loads((tmp_path / "run/data.json").read_text())["lengths"]
    assert lengths["limit"]["with_thoughts"] == lengths["examples"] == 104
    assert sum(part["rows"] for part in lengths["histogram"]) == 104
    report = json.loads((tmp_path / "run/new_tokens.json").read_text())
    assert [t["id"] for t in report["tokens"]] == [NUM_TOKENS, NUM_TOKENS + 1]
    assert all(c > 0 for changes in report["largest_change"].values() for c in changes)
    rows = [json.loads(line) for line in (tmp_path / "run/verify_rows.jsonl").open()]
    (ids, mask) = rows[0]["examples"][0]
    supervised = [i for i, on in zip(ids, mask, strict=True) if on]
    assert supervised[0] == NUM_TOKENS
    assert NUM_TOKENS + 1 in supervised


def gsm8k(folder: Path, count: int) -> list[dict[str, str]]:
    """The worked answer is the thinking, the number after #### the solution."""
    rows = []
    for line in list((SHARED / "data/gsm8k_train.jsonl").open(encoding="utf-8"))[:count]:
        row = json.loads(line)
        worked, _, number = row["answer"].partition("####")
        triplet = {"thinking": worked.strip(), "solution": number.strip()}
        rows.append({"problem": row["question"], **triplet})
    write_rows(folder / "gsm8k.jsonl", rows)
    return rows


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers and rows are not here")
@pytest.mark.slow
def test_gsm8k_on_a_template_with_native_thinking(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "qwen3-small"
    shutil.copytree(SHARED / "models/qwen3-0.6b", base, copy_function=shutil.copyfile)
    base.chmod(0o755)
    config = tiny_config(
        "qwen3", vocab_size=151_936, hidden_size=64, tie_word_embeddings=True,
        eos_token_id=151_645, max_position_embeddings=1024,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    rows = gsm8k(tmp_path, 300)
    shown = command(
        *("train", base, tmp_path / "gsm8k.jsonl", "--lora"),
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


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published rows are not here")
@pytest.mark.slow
@pytest.mark.usefixtures("verified_runs")
def test_gsm8k_on_the_embedded_base_with_markers_of_ones_own(tmp_path: Path) -> None:
    """The person who added think markers, trained LoRA on 800 rows and got no marker."""
    import torch

    gsm8k(tmp_path, 2400)
    shown = command(
        *("train", base_path(), tmp_path / "gsm8k.jsonl", "-o", tmp_path / "run"),
        *("--lora", "--lora-r", 32, "--lora-alpha", 64, "--lora-dropout", 0),
        *("--learning-rate", 2e-3, "--max-steps", 400, "--batch-size", 8, "--eval-steps", 400),
        *("--chat-template", "user-assistant-think", "--reasoning", "inline"),
        *("--think-markers", ",".join(MARKERS), "--add-token", MARKERS[0]),
        *("--add-token", MARKERS[1], "--max-length", 192, "--max-dropped", 0.99),
    )
    assert shown.code == 0, shown.err
    assert "verified by a fresh process: 4 checks passed" in shown.out
    report = json.loads((tmp_path / "run/new_tokens.json").read_text())
    assert all(c > 0.01 for changes in report["largest_change"].values() for c in changes)
    assert set(report["other_rows_identical"].values()) == {True}
    assert [(e["text"], e["asked"]) for e in report["written"]] == [(m, 8) for m in MARKERS]
    assert report["written"][0]["written"] == 8
    assert report["written"][1]["written"] >= 6

    # Merged, all rows but the new ones are those of the base, bit for bit.
    write_merged(tmp_path / "run/adapter", tmp_path / "merged")
    old, new = (
        load_model(folder, purpose="inference", device="cpu").model.get_input_embeddings().weight
        for folder in (base_path(), tmp_path / "merged")
    )
    added = [token["id"] for token in report["tokens"]]
    rest = [i for i in range(len(old)) if i not in added]
    assert torch.equal(old[rest], new[rest])
    assert (old[added] != new[added]).any(dim=1).all()
    (check,) = [
        c
        for c in json.loads((tmp_path / "run/verify.json").read_text())["checks"]
        if c["name"] == "logits"
    ]
    assert check["numbers"]["max_logprob_difference"] == 0
