"""The one shape of a diagnosis."""

from __future__ import annotations

import json

import pytest

from truetune.findings import Finding, folded, merged, near, phrase, share, worst

WHOLE = Finding("a-code", "error", "what happened", "rows.jsonl:3", 2, "the cause", "the remedy")


def test_lines() -> None:
    assert WHOLE.lines() == [
        "error[a-code]: what happened",
        "  where  rows.jsonl:3 (and 1 other)",
        "  why    the cause",
        "  fix    the remedy",
    ]
    assert Finding("c", "note", "told").lines() == ["note[c]: told"]
    sides = Finding("c", "note", "told", why="one\nother").lines()
    assert sides[1:] == ["  why    one\n         other"]


def test_a_finding_without_a_place_shows_no_where() -> None:
    assert Finding("c", "note", "told", count=3).lines() == ["note[c]: told"]


def test_a_phrase_names_the_first_and_counts_the_rest() -> None:
    assert phrase("abc", 3) == "a, b, c"
    assert phrase(iter("abc"), 2) == "a, b and 1 more"
    assert phrase(["a"] * 1002, 1, "; ") == "a; and 1,001 more"
    assert phrase([], 2) == ""


def test_large_counts_are_readable() -> None:
    assert "(and 4,812 others)" in Finding("c", "error", "w", "f:1", 4813).lines()[1]


def test_as_dict_is_json_with_every_fact() -> None:
    assert json.loads(json.dumps(WHOLE.as_dict())) == {
        "code": "a-code",
        "level": "error",
        "what": "what happened",
        "where": "rows.jsonl:3",
        "count": 2,
        "why": "the cause",
        "fix": "the remedy",
        "rows": [],
    }


@pytest.mark.parametrize(
    ("count", "total", "shown"),
    [(14, 142, "10 %"), (13, 142, "9 %"), (0, 9, "0 %"), (9, 9, "100 %"), (1, 1000, "0.1 %")],
)
def test_a_share_is_a_number_to_read(count: int, total: int, shown: str) -> None:
    assert share(count, total).endswith(f" rows ({shown})")
    assert share(1, 10**9) == "1 of 1,000,000,000 rows (under 0.001 %)"


def test_many_that_differ_in_a_name_are_one() -> None:
    dropped = [
        Finding("target-dropped", "error", f"it drops 'f_{i}' of message {i % 3}", f"a:{i}")
        for i in range(39)
    ]
    (told,) = folded([*dropped, dropped[0]])
    assert (told.count, told.where, len(told.rows)) == (40, "a:0", 39)
    assert told.what == (
        "it drops 'f_0' of message 0; 38 more differ only in the name or the number"
    )
    # A few are shown each, and other texts are others.
    assert folded(dropped[:3]) == merged(dropped[:3])
    other = [Finding("target-dropped", "error", f"it {w} x", "b:1") for w in "abcdef"]
    assert len(folded(other)) == 6


def test_merged_adds_counts_and_keeps_the_first_place() -> None:
    note = Finding("n", "note", "x", "a:1")
    first, second = Finding("e", "error", "y", "a:2", 2), Finding("e", "error", "y", "a:9", 3)
    other = Finding("e", "error", "z", "a:3")
    found = merged([note, first, second, other, note])
    assert [(f.code, f.what, f.where, f.count) for f in found] == [
        ("e", "y", "a:2", 5),
        ("e", "z", "a:3", 1),
        ("n", "x", "a:1", 2),
    ]


def test_merged_lists_the_places_and_not_more_than_a_hundred() -> None:
    (found,) = merged(Finding("e", "error", "y", f"a:{i}") for i in range(150))
    assert found.count == 150
    assert found.rows == tuple(f"a:{i}" for i in range(100))
    (kept,) = merged([Finding("e", "error", "y", "a:1", 2, rows=("a:1", "a:2"))])
    assert kept.rows == ("a:1", "a:2")


def test_the_same_code_with_another_level_stays_apart() -> None:
    found = merged([Finding("c", "note", "x"), Finding("c", "error", "x")])
    assert [f.level for f in found] == ["error", "note"]


def test_worst() -> None:
    error, warning, note = (
        Finding("c", level, "x")  # type: ignore[arg-type]
        for level in ("error", "warning", "note")
    )
    assert worst([note, error, warning]) == "error"
    assert worst([note, warning]) == "warning"
    assert worst([note]) == "note"
    assert worst([]) is None


@pytest.mark.parametrize(
    ("word", "there", "meant"),
    [
        ("modle", ["data", "model"], ["model"]),
        ("--lerning-rate", ["--any-learning-rate", "--learning-rate"], ["--learning-rate"]),
        ("row.jsonl", ["data", "rows.jsonl"], ["rows.jsonl"]),
        ("rows", ["rows.jsonl"], ["rows.jsonl"]),
        ("row.jsonl", ["rows100.jsonl"], ["rows100.jsonl"]),
        (".jsonll", [".json", ".jsonl"], [".jsonl", ".json"]),
        ("Epochs", ["epoch", "epochs"], ["epochs", "epoch"]),
        ("warmup", ["warmup_ratio", "warmup_steps"], ["warmup_ratio", "warmup_steps"]),
        # A few letters in common are no likeness, nor is an extension.
        ("adapter", ["data", "date", "dtype"], []),
        ("chess", ["epochs", "schema", "help"], []),
        ("train.jsonl", ["test.jsonl", "eval.jsonl"], []),
        ("q", ["a", "qlora"], []),
        ("", ["a", "data"], []),
    ],
)
def test_names_that_may_have_been_meant(word: str, there: list[str], meant: list[str]) -> None:
    assert near(word, there, 3) == meant
