"""Take results of `truetune lab` into docs/lab, with the commit of each declaration; write what the
experiments cost into the package.

    python scripts/lab_results.py                     stamp what is in docs/lab
    python scripts/lab_results.py FOLDER              take FOLDER/*.json as well
    python scripts/lab_results.py FOLDER --quick OF   and the costs of the quick form from OF/*.json

A declaration dates from the first commit since which no bound of its expectations has changed;
wordings may have. Needs the history of the repository.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from truetune.lab.bench import Arm, digest
from truetune.lab.catalogue import every
from truetune.lab.experiment import Experiment
from truetune.lab.results import write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "lab"
COSTS = ROOT / "src" / "truetune" / "lab" / "costs.yaml"
_HEAD = """\
# Seconds of a processor that the experiments take in an empty folder, in quick form and in full, as
# they were measured; scripts/lab_results.py writes this file. More, where some arms were trained
# before.
"""


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout


def bounds(source: str) -> list[str]:
    """Of the expectations in the source of an experiment, in their order."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Expectation":
            of = {k.arg: ast.dump(k.value) for k in node.keywords if k.arg in ("above", "below")}
            found.append(json.dumps(of, sort_keys=True))
    return found


def declared_in(experiment: Experiment) -> dict[str, str]:
    """Commit and date since which the bounds are what they are."""
    path = f"src/truetune/lab/experiments/{experiment.name.replace('-', '_')}.py"
    said = git("log", "--follow", "--format=%x00%h %cs", "--abbrev=10", "--name-only", "--", path)
    now = bounds((ROOT / path).read_text(encoding="utf-8"))
    found = {"commit": "", "date": ""}
    for entry in said.split("\0")[1:]:
        head, *names = entry.split("\n")
        commit, date = head.split()
        at = next(name for name in names if name)
        if bounds(git("show", f"{commit}:{at}")) != now:
            break
        found = {"commit": commit, "date": date}
    return found


def to_train(arm: Arm, seed: int) -> set[tuple[str, int]]:
    """What is trained for an arm."""
    if arm.rows is None and arm.examples is None:
        return set()
    before = to_train(arm.start, seed) if arm.start else set()
    return before | {(digest(replace(arm, served=None, stop=(), before=(), edit=None)), seed)}


def from_scratch(experiment: Experiment, result: dict[str, Any]) -> int | None:
    """Seconds of a run in an empty folder; None where some of its arms lay there."""
    if "fresh_seconds" in result:
        return result["fresh_seconds"]
    every_arm = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms(seed)]
    needed = set().union(*(to_train(arm, seed) for arm, seed in every_arm))
    whole = result.get("trained", 0) >= len(needed)
    return result["processor_seconds"] if whole else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--quick", type=Path)
    options = parser.parse_args()
    if options.folder is not None:
        for path in options.folder.glob("*.json"):
            shutil.copy(path, RESULTS)
    costs: dict[str, Any] = yaml.safe_load(COSTS.read_text("utf-8")) if COSTS.is_file() else {}
    for experiment in every():
        path = RESULTS / f"{experiment.name}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        result["declared_in"] = declared_in(experiment)
        result["fresh_seconds"] = from_scratch(experiment, result)
        write(result, RESULTS)
        known = costs.setdefault(experiment.name, {})
        partly = f"more than {result['processor_seconds']}"
        known["full"] = result["fresh_seconds"] or partly
        quick = options.quick and options.quick / path.name
        if quick and quick.is_file():
            known["quick"] = json.loads(quick.read_text(encoding="utf-8"))["fresh_seconds"]
    COSTS.write_text(_HEAD + yaml.safe_dump(costs, sort_keys=True), encoding="utf-8")


if __name__ == "__main__":
    main()
