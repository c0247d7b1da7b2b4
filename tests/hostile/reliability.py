"""What truetune promises when something goes wrong, tried: `make reliability`.

    python tests/hostile/reliability.py [--points N] [--only WORD ...] [--results FILE] [--write]

--points N      kills per phase (default 50); a fifth as many of every other trial
--only WORD     only rows of the table that begin with it
--results FILE  keep what was tried; rows in it that were tried as often are not tried again;
                with --only, the others of it stand in the table as well
--write         write the table into docs/reliability.md
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hostile")]

from trials import (  # noqa: E402
    DAMAGES,
    PHASES,
    Tally,
    Trials,
    at_once,
    damaged,
    exports_at_once,
    full_disk,
    little_memory,
    may_mount,
    other_clock,
    read_only,
)

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SAME = "continues and reaches the same losses, samples and weights, bit for bit"
# What happens, what is promised, and one trial after the other.
Row = tuple[str, str, Iterable[Callable[[], str]]]


def rows(trials: Trials, points: int) -> Iterator[Row]:
    counts = trials.counts()
    few = -(-points // 5)

    def signals(phase: str, number: int, times: int) -> Iterator[Callable[[], str]]:
        name = signal.Signals(number).name
        for point in trials.points(phase, counts[phase], times, name):
            yield lambda p=point: trials.signalled(phase, p, number)

    for phase in PHASES:
        where = "at any moment" if phase == "anywhere" else f"during {phase}"
        yield f"SIGKILL {where}", f"the run {SAME}", signals(phase, signal.SIGKILL, points)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            what = f"{signal.Signals(number).name} {where}"
            promised = f"exit code {128 + number}; the run {SAME}"
            yield what, promised, signals(phase, number, few)
    one = "one finishes, the other exits with 2 and changes nothing"
    for kind, what in (
        ("start", "two starts in one folder at once"),
        ("resume", "two `--resume` of one run at once"),
        ("resume beside", "`--resume` while the run is active"),
        ("overwrite beside", "`--overwrite` of an active run"),
    ):
        delays = [0.0 if i % 2 else trials.seconds * i / few for i in range(few)]
        yield what, one, [lambda k=kind, d=d: at_once(trials, k, d) for d in delays]
    yield (
        "two exports into one folder at once",
        "one model is complete, the other export exits with 2",
        [lambda d=d: exports_at_once(trials, d) for d in [0.05 * i for i in range(few)]],
    )
    if may_mount():
        sizes = [1 << 12, *(20_000 + i * 600_000 // few for i in range(few))]
        yield (
            "a disk that is full after 4 kB to 620 kB",
            f"an error says so; with free space again, the run {SAME}",
            [lambda s=size: full_disk(trials, s) for size in sizes],
        )
        yield (
            "a file system that becomes read-only",
            f"an error says so, also for `--resume`; once it is writable again, the run {SAME}",
            [lambda s=step: read_only(trials, s) for step in range(1, 1 + min(few, 6))],
        )
    sizes = [i * 120 // few for i in range(few)]
    yield (
        "0 to 120 MB of memory left",
        "an error without a traceback (or the process ends, if a C++ library ends it); with "
        f"memory again, the run {SAME}",
        [lambda s=size: little_memory(trials, s) for size in sizes],
    )
    jumps = [-86400.0 * 400, -3600.0, 3600.0, 86400.0 * 4000]
    yield (
        "a clock that is set back or forward, and SIGKILL",
        f"the run {SAME}",
        [lambda j=jump: other_clock(trials, j) for jump in jumps[: max(1, few)]],
    )
    yield (
        "a file of a checkpoint changed, truncated, emptied, removed, swapped or added",
        f"a warning, and from the previous checkpoint the run {SAME}; if none is intact, exit "
        "code 1 and nothing changes",
        damages(trials, points),
    )


def damages(trials: Trials, points: int) -> Iterator[Callable[[], str]]:
    """All files, all damages; of few points, one in so many."""
    killed = trials.killed_run(5)
    before = trials.start
    trials.start = lambda run: [*before(run), "--seed", "7"]  # type: ignore[method-assign]
    other = trials.killed_run(5)
    trials.start = before  # type: ignore[method-assign]
    files = sorted(p.name for p in (killed / "checkpoints" / "step-00000004").iterdir())
    every = [(file, how, both) for both in (False, True) for file in files for how in DAMAGES]
    for file, how, both in every[:: max(1, 50 // points)]:
        yield lambda f=file, h=how, b=both: damaged(trials, killed, other, f, h, b)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    kept = arguments.results
    known = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    shown: list[tuple[str, str, Tally]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for what, promised, trial in rows(Trials(Path(folder)), arguments.points):
            before = known.get(what, {"tried": 0, "ends": {}, "lost": [], "points": 0})
            tally = Tally(before["tried"], Counter(before["ends"]), before["lost"])
            wanted = not arguments.only or any(what.startswith(word) for word in arguments.only)
            if wanted and before["points"] < arguments.points:
                tally = Tally()
                for one in trial:
                    tally.count(one())
                    keep(kept, what, tally, points=0)
                keep(kept, what, tally, arguments.points)
            if not tally.tried:
                continue
            shown.append((what, promised, tally))
            print(line(what, promised, tally), flush=True)
    lost = [f"{what}: {words}" for what, _, tally in shown for words in tally.lost]
    tried = sum(tally.tried for *_, tally in shown)
    print(f"\n{tried} trials, {len(lost)} lost, {time.monotonic() - began:.0f} s")
    print("\n".join(lost))
    if arguments.write:
        write(shown, tried, len(lost))
    return 1 if lost else 0


def keep(kept: Path | None, what: str, tally: Tally, points: int) -> None:
    """Put a row among what was tried; another process may have tried others meanwhile."""
    if kept:
        there = json.loads(kept.read_text()) if kept.is_file() else {}
        there[what] = {**vars(tally), "points": points}
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(there, indent=1))
        written.replace(kept)


# The page's words for phases; the kept counts use the names of the phases.
WORDED = {
    "during reading rows": "while rows are read",
    "during first step": "during the first step",
    "during step": "during a step",
    "during evaluation": "during an evaluation",
    "during checkpoint": "while a checkpoint is saved",
    "during artifact": "while the artifact is saved",
    "during verify": "during verification",
}


def line(what: str, promised: str, tally: Tally) -> str:
    name, _, phase = what.partition(" ")
    what = f"{name} {WORDED.get(phase, phase)}"
    ends = "; ".join(
        f"{count} times: {said}" if "," in said else f"{count} {said}"
        for said, count in sorted(tally.ends.items(), key=lambda end: -end[1])
    )
    return f"| {what} | {promised} | {tally.tried} | {len(tally.lost)} | {ends} |"


def write(shown: list[tuple[str, str, Tally]], tried: int, lost: int) -> None:
    """The table, in its place on the page."""
    table = [
        "| what happens | what is promised | tried | lost | how it ended |",
        "|---|---|---|---|---|",
        *(line(*row) for row in shown),
        f"| all | | {tried:,} | {lost:,} | |",
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join([before + BEGIN, *table, END + after])
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
