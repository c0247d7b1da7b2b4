"""Sides of a benchmark in turn, each run in a process of its own; prints and writes one table.

    python bench/compare.py [JOB ...] [--gpu] [--sides truetune,trl] [--rounds 2] [--write]

A round runs every side of every job once, so that whatever is there when it is stopped is a whole
table; medians over rounds are compared with truetune's. Seconds on a shared machine mean nothing,
ratios within one table do.

Every run is a line of results.jsonl in the models' folder, a failed one too: started again, it goes
on where it was stopped, and jobs may be run in pieces. What was measured of other code, or with
other settings, does not count; `--fresh` forgets the rest as well. `--write` puts all that is there
into docs/performance.md, after each job.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from one_side import SIDES
from page import put
from table import Run, table
from workloads import GPU_JOBS, JOBS, ROOT, SHARED

HERE = Path(__file__).parent
BEGIN, END = "<!-- made by make bench -->", "<!-- end -->"
GPU_BEGIN = "<!-- made by python bench/compare.py --gpu -->"
DEFAULT = ("truetune", "trl", "trl-kept", "trl-packed", "trainer", "litgpt")
ON_GPU = ("truetune", "trl", "trl-kept", "trl-packed", "trl-liger", "unsloth", "axolotl")
RESULTS = "results.jsonl"
# Those that want other versions than the rest: `make bench` and `make bench-gpu` install them.
INTERPRETERS = {
    side: ROOT / f".venv-{side}" / "bin" / "python" for side in ("litgpt", "unsloth", "axolotl")
}
# Left to the system, of what is free, before a side is told that it does not fit.
SPARE_MB = 512


def code() -> str:
    """A digest of what is measured and of what measures."""
    digest = hashlib.sha256()
    rooms = (ROOT / "src" / "truetune" / name for name in ("compute", "engine", "model"))
    files = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    for path in (*files, HERE / "one_side.py", HERE / "workloads.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def settings_of(job: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a run must have been made with, to be counted with others."""
    return {
        "steps": options.steps or JOBS[job].steps,
        "clock": options.clock,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "code": code(),
    }


