"""Run an experiment: train and measure its arms seed by seed, judge them, and keep the result as
JSON."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from truetune import __version__
from truetune.errors import InputError
from truetune.lab.bench import Bench
from truetune.lab.experiment import Column, Estimate, Experiment, estimate, verdict
from truetune.run_dir import write_json
from truetune.system.lazy import torch

# Replies of each arm that a result keeps to be read.
_SAMPLES = 2


def run(
    experiment: Experiment,
    folder: Path | str,
    seeds: Sequence[int],
    *,
    quick: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and measure every arm of every seed, and judge.

    Args:
        folder: of the trained arms, which other experiments use again.
        seeds: of row choice, row order and drawing.
        quick: the arms that decide alone, on a quarter of the rows a step; bounds are as declared.

    Returns:
        what `write` keeps.
    """
    from truetune.lab.asked import ask, questions

    stage, bench, began = on_stage or (lambda _: None), Bench(folder, quick=quick), _seconds()
    arms = experiment.quick_arms if quick else experiment.arms
    todo = [(arm, seed) for seed in seeds for arm in arms(seed)]

    def counted(place: int) -> Callable[[str], None]:
        return lambda text: stage(f"{place} of {len(todo)}: {text}")

    sheets: dict[str, dict[str, list[Column]]] = {}
    samples: dict[str, list[dict[str, str]]] = {}
    for place, (arm, seed) in enumerate(todo, 1):
        bench.on_stage = counted(place)
        tuned = bench.tuned(arm, seed)
        bench.on_stage(f"measuring {arm.name}, seed {seed}")
        for name, column in experiment.measure(tuned).items():
            sheets.setdefault(arm.name, {}).setdefault(name, []).append(column)
        if arm.name not in samples:
            samples[arm.name] = ask(tuned, questions()[:_SAMPLES]).samples()
    judged = [expectation.judged(sheets) for expectation in experiment.expectations]
    return {
        "name": experiment.name,
        "number": experiment.number,
        "declared": experiment.declaration(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "seeds": list(seeds),
        "quick": quick,
        "trained": bench.trained,
        "processor_seconds": round(_seconds() - began),
        "arms": [
            {
                "name": name,
                "measures": {
                    measure: _kept(estimate(columns))
                    for measure, columns in found.items()
                    if all(math.isfinite(c.value) for c in columns)
                },
                "samples": samples[name],
            }
            for name, found in sheets.items()
        ],
        "expectations": [
            {"label": e.label, "bound": e.bound, **_kept(found), "held": held}
            for e, (found, held) in zip(experiment.expectations, judged, strict=True)
        ],
        "verdict": verdict([held for _, held in judged]),
    }


def _seconds() -> float:
    """Of the processor, in this process and in those that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _kept(found: Estimate) -> dict[str, Any]:
    """An estimate with the digits that mean something."""
    return {
        name: value
        if isinstance(value, str)
        else [round(v, 4) for v in value]
        if isinstance(value, tuple)
        else round(value, 4)
        for name, value in asdict(found).items()
    }


def write(result: Mapping[str, Any], folder: Path | str) -> Path:
    """Keep a result as NAME.json of a folder."""
    path = Path(folder) / f"{result['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(result))
    return path


def read(folder: Path | str) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their claims.

    Raises:
        InputError: a file is not a result.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["arms"], result["number"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not the result of an experiment",
                where=str(path),
                why=f"it lacks {error}" if isinstance(error, KeyError) else str(error),
                fix="choose another folder, or remove the file and run its experiment again",
                code="lab-result-unreadable",
            ) from error
        found.append(result)
    return sorted(found, key=lambda result: int(result["number"]))


def machine() -> str:
    """Where an experiment ran, in words."""
    number = torch.get_num_threads()
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{number} thread{'s' if number > 1 else ''}, torch {torch.__version__}"
    )


def commit() -> str:
    """Of the checkout that truetune was imported from; its version where it is none."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10"]
        found = subprocess.run(
            [*asked, "--dirty", "--exclude=*"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return found.stdout.strip() if found.returncode == 0 else __version__
