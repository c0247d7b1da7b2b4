"""Rows per second from file to examples, and what one long conversation costs.

    python bench/encoding.py MODEL ROWS.jsonl [--rounds 3]
    python bench/encoding.py MODEL --turns 200 [--rounds 3] [--write]

MODEL is a folder with a tokenizer and a chat template, ROWS has `question` and `answer` (GSM8K).
truetune, with its proof, and TRL's preparation run in turn (A B A B), each in a process of its own;
imports and the tokenizer are loaded before the clock starts, caches are off. TRL prepares
conversations with `dataset_num_proc=2`, and trains on every token of them, or on the completion
alone when the rows are given as prompt and completion: both are measured.

With `--turns` one conversation of so many answers is fitted and encoded, in a fresh process each
round, and one of half as many questions that are answered behind a call and its result: seconds of
processor time, those of the process that renders templates included, and wall-clock time.
`--write` puts the lines of MODEL (several may be named) into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page import put

SIDES = ("truetune", "trl messages", "trl prompt-completion")
LONG = ("answers", "calls")
BEGIN, END = "<!-- made by bench/encoding.py -->", "<!-- end of encoding -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="+", help="with --turns several, else one and ROWS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--side", choices=(*SIDES, *LONG), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side in LONG:
        print(json.dumps(_long(asked.model[0], asked.side, asked.turns)))
        return
    if asked.turns:
        _long_rows(asked.model, asked.turns, asked.rounds, asked.write)
        return
    if len(asked.model) != 2:
        parser.error("name one MODEL and ROWS, or give --turns")
    asked.model, asked.rows = asked.model
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


def _run(side: str, *words: str) -> dict[str, float] | None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, __file__, *words, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
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


# ------------------------------------------------------------------ one long conversation


def _long_rows(models: list[str], turns: int, rounds: int, write: bool) -> None:
    made: dict[tuple[str, str], list[dict[str, float]]] = {}
    load = [os.getloadavg()[0]]
    for _ in range(rounds):
        for model in models:
            for kind in LONG:
                found = _run(kind, model, "--turns", str(turns))
                if found is not None:
                    made.setdefault((model, kind), []).append(found)
    load.append(os.getloadavg()[0])
    steps = ("fit", "encode", "encode alone")
    heads = [f"{step}, {unit}" for step in steps for unit in ("CPU", "wall clock")]
    lines = [f"| model | row | tokens | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for (model, kind), runs in made.items():
        cells = [f"{_middle(runs, head):.2f}" for head in heads]
        what = (
            f"{turns} answers" if kind == "answers" else f"{turns // 2} questions, calls, results"
        )
        tokens = f"{runs[0]['tokens']:,.0f}"
        lines.append(f"| {Path(model).name} | {what} | {tokens} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Seconds, median of {rounds} fresh processes; two cores, load {load[0]:.0f} to "
        f"{load[1]:.0f} (a higher load lengthens wall-clock times, and CPU times a "
        f"little). {datetime.date.today()}.",
    ]
    text = "\n".join(lines)
    print(text)
    if write:
        put(text, BEGIN, END)


def _middle(runs: list[dict[str, float]], head: str) -> float:
    return statistics.median(run[head] for run in runs)


def _long(model: str, kind: str, turns: int) -> dict[str, float]:
    import psutil

    from truetune import PromptContract

    rows = _talk(turns) if kind == "answers" else _asked(turns // 2)
    tools = None if kind == "answers" else [_TOOL]
    made: dict[str, float] = {}
    small = rows[:4]

    def timed(step: str, work: Callable[[], Any]) -> Any:
        own = psutil.Process()

        def spent() -> float:
            both = [own, *own.children(recursive=True)]
            return sum(sum(p.cpu_times()[:2]) for p in both)

        before, start = spent(), time.perf_counter()
        result = work()
        made[f"{step}, wall clock"] = time.perf_counter() - start
        made[f"{step}, CPU"] = spent() - before
        return result

    contract = PromptContract.load(model)
    contract.fit([small], tools).encode(small, tools)
    fitted = timed("fit", lambda: contract.fit([rows], tools))
    encoded = timed("encode", lambda: fitted.encode(rows, tools))
    fresh = PromptContract.load(model, template_kwargs=fitted.template_kwargs)
    fresh.encode(small, tools)
    timed("encode alone", lambda: fresh.encode(rows, tools))
    made["tokens"] = sum(len(example.ids) for example in encoded)
    return made


_TOOL = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "How much of an article is there.",
        "parameters": {"type": "object", "properties": {"article": {"type": "string"}}},
    },
}


def _talk(turns: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in range(turns):
        rows.append({"role": "user", "content": f"How many boxes are on shelf {n}, and of what?"})
        said = f"Shelf {n} has {n * 7 % 40} boxes. They hold nails, sorted by length."
        rows.append({"role": "assistant", "content": said})
    return rows


def _asked(rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in range(rounds):
        call = {"name": "stock", "arguments": {"article": f"nails of {n} mm"}}
        calls = [{"id": f"call{n:05d}", "type": "function", "function": call}]
        rows.append({"role": "user", "content": f"Are there nails of {n} mm?"})
        rows.append({"role": "assistant", "content": "", "tool_calls": calls})
        rows.append({"role": "tool", "name": "stock", "content": f'{{"boxes": {n * 7 % 40}}}'})
        rows.append({"role": "assistant", "content": f"There are {n * 7 % 40} boxes of them."})
    return rows


_SIDES = {"truetune": _truetune, "trl messages": _trl, "trl prompt-completion": _trl}

if __name__ == "__main__":
    main()
