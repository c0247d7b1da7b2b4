"""Run an experiment: train and measure its arms seed by seed, judge them, and keep the result as
JSON."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from truetune import __version__
from truetune.errors import InputError
from truetune.lab.bench import Bench, digest, seconds
from truetune.lab.experiment import Column, Estimate, Experiment, Held, estimate, verdict
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

    stage, bench, began = on_stage or (lambda _: None), Bench(folder, quick=quick), seconds()
    arms = experiment.quick_arms if quick else experiment.arms
    todo = [(arm, seed) for seed in seeds for arm in arms(seed)]

    def counted(place: int) -> Callable[[str], None]:
        return lambda text: stage(f"{place} of {len(todo)}: {text}")

    sheets: dict[str, dict[str, list[Column]]] = {}
    samples: dict[str, list[dict[str, str]]] = {}
    digests: dict[str, list[str]] = {}
    for place, (arm, seed) in enumerate(todo, 1):
        bench.on_stage = counted(place)
        tuned = bench.tuned(arm, seed)
        digests.setdefault(arm.name, []).append(digest(arm))
        bench.on_stage(f"measuring {arm.name}, seed {seed}")
        for name, column in experiment.measure(tuned).items():
            # As it is kept, so that whoever reads the result computes the same.
            kept = Column.read(column.text(), column.unit)
            sheets.setdefault(arm.name, {}).setdefault(name, []).append(kept)
        if arm.name not in samples:
            samples[arm.name] = ask(tuned, questions()[:_SAMPLES]).samples()
    judged = [expectation.judged(sheets) for expectation in experiment.expectations]
    spent = seconds() - began
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
        "processor_seconds": round(spent),
        "fresh_seconds": _fresh(spent - bench.spent, list(bench.used.values())),
        "arms": [
            {
                "name": name,
                "settings": digests[name],
                "measures": {
                    measure: {**_kept(estimate(columns)), "items": [c.text() for c in columns]}
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
        "verdict": verdict(experiment.expectations, [held for _, held in judged]),
    }


def _fresh(measuring: float, trained: Sequence[float | None]) -> int | None:
    """What the run takes in an empty folder; None where an arm's training was not timed."""
    times = [spent for spent in trained if spent is not None]
    return round(measuring + sum(times)) if len(times) == len(trained) else None


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


def contradictions(result: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Where a result says something else than its declaration and its own numbers: it was edited,
    or its experiment was changed after the run. Everything is computed again from the items of each
    arm; of a result that keeps none, what follows from its intervals.

    Args:
        experiment: as it is declared now.
    """
    wrong = []
    if result["declared"] != json.loads(json.dumps(experiment.declaration())):
        wrong.append("it was declared otherwise")
    stored = {arm["name"]: arm for arm in result["arms"]}
    sheets: dict[str, dict[str, list[Column]]] = {}
    for name, arm in stored.items():
        for measure, found in arm["measures"].items():
            if "items" not in found:
                continue
            columns = [Column.read(text, found["unit"]) for text in found["items"]]
            sheets.setdefault(name, {})[measure] = columns
            told = {key: value for key, value in found.items() if key != "items"}
            if len(columns) != len(result["seeds"]) or told != _kept(estimate(columns)):
                wrong.append(f"{measure} of {name} is not what its items give")
    wrong += _other_arms(result, experiment, stored)
    held: list[Held] = []
    for one, told in zip(experiment.expectations, result["expectations"], strict=False):
        judged = {key: told[key] for key in ("value", "low", "high", "seeds", "unit", "held")}
        if all(one.measure in sheets.get(arm, {}) for arm in (one.arm, one.than or one.arm)):
            found, holds = one.judged(sheets)
            again = {**_kept(found), "held": holds}
        else:
            again = {**judged, "held": one.held(told["low"], told["high"], told["seeds"])}
        if (told["label"], told["bound"], judged) != (one.label, one.bound, again):
            wrong.append(f"{one.label!r} is not judged by its numbers")
        held.append(again["held"])
    if len(held) != len(experiment.expectations) or len(held) != len(result["expectations"]):
        wrong.append("its expectations are not those that are declared")
    elif result["verdict"] != verdict(experiment.expectations, held):
        wrong.append(f"the verdict is {verdict(experiment.expectations, held)}")
    return wrong


def _other_arms(
    result: Mapping[str, Any], experiment: Experiment, stored: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Arms whose rows or settings are not the declared ones."""
    wrong = []
    for place, seed in enumerate(result["seeds"]):
        arms = experiment.quick_arms(seed) if result.get("quick") else experiment.arms(seed)
        if [arm.name for arm in arms] != list(stored):
            return ["its arms are not those that are declared"]
        for arm in arms:
            kept = stored[arm.name].get("settings")
            if kept is not None and kept[place : place + 1] != [digest(arm)]:
                wrong.append(f"{arm.name}, seed {seed}, has other rows or settings")
    return wrong


def write(result: Mapping[str, Any], folder: Path | str) -> Path:
    """Keep a result as NAME.json of a folder, with a digest of what it says."""
    path = Path(folder) / f"{result['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**result, "digest": _digest(result)})
    return path


def _digest(result: Mapping[str, Any]) -> str:
    said = {key: value for key, value in result.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read(
    folder: Path | str, experiments: Sequence[Experiment], skip: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their claims.

    Args:
        experiments: a result of one of them must follow from its declaration.
        skip: names of experiments whose results are about to be replaced.

    Raises:
        InputError: a file is not a result, or contradicts its declaration or its own numbers.
    """
    found = []
    known = {experiment.name: experiment for experiment in experiments}
    for path in sorted(Path(folder).glob("*.json")):
        wrong: list[str] = []
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["arms"], result["number"]
            if result["name"] in known and result["name"] not in skip:
                wrong = contradictions(result, known[result["name"]])
                if result["digest"] != _digest(result):
                    wrong.append("it was edited since it was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not the result of an experiment",
                where=str(path),
                why=f"it lacks {error}" if isinstance(error, KeyError) else str(error),
                fix="choose another folder, or remove the file and run its experiment again",
                code="lab-result-unreadable",
            ) from error
        if wrong:
            raise InputError(
                f"{path} contradicts its declaration or its own numbers",
                where=str(path),
                why=", ".join(wrong[:3]) + (f", and {len(wrong) - 3} more" if wrong[3:] else ""),
                fix=f"run it again: truetune lab run {result['name']}",
                code="lab-result-contradicts",
            )
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
