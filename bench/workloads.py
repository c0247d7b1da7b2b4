"""What is trained in a benchmark: models of random weights, and rows as token ids with masks.

Every side gets the same ids, masks and order, so that only the training differs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
EMBEDDED = ROOT / "src" / "truetune" / "lab" / "base"
INSTRUCT = SHARED / "models" / "qwen2.5-0.5b-instruct"

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Job:
    """One training job.

    Attributes:
        model: folder; made by `make_model` where it is not the embedded base.
        lora: an adapter of rank 16 on all linear layers, dropout 0.05; else all weights.
        dtype: of the frozen weights and of the computation.
        rows_a_step: rows per optimiser step.
        rows: makes the first n rows.
    """

    model: str
    lora: bool
    dtype: str
    rows_a_step: int
    rows: Callable[[int], list[Row]]


def make_model(name: str, folder: Path) -> Path:
    """A folder with random weights in bfloat16 and the real tokenizer; made once."""
    if name == "embedded":
        return EMBEDDED
    path = folder / name
    if not (path / "model.safetensors").is_file():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(INSTRUCT)
        for key, value in SIZES[name].items():
            setattr(config, key, value)
        if "num_hidden_layers" in SIZES[name]:
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(INSTRUCT).save_pretrained(path)
    return path


# Changes to the Qwen2.5-0.5B config; "60m" and the one of six layers have a head of 32 k rows.
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {},
    "0.5b-6l": {"num_hidden_layers": 6, "vocab_size": 32000},
    "60m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
}


def _chats(name: str, n: int) -> list[list[dict[str, str]]]:
    if name == "alpaca":
        found = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text())[:n]
        return [
            [
                {
                    "role": "user",
                    "content": "\n".join(filter(None, (r["instruction"], r["input"]))),
                },
                {"role": "assistant", "content": r["output"]},
            ]
            for r in found
        ]
    lines = (SHARED / "data" / "gsm8k_train.jsonl").read_text().splitlines()
    solved = [json.loads(line) for line in lines[: n + 8]]
    shots = "\n\n".join(f"Q: {s['question']}\nA: {s['answer']}" for s in solved[:8])
    return [
        [
            {"role": "system", "content": f"Solve as in these examples.\n\n{shots}"},
            {"role": "user", "content": s["question"]},
            {"role": "assistant", "content": s["answer"]},
        ]
        for s in solved[8:]
    ]


def _encoded(folder: Path, chats: list[list[dict[str, str]]]) -> list[Row]:
    from truetune import PromptContract

    contract = PromptContract.load(str(folder))
    return [(list(e.ids), list(e.mask)) for chat in chats for e in contract.encode(chat)]


def alpaca(n: int) -> list[Row]:
    """Short prompts, answers of all lengths."""
    return _encoded(INSTRUCT, _chats("alpaca", n))


def alpaca_32k(n: int) -> list[Row]:
    """The same lengths with ids of a vocabulary of 32 k."""
    return [([i % 32000 for i in ids], mask) for ids, mask in alpaca(n)]


def gsm8k_8shot(n: int) -> list[Row]:
    """A long system prompt that all rows share."""
    return _encoded(INSTRUCT, _chats("gsm8k", n))


def reasoning_turns(n: int) -> list[Row]:
    """Conversations of six turns, each answered after 60 tokens of reasoning that the template
    strips from history: six rows a conversation, which begin alike."""
    chosen = random.Random(0)

    def text(length: int) -> list[int]:
        return [chosen.randrange(100, 30000) for _ in range(length)]

    rows: list[Row] = []
    while len(rows) < n:
        history = text(40)
        for _ in range(6):
            prompt, thought, answer = history + text(40), text(60), text(80)
            completion = [*thought, *answer]
            rows.append((prompt + completion, [0] * len(prompt) + [1] * len(completion)))
            history = prompt + answer
    return rows[:n]


def one_long_row(n: int) -> list[Row]:
    """One row of 2,048 tokens a step, half of them supervised."""
    text = (SHARED / "data" / "wikitext2_valid.txt").read_text()
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(INSTRUCT).encode(text[: n * 16000])
    return [(ids[2048 * i : 2048 * (i + 1)], [0] * 1024 + [1] * 1024) for i in range(n)]


def quickstart(n: int) -> list[Row]:
    """The rows of `truetune quickstart`, again and again."""
    from truetune import PromptContract

    contract = PromptContract.load(str(EMBEDDED), chat_template="chatml-lite")
    lines = (ROOT / "src/truetune/lab/instructions.jsonl").read_text().splitlines()
    rows = [
        (list(e.ids), list(e.mask))
        for line in lines
        for e in contract.encode(json.loads(line)["messages"])
    ]
    random.Random(0).shuffle(rows)
    return (rows * (n // len(rows) + 1))[:n]


JOBS: dict[str, Job] = {
    "alpaca-0.5b-lora": Job("0.5b", True, "bfloat16", 8, alpaca),
    "gsm8k-8shot-0.5b-lora": Job("0.5b", True, "bfloat16", 4, gsm8k_8shot),
    "reasoning-0.5b-lora": Job("0.5b", True, "bfloat16", 6, reasoning_turns),
    "long-row-0.5b-lora": Job("0.5b", True, "bfloat16", 1, one_long_row),
    "alpaca-60m-lora": Job("60m", True, "bfloat16", 8, alpaca_32k),
    "alpaca-60m-full": Job("60m", False, "float32", 8, alpaca_32k),
    "quickstart-5m-full": Job("embedded", False, "float32", 16, quickstart),
}