def recorded(path: Path) -> list[Run]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_mb() -> int:
    """Of the machine; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] - SPARE_MB if found else 0


def cell(text: str) -> str:
    """The last line of an error for a cell of a table: short, and nothing in it is markup."""
    line = (text.strip().splitlines() or ["no message"])[-1]
    line = line if len(line) <= 120 else line[:119] + "…"
    return re.sub(r"([\\`*_{}\[\]<>|~])", r"\\\1", line)


def reason(status: int, stderr: str, memory_mb: int) -> str:
    """Why a side has no numbers."""
    if status == -9:
        return f"does not fit in {memory_mb / 1000:.0f} GB: killed by the system"
    if status < 0:
        return f"died of signal {-status}"
    return cell(stderr)


def run(side: str, job: str, file: Path, options: argparse.Namespace) -> Run:
    """What one run measured, or why it has nothing."""
    memory_mb = free_mb()
    command = [str(INTERPRETERS.get(side, sys.executable)), str(HERE / "one_side.py"), side, job]
    command += ["--given", str(file), "--models", str(options.models), "--clock", options.clock]
    command += ["--memory-mb", str(memory_mb)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * options.limit,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {options.limit:g} minutes"}
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        return {"failed": reason(done.returncode, done.stderr, memory_mb)}
    result: Run = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def prepare(job: str, options: argparse.Namespace) -> Path:
    """The job's model, and the file of what every side is given."""
    file = Path(options.models / f"{job}.json")
    command = [sys.executable, str(HERE / "workloads.py"), job, "--models", str(options.models)]
    command += ["--to", str(file)]
    command += ["--steps", str(options.steps or JOBS[job].steps)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return file


class Bench:
    """Runs that are there, and those that are still to be made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = options.results or options.models / RESULTS
        self.runs = [] if options.fresh else self._of_these_settings()
        self._files: dict[str, Path] = {}

    def _of_these_settings(self) -> list[Run]:
        wanted = {job: settings_of(job, self.options) for job in JOBS}
        return [
            r
            for r in recorded(self.path)
            if r["settings"] == wanted.get(r["job"]) and r["round"] < self.options.rounds
        ]

    def open(self, job: str, side: str, number: int) -> bool:
        """Whether a run is still to be made: a side that failed is not tried again."""
        same = [r for r in self.runs if (r["job"], r["side"]) == (job, side)]
        return not any("failed" in r or r["round"] == number for r in same)

    def make(self, job: str, side: str, number: int) -> None:
        interpreter = INTERPRETERS.get(side)
        facts = {"job": job, "side": side, "round": number, "machine": machine(JOBS[job].device)}
        facts["settings"] = settings_of(job, self.options)
        if interpreter and not interpreter.is_file():
            # Not recorded: it may be installed by the next time.
            self.runs.append({**facts, "failed": "not installed"})
            return
        if job not in self._files:
            self._files[job] = prepare(job, self.options)
        given = json.loads(self._files[job].read_text(encoding="utf-8"))
        facts |= {key: given[key] for key in ("tokens", "supervised", "operations")}
        facts["is_whole"] = JOBS[job].whole
        started = time.monotonic()
        self.record({**run(side, job, self._files[job], self.options), **facts})
        made = self.runs[-1]
        told = made.get("failed") or f"{made['tokens'] / sum(made['seconds']):,.1f} tokens/s"
        sys.stderr.write(
            f"round {number + 1}  {job}  {side}: {told} ({time.monotonic() - started:.0f} s)\n"
        )

    def record(self, made: Run) -> None:
        self.runs.append(made)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")

    def table(self) -> str:
        """Of all that is there: what was measured in other pieces stays in it."""
        runs = [r for r in self.runs if (r["job"] in GPU_JOBS) == self.options.gpu]
        there = {r["job"] for r in runs}
        sides = [*dict.fromkeys((*DEFAULT, *(r["side"] for r in runs)))]
        made = table(runs, [job for job in JOBS if job in there], sides)
        if not SHARED.is_dir():
            made += " Only the embedded base: the real rows of the other jobs were not there."
        return made

    def write(self) -> None:
        if self.options.write:
            put(self.table(), GPU_BEGIN if self.options.gpu else BEGIN, END)


def machine(device: str) -> str:
    """Architecture, cores and memory; the name of the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{platform.machine()}, {os.cpu_count()} cores, {pages / 1e9:.0f} GB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--gpu", action="store_true", help="the jobs that need a GPU")
    parser.add_argument("--sides", type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="measured, instead of each job's own")
    parser.add_argument("--limit", type=float, default=15, help="minutes that a run may take")
    parser.add_argument("--models", type=Path, default=Path("/tmp/truetune-bench"))
    parser.add_argument("--results", type=Path, help=f"in place of {RESULTS} beside the models")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    options = parser.parse_args()
    options.sides = options.sides or list(ON_GPU if options.gpu else DEFAULT)
    unknown = set(options.jobs) - set(JOBS)
    if unknown:
        parser.error(f"no job {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    unknown = set(options.sides) - set(SIDES)
    if unknown:
        parser.error(f"no side {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    if options.gpu or any(JOBS[job].device != "cpu" for job in options.jobs):
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device")
    options.models.mkdir(parents=True, exist_ok=True)
    jobs = options.jobs or [job for job in JOBS if (job in GPU_JOBS) == options.gpu]
    if not SHARED.is_dir():
        sys.stderr.write(f"{SHARED} is not there: only the embedded base is measured\n")
        jobs = [name for name in jobs if JOBS[name].model == "embedded"]
    bench = Bench(options)
    for number in range(options.rounds):
        for job in jobs:
            for side in options.sides:
                # LitGPT's recipe trains adapters alone.
                if side == "litgpt" and not JOBS[job].lora:
                    continue
                if bench.open(job, side, number):
                    bench.make(job, side, number)
            bench.write()
    sys.stdout.write(bench.table() + "\n")


if __name__ == "__main__":
    main()
