"""The sabotage suite, on tokenizers that it makes itself; bench/sabotage runs the real ones too."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from bench.sabotage.cases import CASES
from bench.sabotage.house import House
from bench.sabotage.run import judge

HOUSE = House(real=False)
HAS_TRL = importlib.util.find_spec("trl") is not None


def _params(cases: Any) -> list[Any]:
    marks = [pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")]
    return [
        pytest.param(case, id=case.id, marks=marks if case.needs_trl else [])
        for case in cases
        if not case.real_only
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", _params(CASES))
def test_case_is_found_with_cause_rows_and_fix_and_its_twin_is_quiet(case: Any) -> None:
    verdict = judge(case, HOUSE, peers=False)
    assert verdict.detected, "nothing above a note was found"
    assert verdict.finding is not None, f"another cause was named: {verdict.found}"
    assert verdict.cause, str(verdict.finding)
    assert verdict.rows is not False, str(verdict.finding)
    assert not verdict.false_alarms, f"the healthy twin raises {verdict.false_alarms}"
    assert verdict.fix, f"the fix does not name what helped: {verdict.finding.fix}"


def test_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
