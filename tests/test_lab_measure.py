"""All counts of a base at once, and the command that prints them."""

from __future__ import annotations

import json

import pytest

from truetune.cli import verbs as cli
from truetune.lab import base_path
from truetune.lab.evaluate import Recall, cloze_items
from truetune.lab.measure import Measurement, measure
from truetune.lab.words import words
from truetune.lab.world import World

FOUND = Measurement(
    recall={
        "development": Recall({"river": (3, 4), "diet": (1, 1), "sum": (0, 2)}),
        "blind": Recall({"river": (2, 4), "sum": (1, 2), "difference": (1, 1)}),
    },
    sums={"sums of numbers up to 9": (99, 100)},
    prose_loss=1.25,
)


@pytest.fixture(scope="module")
def found() -> Measurement:
    return measure(base_path(), num_items=24)


def test_table_counts_relations_facts_and_sums() -> None:
    assert FOUND.table() == [
        ["recall", "development", "blind"],
        ["river", "3 of 4 (75.0%)", "2 of 4 (50.0%)"],
        ["diet", "1 of 1 (100.0%)", "not asked"],
        ["sum", "0 of 2 (0.0%)", "1 of 2 (50.0%)"],
        ["difference", "not asked", "1 of 1 (100.0%)"],
        ["all facts", "4 of 5 (80.0%)", "2 of 4 (50.0%)"],
        ["all sums and differences", "0 of 2 (0.0%)", "2 of 3 (66.7%)"],
        ["all", "4 of 7 (57.1%)", "4 of 7 (57.1%)"],
    ]
    assert FOUND.lines() == [
        "sums of numbers up to 9: 99 of 100",
        "loss on held-out prose: 1.250 nats per token",
    ]


def test_facts_are_plain_numbers() -> None:
    facts = json.loads(json.dumps(FOUND.facts()))
    assert facts["recall"]["blind"]["sum"] == {"right": 1, "of": 2}
    assert facts["sums"] == {"sums of numbers up to 9": {"right": 99, "of": 100}}
    assert facts["prose_loss"] == 1.25


def test_recall_over_some_relations() -> None:
    recall = FOUND.recall["development"]
    assert (recall.right, recall.total, recall.share) == (4, 7, 4 / 7)
    assert recall.of(["river", "unknown"]) == (3, 4)
    assert Recall({}).share == 0.0


def test_a_base_is_measured_twice_alike(found: Measurement) -> None:
    assert found == measure(base_path(), num_items=24)
    assert list(found.recall) == ["plain", "development", "blind"]
    assert all(recall.total == 24 for recall in found.recall.values())
    assert sum(total for name, (_, total) in found.sums.items() if name.endswith("30")) == 24
    assert 0 < found.prose_loss < 8


def test_blind_items_use_blind_wordings() -> None:
    world = World.generate()
    items = cloze_items(world, num_sums=0, wordings="blind")
    assert len(items) == len(world.all_facts)
    openings = {wording.split("{s}")[0] for wording in words("held_out/blind")["river"]}
    rivers = [item.prefix for item in items if item.relation == "river"]
    assert all(any(prefix.startswith(opening) for opening in openings) for prefix in rivers)
    assert all(any(prefix.startswith(opening) for prefix in rivers) for opening in openings)


def test_every_sum_is_asked_once() -> None:
    from truetune.lab.measure import _plain_sums

    items = _plain_sums()
    assert len({item.prefix for item in items}) == len(items) == 31 * 31 + 31 * 32 // 2
    asked = {item.prefix: (item.expected, item.relation) for item in items}
    assert asked["7 plus 5 is"] == ("12", "sum 9")
    assert asked["20 plus 10 is"] == ("30", "sum 20")
    assert asked["21 minus 1 is"] == ("20", "difference 30")


def test_the_command_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    def stand_in(source: str | None, **options: object) -> Measurement:
        asked.update(source=source, **options)
        return FOUND

    monkeypatch.setattr("truetune.lab.measure.measure", stand_in)
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "evaluate", "--wordings", "blind"])
    assert ended.value.code == 0
    assert asked["source"] is None  # the embedded base
    assert asked["wordings"] == "blind"
    printed = capsys.readouterr().out
    assert "4 of 5 (80.0%)" in printed
    assert "sums of numbers up to 9: 99 of 100" in printed
    with pytest.raises(SystemExit):
        cli.main(["lab", "evaluate", "some/model", "--json"])
    assert asked["source"] == "some/model"
    assert json.loads(capsys.readouterr().out) == FOUND.facts()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--wordings", "seen"], "use one of plain, development, blind, or all"),
        (["no/such/model"], "no such model folder"),
    ],
)
def test_bad_use_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "evaluate", *words])
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())
