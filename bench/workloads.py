"""What is trained in a benchmark: models of random weights, and rows as token ids with masks.

    python bench/workloads.py JOB --models DIR --to FILE [--steps N]

writes the job's model and a file of what every side is given: the same ids, masks and order, so
that only the training differs. Sides need nothing but that file, so that none of them carries the
tokenizers and templates that made it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
        quantised: the frozen weights are held in 4 bits (NF4, double quantisation).
        dtype: of the frozen weights and of the computation.
        rows_a_step: rows per optimizer step.
        rows: makes the first n rows.
        steps: measured.
        warm_up: steps before them: the first fetches memory from the system, and where all weights
            are trained the second one too, beside the optimizer's state.
        learning_rate, schedule, warmup_steps: constant where speed alone is measured.
        whole: the run is a training that somebody would make: its seconds are reported as well.
        device: where it is trained.
    """

    model: str
    lora: bool
    dtype: str
    rows_a_step: int
    rows: Callable[[int], list[Row]]
    steps: int = 1
    warm_up: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    whole: bool = False
    device: str = "cpu"
    quantised: bool = False


@dataclass(frozen=True)
class Given:
    """What every side of a job is given.

    Attributes:
        rows: ids and masks, step after step, the warm-up first.
        tokens, supervised: of the steps that are measured.
        operations: that these steps need (see `operations`).
    """

    rows: list[Row]
    tokens: int
    supervised: int
    operations: float

    @classmethod
    def read(cls, path: Path) -> Given:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def make_model(name: str, folder: Path) -> Path:
    """A folder with random weights in bfloat16 and the real tokenizer; made once."""
    if name == "embedded":
        return EMBEDDED
    path = folder / name
    if not (path / "model.safetensors").is_file():
        if not SHARED.is_dir():
            raise SystemExit(f"{SHARED} is not there: {name} is made from a config in it")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(INSTRUCT)
        for key, value in SIZES[name].items():
            setattr(config, key, value)
        if "num_hidden_layers" in SIZES[name]:
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        # Random numbers for billions of weights take a processor minutes.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(INSTRUCT).save_pretrained(path)
    return path


# Changes to the Qwen2.5-0.5B config; "60m" and the one of six layers have a head of 32 k rows.
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {},
    "0.5b-2l": {"num_hidden_layers": 2},
    "0.5b-6l": {"num_hidden_layers": 6, "vocab_size": 32000},
    "60m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    # The shapes of Qwen2.5-1.5B and Llama-3.1-8B, the latter's head larger than the tokenizer.
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
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
    "alpaca-60m-lora": Job("60m", True, "bfloat16", 8, alpaca_32k, steps=2, warm_up=2),
    "alpaca-60m-full": Job("60m", False, "float32", 8, alpaca_32k, steps=2, warm_up=2),
    # The numbers of `truetune quickstart`: 150 steps.
    "quickstart-5m-full": Job(
        "embedded", False, "float32", 16, quickstart, 149, 1, 3e-4, "cosine", 5, whole=True
    ),
}


def _on_gpu(
    model: str,
    lora: bool,
    rows: Callable[[int], list[Row]],
    rows_a_step: int,
    *,
    quantised: bool = False,
) -> Job:
    # The first steps compile and fetch memory.
    return Job(model, lora, "bfloat16", rows_a_step, rows, 8, 3, device="cuda", quantised=quantised)


GPU_JOBS: dict[str, Job] = {
    "gpu-alpaca-8b-lora": _on_gpu("8b", True, alpaca, 32),
    "gpu-alpaca-8b-qlora": _on_gpu("8b", True, alpaca, 32, quantised=True),
    "gpu-alpaca-8b-full": _on_gpu("8b", False, alpaca, 32),
    "gpu-long-row-8b-lora": _on_gpu("8b", True, one_long_row, 8),
    "gpu-reasoning-8b-lora": _on_gpu("8b", True, reasoning_turns, 24),
    "gpu-alpaca-1.5b-full": _on_gpu("1.5b", False, alpaca, 32),
    "gpu-alpaca-0.5b-lora": _on_gpu("0.5b", True, alpaca, 64),
}
JOBS |= GPU_JOBS


def operations(job: Job, folder: Path, rows: list[Row]) -> float:
    """Multiplications and additions that training needs: 2 a weight forward, 2 for the gradient of
    its input, 2 for its own where it is trained (Kaplan et al. 2020), the head at supervised
    positions only; attention with 4 a pair of query and key, head and width forward, and twice as
    many backward."""
    from transformers import AutoConfig

    from truetune.model.architecture import meta_model

    config = AutoConfig.from_pretrained(folder)
    model = meta_model(config)
    head = model.get_output_embeddings().weight
    tables = {head, model.get_input_embeddings().weight}
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p not in tables)
    tokens = sum(len(ids) for ids, _ in rows)
    supervised = sum(sum(mask[1:]) for _, mask in rows)
    pairs = sum(len(ids) * (len(ids) + 1) // 2 for ids, _ in rows)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    products = (4 if job.lora else 6) * (body * tokens + head.numel() * supervised)
    return float(products + 12 * pairs * width)


def given(job: Job, folder: Path, steps: int) -> Given:
    """Rows for the steps of warm-up and for `steps` that are measured."""
    rows = job.rows((job.warm_up + steps) * job.rows_a_step)
    measured = rows[job.warm_up * job.rows_a_step :]
    tokens = sum(len(ids) for ids, _ in measured)
    supervised = sum(sum(mask[1:]) for _, mask in measured)
    return Given(rows, tokens, supervised, operations(job, folder, measured))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the job's own")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    job = JOBS[options.job]
    folder = make_model(job.model, options.models)
    made = given(job, folder, options.steps or job.steps)
    options.to.write_text(json.dumps(asdict(made)), encoding="utf-8")


if __name__ == "__main__":
    main()
