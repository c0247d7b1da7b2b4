"""The benchmark's records and tables: runs in, table out; failed and resumed runs."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
JOB = "alpaca-60m-lora"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("compare")


def measured(seconds: float, losses: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "seconds": [seconds],
        "whole": seconds + 1,
        "losses": losses,
        "how": "",
        "peak_mb": 1000.0 * seconds,
        "matmul_gflops": 100.0,
        "dtype": "bfloat16",
        "threads": 2,
        **changes,
    }


SIDES = {
    "truetune": measured(2.0, {"1": 4.0, "2": 3.0}),
    "slow": measured(8.0, {"1": 4.0, "2": 3.03}, how="one row at a time"),
    "broken": {"failed": "does not fit in 23 GB"},
}


@pytest.fixture
def bench(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a Bench whose sides answer at once; `asked` lists what was run."""
    asked: list[str] = []

    def run(side: str, *_: Any) -> dict[str, Any]:
        asked.append(side)
        return dict(SIDES[side])

    def prepare(job: str, _: Any) -> Path:
        file = tmp_path / f"{job}.json"
        given = {"rows": [], "tokens": 200, "supervised": 100, "operations": 1e11}
        file.write_text(json.dumps(given))
        return file

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "prepare", prepare)

    def made(**changes: Any) -> Any:
        options = {"steps": None, "clock": "wall", "rounds": 2}
        options |= {"models": tmp_path, "fresh": False, "write": False, "sides": list(SIDES)}
        options |= {"gpu": False, "results": None}
        bench = compare.Bench(argparse.Namespace(**{**options, **changes}))
        bench.asked = asked
        return bench

    return made


def go(bench: Any) -> None:
    for number in range(bench.options.rounds):
        for side in bench.options.sides:
            if bench.open(JOB, side, number):
                bench.make(JOB, side, number)


def lines_of(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith(f"| {JOB}")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_runs_become_lines_that_compare_with_the_first_side(bench: Any) -> None:
    made = bench()
    go(made)
    first, slow, broken = lines_of(made.table())
    assert first[1:] == ["truetune", "100.0", "50.0", "1.00", "2,000", "50 %", "1.00x", "1.00", ""]
    assert slow[1:] == [
        *("slow, one row at a time", "25.0", "12.5", "1.00", "8,000"),
        *("12 %", "4.00x", "0.25", "1e-02"),
    ]
    assert broken[1:3] == ["broken", "does not fit in 23 GB"]
    # Every line has as many cells as the head.
    assert len(first) == len(slow) == len(broken) == made.table().splitlines()[1].count("---")
    assert "bfloat16 on 2 threads 100" in made.table()


def test_a_failed_side_is_recorded_and_not_tried_again(bench: Any) -> None:
    made = bench()
    go(made)
    assert made.asked == ["truetune", "slow", "broken", "truetune", "slow"]
    again = bench()
    go(again)
    assert len(again.asked) == 5
    assert again.table() == made.table()


def test_it_goes_on_where_it_was_stopped(bench: Any) -> None:
    made = bench()
    made.make(JOB, "truetune", 0)
    # The table of a stopped run stands, with the sides that are there.
    assert [line[1] for line in lines_of(made.table())] == ["truetune"]
    assert "one run" in made.table()
    made.asked.clear()
    go(bench())
    assert made.asked == ["slow", "broken", "truetune", "slow"]


def test_other_settings_or_code_count_for_nothing(
    bench: Any, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(bench())
    assert bench(steps=7).runs == []
    assert bench(fresh=True).runs == []
    assert [r["round"] for r in bench(rounds=1).runs] == [0, 0, 0]
    monkeypatch.setattr(compare, "code", lambda: "other")
    assert bench().runs == []


def test_a_side_that_is_not_installed_may_be_there_the_next_time(
    bench: Any, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compare.INTERPRETERS, "slow", tmp_path / "python")
    made = bench()
    go(made)
    assert ["slow", "not installed"] in [line[1:3] for line in lines_of(made.table())]
    (tmp_path / "python").touch()
    assert bench().open(JOB, "slow", 0)


def test_whole_trainings_have_a_table_of_their_own(bench: Any) -> None:
    made = bench(sides=["truetune", "slow"])
    go(made)
    for run in made.runs:
        run["is_whole"] = True
    lines = made.table().splitlines()
    assert f"| {JOB} | truetune | 3.0 | 1.00x |" in lines
    assert f"| {JOB} | slow, one row at a time | 9.0 | 3.00x |" in lines
    # The second step follows a first of another learning rate, so it is not compared.
    assert lines_of(made.table())[1][-1] == "0"


def test_reasons(compare: Any) -> None:
    assert compare.reason(-9, "", 23000) == "does not fit in 23 GB: killed by the system"
    assert compare.reason(-11, "", 23000) == "died of signal 11"
    assert compare.reason(1, "Traceback\nKeyError: 'a|b <c>'\n", 0) == r"KeyError: 'a\|b \<c\>'"
    assert compare.reason(1, "", 0) == "no message"
    assert len(compare.reason(1, "x" * 500, 0)) == 120


def test_only_what_stands_between_the_markers_is_replaced(compare: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<a>\nold\n<b>\nafter\n")
    compare.put("new", "<a>", "<b>", page)
    assert page.read_text() == "before\n<a>\n\nnew\n\n<b>\nafter\n"
    with pytest.raises(ValueError, match="<c>"):
        compare.put("new", "<b>", "<c>", page)
    assert "after" in page.read_text()


def test_the_page_has_the_markers(compare: Any) -> None:
    page = (BENCH.parent / "docs" / "performance.md").read_text()
    for name in ("compare", "trees"):
        source = (BENCH / f"{name}.py").read_text()
        begin, end = source.split("BEGIN, END = ")[1].splitlines()[0].split(", ")
        assert page.index(begin.strip('"')) < page.index(end.strip('"'))
    assert compare.GPU_BEGIN in page


def test_jobs_for_a_gpu_have_a_table_of_their_own(compare: Any, bench: Any) -> None:
    made = bench()
    made.make(JOB, "truetune", 0)
    other = {**SIDES["truetune"], **made.runs[0], "job": "gpu-alpaca-8b-lora"}
    made.runs = [*made.runs, other]
    assert "gpu-alpaca" not in made.table()
    made.options.gpu = True
    assert JOB not in made.table()
    assert "gpu-alpaca-8b-lora" in made.table()


def test_a_run_that_takes_too_long_says_so(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, timeout: float, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(compare.subprocess, "run", late)
    options = argparse.Namespace(models=tmp_path, clock="wall", limit=0.5)
    made = compare.run("truetune", JOB, tmp_path, options)
    assert made == {"failed": "not done after 0.5 minutes"}
