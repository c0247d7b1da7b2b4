"""Sides of a benchmark in turn, each run in a process of its own; prints and writes one table.

    python bench/compare.py [JOB ...] [--sides truetune,trl] [--rounds 2] [--write]

A round runs every side once (A B A B). Medians over rounds are compared with those of the first
side; spread is the largest over the smallest. Seconds on a shared machine mean nothing, ratios
within one table do.

Every run is a line of results.jsonl in the models' folder: started again, it goes on where it was
stopped, and jobs may be run in pieces; `--fresh` measures anew. `--write` puts all that is there
into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads import JOBS, SHARED

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- made by make bench -->", "<!-- end -->"
DEFAULT = ("truetune", "truetune-padded", "trl", "trl-kept", "trl-packed", "trainer")

Result = dict[str, Any]
RESULTS = "results.jsonl"


def run(side: str, job: str, given: argparse.Namespace) -> Result | str:
    """What one run measured, or the last line of why it failed."""
    command = [sys.executable, str(HERE / "one_side.py"), side, job, "--models", str(given.models)]
    command += ["--warm-up", str(given.warm_up), "--steps", str(given.steps)]
    command += ["--clock", given.clock]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def recorded(given: argparse.Namespace) -> dict[tuple[str, str, int], Result]:
    """Runs with these settings that were made before, by job, side and round."""
    path = given.models / RESULTS
    if not path.is_file():
        return {}
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    settings = [given.warm_up, given.steps, given.clock]
    return {(r["job"], r["side"], r["round"]): r for r in made if r["settings"] == settings}


def record(given: argparse.Namespace, number: int, result: Result) -> None:
    settings = [given.warm_up, given.steps, given.clock]
    line = json.dumps({**result, "round": number, "settings": settings})
    with open(given.models / RESULTS, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def rate(result: Result, kind: str = "tokens") -> float:
    """Tokens a second over the measured steps."""
    return float(result[kind] / sum(result["seconds"]))


def share(result: Result) -> float:
    """Of the measured rate of a matrix product, what the counted products of a step take."""
    done = float(result["operations"] / sum(result["seconds"]))
    return done / (1e9 * float(result["matmul_gflops"]))


def row(results: Sequence[Result], first: Sequence[Result]) -> list[str]:
    rates = [rate(r) for r in results]
    median = statistics.median(rates)
    own = statistics.median(rate(r) for r in first)
    peak, first_peak = (statistics.median(r["peak_mb"] for r in rs) for rs in (results, first))
    return [
        f"{median:,.1f}",
        f"{statistics.median(rate(r, 'supervised') for r in results):,.1f}",
        f"{max(rates) / min(rates):.2f}",
        f"{peak:,.0f}",
        f"{100 * statistics.median(map(share, results)):.0f} %",
        f"{own / median:.2f}x",
        f"{first_peak / peak:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=list(JOBS), metavar="JOB")
    parser.add_argument("--sides", default=",".join(DEFAULT))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("/tmp/truetune-bench"))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    given = parser.parse_args()
    given.models.mkdir(parents=True, exist_ok=True)
    sides = given.sides.split(",")
    if not SHARED.is_dir():
        sys.stderr.write(f"{SHARED} is not there: only the embedded base is measured\n")
        given.jobs = [name for name in given.jobs if JOBS[name].model == "embedded"]
    lines = [
        "| job | side | tokens/s | supervised/s | spread | peak MB | of the limit | truetune is "
        "| its memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    limits: list[float] = []
    before = {} if given.fresh else recorded(given)
    # What was measured in other pieces stays in the table.
    there = {job for job, _, _ in before}
    jobs = [job for job in JOBS if job in given.jobs or (given.write and job in there)]
    for job in jobs:
        found: dict[str, list[Result]] = {side: [] for side in sides}
        failed: dict[str, str] = {}
        for number in range(given.rounds):
            for side in sides:
                if side in failed:
                    continue
                result: Result | str | None = before.get((job, side, number))
                if result is None and job in given.jobs:
                    result = run(side, job, given)
                    sys.stderr.write(f"{job} {side} {result}\n")
                    if not isinstance(result, str):
                        record(given, number, result)
                if isinstance(result, str):
                    failed[side] = result
                elif result is not None:
                    found[side].append(result)
                    limits.append(result["matmul_gflops"])
        for side in sides:
            if not found[side] and side not in failed:
                continue
            cells = [failed[side]] if side in failed else row(found[side], found[sides[0]])
            lines.append(f"| {job} | {side} | {' | '.join(cells)} |")
    threads = statistics.median(limits)
    lines += [
        "",
        f"At most {given.rounds} rounds in turn of {given.steps} steps after {given.warm_up} of "
        "warm-up, "
        f"{given.clock} seconds; {platform.processor() or platform.machine()}; median matrix "
        f"product {threads:,.0f} GFLOP/s.",
    ]
    table = "\n".join(lines)
    sys.stdout.write(table + "\n")
    if given.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
