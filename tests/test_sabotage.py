"""The sabotage suite, on tokenizers that it makes itself; bench/sabotage runs the real ones too."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
from bench.sabotage.__main__ import CASES, page
from bench.sabotage.house import House
from bench.sabotage.negatives import NEGATIVES
from bench.sabotage.run import Heard, difference, judge, quiet

from truetune.errors import CheckFailed

HOUSE = House(real=False)
HAS_TRL = importlib.util.find_spec("trl") is not None


def _params(cases: Any) -> list[Any]:
    """Cases for pytest; those of TRL are skipped where it is not installed."""
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("negative", _params(NEGATIVES))
def test_what_is_healthy_is_left_in_peace(negative: Any) -> None:
    assert quiet(negative, HOUSE) == ()


def test_ids_are_unique() -> None:
    ids = [item.id for item in (*CASES, *NEGATIVES)]
    assert len(set(ids)) == len(ids)


def test_every_case_of_the_list_is_there() -> None:
    listed = {f"S{n:02}" for n in range(1, 21)}
    assert listed <= {case.id[:3] for case in CASES}


@pytest.mark.parametrize(
    ("broken", "healthy", "said"),
    [
        (Heard(["trl: 3 rows"]), Heard(["trl: 4 rows"]), "silent"),
        (Heard(["trl: careful"]), Heard([]), "warned: trl: careful"),
        (Heard([], "ValueError: no"), Heard([]), "raised: ValueError: no"),
        (Heard([], "ValueError: no"), Heard([], "ValueError: no"), "silent"),
    ],
)
def test_a_library_speaks_where_it_says_more_than_of_the_twin(
    broken: Heard, healthy: Heard, said: str
) -> None:
    assert difference(broken, healthy) == said


def test_the_page_counts_what_was_missed() -> None:
    case = next(case for case in CASES if not case.needs_trl)
    verdict = judge(case, HOUSE, peers=False)
    missed = dataclasses.replace(verdict, detected=False, cause=False, fix=False, peers="silent")
    text = page([(HOUSE, [verdict, missed], {NEGATIVES[0]: ("x-y",)})])
    assert "truetune finds 1 of 2, names the cause of 1, and raises 0 false alarms" in text
    assert "1 on 1 healthy scripts that resemble a broken one" in text
    assert "**no**" in text


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trl_script_with_the_best_known_mistake_is_stopped_by_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bench.sabotage.story import main

    with pytest.raises(CheckFailed) as caught:
        main([])
    assert [f.code for f in caught.value.findings] == ["stop-not-supervised"]
    assert "the collator masks every pad token" in str(caught.value)
    main(["--mended"])
    assert "audit: ok" in capsys.readouterr().out
