"""What truetune promises when something goes wrong, tried: `python tests/hostile/reliability.py`.

--points N      kills per phase and signal (default: 50)
--write         write the table into docs/reliability.md
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hostile")]

from trials import (  # noqa: E402
    PHASES,
    Tally,
    Trials,
    at_once,
    full_disk,
    little_memory,
    may_mount,
    other_clock,
    problem_of,
    read_only,
)

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TERMINATING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GOES_ON = "goes on to the same losses, samples and weights, bit for bit"


def rows(trials: Trials, points: int) -> Iterator[tuple[str, str, Tally]]:
    """What is done, what is promised, and what came of it."""
    counts = trials.counts()
    for number in (signal.SIGKILL, *TERMINATING):
        for phase in PHASES:
            tally = Tally()
            for point in range(points):
                call = 1 + point * max(1, counts[phase] - 1) // points
                _count(tally, killed(trials, phase, call, number))
            saved = "" if number == signal.SIGKILL else f"exit code {128 + number}; "
            yield f"{signal.Signals(number).name} during {phase}", saved + GOES_ON, tally
    few = max(1, points // 5)
    for kind, what in (
        ("start", "two runs started at once in one folder"),
        ("resume", "two `--resume` of one run at once"),
        ("resume beside", "`--resume` beside a working run"),
        ("overwrite beside", "`--overwrite` of a working run"),
    ):
        tally = _tally(lambda _, k=kind: at_once(trials, k), range(few))
        yield what, "one runs to its end, the other exits 2 and changes nothing", tally
    if may_mount():
        sizes = [1 << 12, *(point * 400_000 // few + 20_000 for point in range(few))]
        yield (
            "a disk that is full after 4 kB to 400 kB",
            f"the error says so; with room again the run {GOES_ON}",
            _tally(lambda size: full_disk(trials, size), sizes),
        )
        yield (
            "a file system that becomes read-only",
            f"the error says so, also on `--resume`; afterwards the run {GOES_ON}",
            _tally(lambda step: read_only(trials, step), range(1, 1 + min(few, 6))),
        )
    sizes = [point * 40 // few for point in range(few)]
    yield (
        "0 to 40 MB of memory left",
        f"an error, no traceback; with memory the run {GOES_ON}",
        _tally(lambda size: little_memory(trials, size), sizes),
    )
    jumps = [-86400.0 * 400, -3600.0, 3600.0, 86400.0 * 4000][: max(1, few)]
    yield (
        "a clock that is set back or ahead",
        f"the run {GOES_ON}",
        _tally(lambda jump: other_clock(trials, jump), jumps),
    )


def killed(trials: Trials, phase: str, call: int, number: int) -> str:
    """How a run ended and went on that got a signal at a call of a phase."""
    run, shown = trials.ended_at(phase, call, number)
    if number == signal.SIGKILL:
        if shown.status not in (-number, 0):
            return f"LOST: {phase} {call}: exit {shown.status}: {shown.err[:300]}"
    else:
        if problem := problem_of(shown):
            return f"{problem} ({phase} {call})"
        if shown.status not in (128 + number, 0):
            return f"LOST: {phase} {call}: exit {shown.status}: {shown.err[:300]}"
        if (run / "run.lock").exists():
            return f"LOST: {phase} {call}: the lock was left behind"
        if shown.status == 0 and not (run / "manifest.json").is_file():
            return f"LOST: {phase} {call}: exit 0 without an end"
    said = trials.go_on(run)
    return f"{said} ({phase} {call})" if said.startswith("LOST") else said


def _tally(trial: Callable[[float], str], values: object) -> Tally:
    tally = Tally()
    for value in values:  # type: ignore[attr-defined]
        _count(tally, trial(value))
    return tally


def _count(tally: Tally, said: str) -> None:
    tally.tried += 1
    if said.startswith("LOST"):
        tally.lost.append(said.removeprefix("LOST: "))
    else:
        tally.ends[said] += 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    table = ["| what happens | what is promised | tried | lost | how it ended |", "|" + "---|" * 5]
    lost: list[str] = []
    began = time.monotonic()
    print("\n".join(table), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for what, promised, tally in rows(Trials(Path(folder)), arguments.points):
            ends = ", ".join(f"{count} {said}" for said, count in tally.ends.most_common())
            table.append(f"| {what} | {promised} | {tally.tried} | {len(tally.lost)} | {ends} |")
            lost += [f"{what}: {said}" for said in tally.lost]
            print(table[-1], flush=True)
    print(f"\n{time.monotonic() - began:.0f} s; lost: {len(lost)}")
    print("\n".join(lost))
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text("\n".join([before + BEGIN, *table, END + after]), encoding="utf-8")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
