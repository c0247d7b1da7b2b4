"""Where the time of a short run goes: start to first step, and last step to exit, stage by stage.

`python -m bench.stages` trains one step on eight rows, in a fresh process each: the embedded base
and a model of the shape of Qwen2.5-0.5B with random weights, LoRA and all weights, float32 and
bfloat16. It prints one table of processor seconds; each job that is done is a line of a file, so
that it goes on where it was stopped, and `--write` puts the table into docs/performance.md.
`--steps N` measures a longer run instead: the rows and settings of the quickstart, N steps.
`--refusals` measures how soon wrong command lines are refused instead; with `--write`, that table
is put into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.page import put

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


EIGHT_ROWS = {"max_steps": 1, "batch_size": 8}

# Before it is what a user waits for at the start, behind it what at the end.
STEP = "the step"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "truetune-stages"))
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--write", action="store_true", help="the table of docs/performance.md")
    parser.add_argument("--steps", type=int, default=0, help="of the quickstart; prints its table")
    parser.add_argument("--refusals", action="store_true", help="wrong command lines instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Path(args.work)
    if args.child:
        settings = {"model": args.child, "dtype": args.dtype, "lora": args.lora, **EIGHT_ROWS}
        settings["data"] = str(work / "rows.jsonl")
        _one(_quickstart(args.steps) if args.steps else settings, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if args.refusals:
        table = _refusals(work)
        print(table)
        if args.write:
            put(table, "<!-- made by bench/stages.py: refusals -->", "<!-- end of refusals -->")
        return
    results = work / "stages.jsonl"
    measured = _known(results)
    if args.steps:
        name = f"quickstart, {args.steps:,} steps"
        steps = ["--child", "quickstart", "--steps", str(args.steps), "--work", str(work)]
        measured[name] = _measured(name, steps)
        print(_table({name: measured[name]}))
        clock = {stage: seconds for stage, seconds, _ in measured[name]["marks"]}
        after = clock["end"] - clock["after the step"]
        print(
            f"\nBy the clock: {clock['end']:.0f} s, of which {clock[STEP]:.1f} before the first "
            f"step and {after:.1f} after the last one."
        )
        return
    for model, lora, dtype in itertools.product(
        ("5M", "0.5B"), (True, False), ("float32", "bfloat16")
    ):
        name = f"{model} {'LoRA' if lora else 'full fine-tuning'} {dtype}"
        if args.only not in name or name in measured:
            continue
        source = _source(model, work)
        if source is None:
            print(f"{name}: not measured, {CONFIG} is not there")
            continue
        command = ["--child", source, "--work", str(work), "--dtype", dtype]
        measured[name] = _measured(name, [*command, *(["--lora"] if lora else [])])
        with results.open("a") as file:
            file.write(json.dumps(measured[name]) + "\n")
        print(_table({name: measured[name]}), flush=True)
    table = _table(measured)
    print(table)
    if args.write:
        put(table, "<!-- made by bench/stages.py -->", "<!-- end of stages -->")


def _measured(name: str, options: list[str]) -> dict[str, Any]:
    """What one run in a fresh process says of its stages."""
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {
        "name": name,
        "marks": json.loads(done.stdout.splitlines()[-1]),
        "load": max(load, os.getloadavg()[0]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _known(results: Path) -> dict[str, dict[str, Any]]:
    """Jobs that were measured, by their names."""
    if not results.is_file():
        return {}
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return {each["name"]: each for each in found}


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


def _refusals(work: Path) -> str:
    """Seconds from a wrong command line to its refusal, each in a fresh process."""
    model, rows, run = _source("5M", work), work / "rows.jsonl", work / "refused"
    loop = work / "loop.jsonl"
    if not loop.is_symlink():
        loop.symlink_to(loop)
    (work / "taken").mkdir(exist_ok=True)
    (work / "taken" / "mine.txt").write_text("")
    (work / "axolotl.yaml").write_text("base_model: x\nadapter: lora\nmicro_batch_size: 2\n")
    usual = ["train", model, rows, "-o", run]
    cases: dict[str, list[object]] = {
        "a data file that does not exist": ["train", model, work / "row.jsonl", "-o", run],
        "a loop of symbolic links as data": ["train", model, loop, "-o", run],
        "a web address as data": ["train", model, "https://example.org/a.jsonl", "-o", run],
        "`-` as data": ["train", model, "-", "-o", run],
        "a tracker that is not installed": [*usual, "--report-to", "trackio"],
        "a device that does not exist": [*usual, "--device", "mps"],
        "an output that cannot be written": ["train", model, rows, "-o", "/proc/run"],
        "an output with files of others": ["train", model, rows, "-o", work / "taken"],
        "a learning rate of 5": [*usual, "--learning-rate", 5],
        "a recipe of Axolotl": ["train", work / "axolotl.yaml"],
        "a model folder that does not exist": ["train", work / "modle", rows, "-o", run],
    }
    lines = ["| wrong | error | CPU | wall clock |", "|---|---|---|---|"]
    for name, words in cases.items():
        before, began = os.times(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "truetune", *map(str, words)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        clock, after = time.perf_counter() - began, os.times()
        code = re.search(r"error\[([\w-]+)\]", done.stderr)
        if done.returncode != 2 or code is None or run.exists():
            sys.exit(f"{name} was not refused as it should be\n{done.stderr}")
        spent = after[2] + after[3] - before[2] - before[3]
        lines.append(f"| {name} | `{code[1]}` | {spent:.2f} | {clock:.2f} |")
    lines += ["", f"Seconds, one fresh process each. {time.strftime('%Y-%m-%d')}."]
    return "\n".join(lines)


def _quickstart(steps: int) -> dict[str, Any]:
    """Its settings, for so many steps."""
    from truetune.lab.quickstart import quickstart_recipe

    recipe = quickstart_recipe("")
    names = ("model", "data", "chat_template", "learning_rate", "batch_size", "seed")
    return {name: getattr(recipe, name) for name in names} | {"max_steps": steps}


def _one(settings: dict[str, Any], work: Path) -> None:
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
            # Between the first step and the last, prompts are answered at some evaluations.
            if marks[-1][0] != STEP:
                mark(name)

        def sample(self, *_: object) -> None:
            # The fixed prompts were answered before the first step; what comes next is the step.
            if all(name != STEP for name, *_ in marks):
                mark(STEP)

        def step(self, facts: Any, plan: Any) -> None:
            if facts.step >= plan.max_steps:
                mark("after the step")

    # Of its own: another job at the same time must not take it away.
    run = Path(tempfile.mkdtemp(dir=work)) / "run"
    settings |= {"output": str(run), "device": "cpu"}
    with contextlib.suppress(CheckFailed):  # what verification says is another table's matter
        train(make_recipe(("bench", settings)), Marks())
    mark("end")
    shutil.rmtree(run.parent)
    print(json.dumps(marks))


def _table(measured: dict[str, dict[str, Any]]) -> str:
    """Processor seconds of each stage, a line each; how long start and end are together."""
    stages: list[str] = []
    spent: dict[str, dict[str, float]] = {}
    for name, job in measured.items():
        own = spent[name] = {}
        for (stage, _, begin), (_, _, end) in itertools.pairwise(job["marks"]):
            # The fixed prompts are asked before the first step, and again after the last.
            stage = f"{stage} again" if STEP in own and stage in own else stage
            if stage not in stages:
                stages.append(stage)
            own[stage] = own.get(stage, 0.0) + end - begin
        names = list(own)
        at = names.index(STEP)
        own["start to first step"] = sum(own[stage] for stage in names[:at])
        own["last step to exit"] = sum(own[stage] for stage in names[at + 1 :])
    lines = [f"| stage | {' | '.join(measured)} |", f"|---|{'---|' * len(measured)}"]
    for stage in (*stages, "start to first step", "last step to exit"):
        cells = (f"{spent[n][stage]:.1f}" if stage in spent[n] else "" for n in measured)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    dates = sorted({job["date"] for job in measured.values()})
    loads = [job["load"] for job in measured.values()]
    lines += [
        "",
        f"CPU seconds, with child processes. Machine: {platform.machine()}, {os.cpu_count()} "
        f"cores, {os.environ.get('OMP_NUM_THREADS', 'all')} torch thread(s), load "
        f"{min(loads, default=0):.0f} to {max(loads, default=0):.0f} (a higher load makes "
        f"these numbers larger). {' to '.join(sorted({*dates[:1], *dates[-1:]}))}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
