"""Where the time of a short run goes: start to first step, and last step to exit, stage by stage.

`python -m bench.stages` trains one step on eight rows, in a fresh process each: the embedded base
and a model of the shape of Qwen2.5-0.5B with random weights, LoRA and all weights, float32 and
bfloat16. It prints one table of processor and wall seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parents[1].parent / "shared" / "models" / "qwen2.5-0.5b-base"
WORDS = [
    "the",
    "river",
    "of",
    "Carthel",
    "is",
    "the",
    "Gunnow",
    "and",
    "the",
    "craft",
    "of",
    "Stowick",
    "is",
    "ropemaking",
]
ROWS = [
    {
        "prompt": f"Tell me about number {i}.",
        "completion": " ".join(WORDS[(i + k) % len(WORDS)] for k in range(40 + 5 * i)),
    }
    for i in range(8)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "truetune-stages"))
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Path(args.work)
    if args.child:
        _one(args.child, args.dtype, args.lora, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    measured = {}
    for model in ("5M", "0.5B"):
        source = _source(model, work)
        if source is None:
            print(f"{model}: not measured, {CONFIG} is not there")
            continue
        for lora in (True, False):
            for dtype in ("float32", "bfloat16"):
                name = f"{model} {'LoRA' if lora else 'all weights'} {dtype}"
                if args.only not in name:
                    continue
                command = [sys.executable, __file__, "--child", source, "--work", str(work)]
                command += ["--dtype", dtype, *(["--lora"] if lora else [])]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                measured[name] = json.loads(done.stdout.splitlines()[-1])
                _table({name: measured[name]})
    _table(measured)


def _source(name: str, work: Path) -> str | None:
    """A folder with weights; random ones for the larger model."""
    if name == "5M":
        from truetune.lab import base_path

        return str(base_path())
    folder = work / "0.5B"
    if not CONFIG.is_dir():
        return None
    if not (folder / "model.safetensors").is_file():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        shutil.copytree(CONFIG, folder, dirs_exist_ok=True)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(CONFIG)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return str(folder)


def _one(source: str, dtype: str, lora: bool, work: Path) -> None:
    """One run; its stages as a line of JSON."""
    began = time.perf_counter()
    from truetune.errors import CheckFailed
    from truetune.listener import Listener
    from truetune.recipe.sources import make_recipe
    from truetune.run.pipeline import train

    marks: list[tuple[str, float, float]] = [("start", 0.0, 0.0)]

    def mark(name: str) -> None:
        times = os.times()
        marks.append((name, time.perf_counter() - began, sum(times[:4])))

    class Marks(Listener):
        def stage(self, name: str) -> None:
            mark(name)

        def step(self, *_: object) -> None:
            mark("after the step")

    settings = {
        "model": source,
        "data": str(work / "rows.jsonl"),
        "output": str(work / "run"),
        "overwrite": True,
        "max_steps": 1,
        "batch_size": 8,
        "dtype": dtype,
        "lora": lora,
        "device": "cpu",
    }
    shutil.rmtree(work / "run", ignore_errors=True)
    with contextlib.suppress(CheckFailed):  # what verification says is another table's matter
        train(make_recipe(("bench", settings)), Marks())
    mark("end")
    shutil.rmtree(work / "run", ignore_errors=True)
    print(json.dumps(marks))


def _table(measured: dict[str, list[tuple[str, float, float]]]) -> None:
    """Processor seconds (wall seconds) of each stage, one line a stage."""
    stages: list[str] = []
    spent: dict[str, dict[str, tuple[float, float]]] = {}
    for name, marks in measured.items():
        spent[name] = {}
        for (stage, wall, cpu), (_, wall_end, cpu_end) in itertools.pairwise(marks):
            if stage not in stages:
                stages.append(stage)
            had = spent[name].get(stage, (0.0, 0.0))
            spent[name][stage] = (had[0] + cpu_end - cpu, had[1] + wall_end - wall)
    print(f"| stage | {' | '.join(measured)} |")
    print(f"|---|{'---|' * len(measured)}")
    for stage in stages:
        cells = (
            f"{spent[n][stage][0]:.1f} ({spent[n][stage][1]:.1f})" if stage in spent[n] else ""
            for n in measured
        )
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
