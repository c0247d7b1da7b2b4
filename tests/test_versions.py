"""Ranges, the pins for their lower bounds and the page about them say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGES = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


OLDEST = pins("constraints-oldest.txt")


@pytest.mark.parametrize("package", sorted(RANGES))
def test_the_oldest_is_the_lower_bound(package: str) -> None:
    bounds = [Version(s.version) for s in RANGES[package].specifier if s.operator == ">="]
    assert bounds == [OLDEST[package]]


def test_nothing_else_is_held_back() -> None:
    assert OLDEST.keys() == RANGES.keys()


def test_what_the_suite_runs_with_is_in_range() -> None:
    pinned = pins("constraints.txt")
    assert [p for p, wanted in RANGES.items() if pinned[p] not in wanted.specifier] == []


def test_the_page_names_each_with_its_oldest_version() -> None:
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    told: dict[str, Version] = {}
    for row in rows:
        if len(row) > 3 and re.match(r"\d", row[2]):
            names, versions = row[1].split(", "), row[2].split(", ")
            told |= dict(zip(map(canonicalize_name, names), map(Version, versions), strict=True))
    assert {package: told.get(package) for package in OLDEST} == OLDEST
    assert str(told["python"]) == PROJECT["requires-python"].removeprefix(">=")
