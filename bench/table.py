"""What was measured, as a table: pure functions of the recorded runs.

A run is the JSON of one_side.py with its job, side and round, and what the job is (tokens,
supervised, operations); one that failed has `failed` instead, with the reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]

HEAD = (
    "| job | trainer | tokens/s | supervised/s | spread | peak MB | of peak rate "
    "| truetune's speed | truetune's memory | loss difference |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
WHOLE = "| whole training | trainer | seconds | truetune's speed |\n|---|---|---|---|"


def rate(run: Run, kind: str = "tokens") -> float:
    """Tokens a second over the measured steps."""
    return float(run[kind] / sum(run["seconds"]))


def limits(runs: Sequence[Run]) -> dict[tuple[str, int], list[float]]:
    """GFLOP/s of one large matrix product, as each run measured it, by type and threads."""
    found: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        if "failed" not in run:
            found.setdefault((run["dtype"], run["threads"]), []).append(run["matmul_gflops"])
    return found


def share(run: Run, limit: float) -> float:
    """Of the rate of a matrix product, what the counted products of a step take."""
    return float(run["operations"] / sum(run["seconds"])) / (1e9 * limit)


def loss_apart(run: Run, first: Run) -> float | None:
    """Largest relative difference of the first two steps' losses, as far as both have them; of the
    first alone where the learning rate warms up, which transformers begin with a step of 0."""
    steps = {"1"} if run.get("is_whole") else {"1", "2"}
    both = steps & set(run["losses"]) & set(first["losses"])
    pairs = [(run["losses"][step], first["losses"][step]) for step in both]
    return max((abs(one - other) / abs(other) for one, other in pairs), default=None)


def spread(values: Sequence[float]) -> str:
    """The largest over the smallest; nothing to say of a single one."""
    return f"{max(values) / min(values):.2f}" if len(values) > 1 else "one run"


def scientific(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def cells(runs: Sequence[Run], first: Sequence[Run], limit: float) -> list[str]:
    """A side's line; what compares it is left empty where the first side has no numbers."""
    rates = [rate(r) for r in runs]
    median, peak = statistics.median(rates), statistics.median(r["peak_mb"] for r in runs)
    own = [
        f"{median:,.1f}",
        f"{statistics.median(rate(r, 'supervised') for r in runs):,.1f}",
        spread(rates),
        f"{peak:,.0f}",
        f"{100 * statistics.median(share(r, limit) for r in runs):.0f} %",
    ]
    if not first:
        return [*own, "", "", ""]
    apart = [
        found
        for run, other in zip(runs, first, strict=False)
        if (found := loss_apart(run, other)) is not None
    ]
    return [
        *own,
        f"{statistics.median(map(rate, first)) / median:.2f}x",
        f"{statistics.median(r['peak_mb'] for r in first) / peak:.2f}",
        scientific(max(apart)) if apart and runs[0] is not first[0] else "",
    ]


def table(runs: Sequence[Run], jobs: Sequence[str], sides: Sequence[str]) -> str:
    """The table of peers, that of whole trainings, and how they were measured."""
    lines, whole = [HEAD], []
    # One for all sides: the machine's, of which a single run may have measured less.
    limit = {kind: statistics.median(found) for kind, found in limits(runs).items()}
    for job in jobs:
        of_job = [r for r in runs if r["job"] == job]
        done = {
            side: [r for r in of_job if r["side"] == side and "failed" not in r] for side in sides
        }
        first = done[sides[0]]
        for side in sides:
            made = done[side]
            failed = [r["failed"] for r in of_job if r["side"] == side and "failed" in r]
            if failed:
                lines.append(f"| {job} | {side} | {failed[0]} |" + " |" * 7)
            if not made:
                continue
            name = f"{side}, {made[0]['how']}" if made[0].get("how") else side
            of_kind = limit[made[0]["dtype"], made[0]["threads"]]
            lines.append(f"| {job} | {name} | {' | '.join(cells(made, first, of_kind))} |")
            if made[0].get("is_whole"):
                seconds = statistics.median(r["whole"] for r in made)
                own = statistics.median(r["whole"] for r in first) if first else 0.0
                ratio = f"{seconds / own:.2f}x" if own else ""
                whole.append(f"| {job} | {name} | {seconds:,.1f} | {ratio} |")
    if whole:
        lines += ["", WHOLE, *whole]
    return "\n".join([*lines, "", caption([r for r in runs if r["job"] in jobs])])


def caption(runs: Sequence[Run]) -> str:
    """Rounds, clock, threads, and the rate of a matrix product per type and threads."""
    done = [r for r in runs if "failed" not in r]
    if not done:
        return "Nothing was measured."
    single = ' (one for jobs whose spread is "one run")' * any(
        len({r["round"] for r in done if r["job"] == job}) == 1 for job in {r["job"] for r in done}
    )
    rounds = f"{len({r['round'] for r in done})}{single}"
    products = "; ".join(
        f"{dtype} on {threads} thread{'s' * (threads > 1)} {statistics.median(found):,.0f}"
        f" (spread {spread(found)})"
        for (dtype, threads), found in sorted(limits(done).items())
    )
    steps = ", ".join(
        f"{job} {count}" for job, count in sorted({(r["job"], len(r["seconds"])) for r in done})
    )
    clock = {"wall": "wall-clock times", "cpu": "processor times"}
    return (
        f"Rounds: {rounds}. Measured steps: {steps}. Times are "
        f"{' and '.join(clock[c] for c in sorted({r['settings']['clock'] for r in done}))}. "
        f"Machine: {', '.join(sorted({r['machine'] for r in done}))}. One large matrix product, "
        f"GFLOP/s, median: {products}."
    )
