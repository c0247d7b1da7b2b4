"""Rows per second from file to examples: truetune with its proof, and TRL's preparation.

    python bench/encoding.py MODEL ROWS.jsonl [--rounds 3]

MODEL is a folder with a tokenizer and a chat template, ROWS has `question` and `answer` (GSM8K).
The two run in turn (A B A B), each in a process of its own; imports and the tokenizer are loaded
before the clock starts, caches are off. TRL prepares conversations with `dataset_num_proc=2`, and
trains on every token of them, or on the completion alone when the rows are given as prompt and
completion: both are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("truetune", "trl messages", "trl prompt-completion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(_SIDES[asked.side](asked.model, asked.rows)))
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        rows = _conversations(Path(asked.rows), Path(folder))
        for number in range(asked.rounds):
            for side in SIDES:
                made = _run(side, asked.model, rows[side])
                if made is None:
                    print(f"{side}: does not run here (pip install trl)")
                    continue
                results[side].append(made)
                print(
                    f"round {number + 1}  {side:22} {made['rows'] / made['seconds']:8,.0f} rows/s"
                )
    print()
    ours = _median(results["truetune"])
    for side, runs in results.items():
        if runs:
            speeds = sorted(run["rows"] / run["seconds"] for run in runs)
            print(
                f"{side:22} median {_median(runs):8,.0f} rows/s "
                f"({speeds[0]:,.0f} to {speeds[-1]:,.0f}), truetune is {ours / _median(runs):.2f}x"
            )


def _median(runs: list[dict[str, float]]) -> float:
    return statistics.median(run["rows"] / run["seconds"] for run in runs)


def _conversations(source: Path, folder: Path) -> dict[str, str]:
    """The rows as conversations, in the two forms."""
    asked = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    turns = [
        ({"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]})
        for r in asked
    ]
    whole = [{"messages": list(pair)} for pair in turns]
    parts = [{"prompt": [user], "completion": [said]} for user, said in turns]
    written = {}
    for name, rows in (("messages", whole), ("parts", parts)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        written[name] = str(path)
    return dict(
        zip(SIDES, (written["messages"], written["messages"], written["parts"]), strict=True)
    )


def _run(side: str, model: str, rows: str) -> dict[str, float] | None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    words = [sys.executable, __file__, model, rows, "--side", side]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        if "No module named 'trl'" not in done.stderr:
            sys.stderr.write(done.stderr)
        return None
    made: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return made


def _truetune(model: str, rows: str) -> dict[str, float]:
    from truetune import PromptContract
    from truetune.contract.encode import Encoded
    from truetune.data.load import load

    contract = PromptContract.load(model)
    contract.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    start = time.perf_counter()
    results = contract.encode_all(load(rows).conversations)
    seconds = time.perf_counter() - start
    assert all(isinstance(result, Encoded) for result in results)
    return {"rows": len(results), "seconds": seconds}


def _trl(model: str, rows: str) -> dict[str, float]:
    import datasets
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tiny = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    few = datasets.load_dataset("json", data_files=rows, split="train[:4]")
    with tempfile.TemporaryDirectory() as folder:
        args: Any = SFTConfig(
            output_dir=folder, dataset_num_proc=2, max_length=None, report_to=[], use_cpu=True
        )
        trainer = SFTTrainer(tiny, args=args, train_dataset=few, processing_class=tokenizer)
        start = time.perf_counter()
        whole = datasets.load_dataset("json", data_files=rows, split="train")
        prepared = trainer._prepare_dataset(whole, tokenizer, args, False, None, "train")
        seconds = time.perf_counter() - start
    return {"rows": len(prepared), "seconds": seconds}


_SIDES = {"truetune": _truetune, "trl messages": _trl, "trl prompt-completion": _trl}

if __name__ == "__main__":
    main()
