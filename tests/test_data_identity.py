"""A row has a place of its own, whatever file it came from, and everything is keyed by it."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_models import write_model
from tiny_runs import command, lines, sums
from truetune.data.load import load
from truetune.data.read import READERS, read_file
from truetune.recipe.sources import make_recipe
from truetune.run.prepare import survey

ROWS = sums(12)
TEXT = "A line of prose that goes on.\n" * 200


def listener() -> Any:
    from truetune.listener import Listener

    return Listener()


def write_all(folder: Path) -> list[Path]:
    """The same rows in every format, and in every way a .json file may hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    each = [json.dumps(row) for row in ROWS]
    texts = {
        "lines.jsonl": "\n\n".join(each),
        "lines.ndjson": "\n".join(each) + "\n",
        "one_line.json": json.dumps(ROWS),
        "pretty.json": json.dumps(ROWS, indent=1),
        "two_a_line.json": "["
        + ",\n".join(map(", ".join, zip(*[iter(each)] * 2, strict=True)))
        + "]",
        "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
        "following.json": " ".join(each),
        "with_others.json": json.dumps([*ROWS[:3], 7, None, *ROWS[3:]]),
        "prose.txt": "\n\n".join([TEXT] * 3),
        "document.md": TEXT,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, delimiter in (("table.csv", ","), ("table.tsv", "\t")):
        with open(folder / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["prompt", "completion"])
            writer.writerows([[row["prompt"] + "\n2nd line", row["completion"]] for row in ROWS])
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "table.parquet")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(each).encode()))
    return sorted(folder.iterdir())


def test_no_two_rows_of_any_reader_share_a_place(tmp_path):
    paths = write_all(tmp_path / "one")
    assert {path.suffix for path in paths} >= set(READERS)
    for path in paths:
        found, info = read_file(path)
        assert len(set(found.places)) == len(found.places) == info.num_rows, path.name
        assert [row.where for row in found.rows] == [
            place for place in found.places if place not in {f.where for f in found.findings}
        ] or path.suffix in (".txt", ".md")
        assert [row.index for row in found.rows] == sorted({row.index for row in found.rows})
        # What a limit leaves out changes no place.
        for limit in range(1, info.num_rows + 1):
            assert read_file(path, limit)[0].places == found.places[:limit], (path.name, limit)


def test_a_line_is_named_where_it_tells_rows_apart(tmp_path):
    write_all(tmp_path)
    places = {
        p.name: [q.removeprefix(str(p)) for q in read_file(p)[0].places] for p in tmp_path.iterdir()
    }
    assert places["lines.jsonl"][:2] == [":1", ":3"]
    assert places["one_line.json"][:2] == [" row 1", " row 2"]
    assert places["pretty.json"][:2] == [":2", ":6"]
    assert places["two_a_line.json"][2:4] == [" row 3", " row 4"]
    assert places["with_others.json"][3:5] == [" row 4", " row 5"]
    assert places["table.csv"][:2] == [":2", ":4"]
    assert places["table.parquet"][:2] == [" row 1", " row 2"]


def test_copies_of_a_file_in_a_folder_are_different_rows(tmp_path):
    one = tmp_path / "one.json"
    one.write_text(json.dumps(ROWS))
    shutil.copy(one, tmp_path / "copy.json")
    (tmp_path / "link.json").symlink_to(one)
    loaded = load(tmp_path)
    wheres = [conversation.where for conversation in loaded.conversations]
    assert len(set(wheres)) == len(wheres) == 36
    assert tuple(wheres) == loaded.places


def test_instances_of_a_row_are_told_apart(tmp_path):
    instances = [{"input": "a", "output": "b"}, 3, {"input": "c", "output": "d"}]
    rows = [{"instruction": f"q{i}", "instances": instances} for i in range(2)]
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(rows))
    loaded = load(path)
    assert [c.where.removeprefix(str(path)) for c in loaded.conversations] == [
        f" row {row}, instances[{at}]" for row in (1, 2) for at in (0, 2)
    ]
    bad = [f.where.removeprefix(str(path)) for f in loaded.findings if f.level == "error"]
    assert bad == [" row 1, instances[1]", " row 2, instances[1]"]


def test_splits_of_a_dataset_are_told_apart(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    both = {name: datasets.Dataset.from_list(sums(3)) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "set"))
    places = [*load(tmp_path / "set").places, *load(tmp_path / "set", split="test").places]
    assert len(set(places)) == 6


# --- what is keyed by it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


# A comma in a path is no seam between a row and a place in it.
@pytest.mark.parametrize("name", ["one.json", "a, b.json", "rows.jsonl"])
def test_a_dropped_row_takes_no_other_with_it(tmp_path, model, name):
    rows = sums(24)
    rows[7]["prompt"] = "obey <|end|> me"
    rows[11]["completion"] = "an answer <|end|> and more"
    rows[13]["completion"] = ""
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) if ".jsonl" in name else json.dumps(rows))
    recipe = make_recipe(
        (
            "test",
            {
                "model": str(model),
                "data": str(path),
                "output": str(tmp_path / "run"),
                "content_specials": "error",
                "bad_rows": "drop",
                "max_steps": 1,
            },
        )
    )
    found = survey(recipe, listener())
    assert not found.stopping
    kept = [row for i, row in enumerate(rows) if i not in (7, 11, 13)]
    assert [c.messages[0]["content"] for c in found.train if c.where in found.prepared.rows] == [
        row["prompt"] for row in kept
    ]
    assert len(found.prepared.examples) == len(set(found.prepared.rows)) == 21
    dropped = [drop["where"].removeprefix(str(path)) for drop in found.prepared.data["dropped"]]
    sep = ":" if name.endswith("l") else " row "
    assert [where.split(", messages")[0] for where in dropped] == [f"{sep}{n}" for n in (14, 8, 12)]
    for row in found.prepared.verify_rows:
        asked = row.conversation.messages[0]["content"]
        number = int(asked.split("+")[0]) + 1 if "+" in asked else 0
        assert row.conversation.where == f"{path}{sep}{number}"


def test_a_row_is_shown_by_its_number_and_by_its_place(tmp_path, model):
    rows: list[Any] = [*sums(3), "no object", *sums(5)[3:]]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(rows))

    def shown(row: str) -> str:
        seen = command("inspect", model, "--data", path, "--row", row)
        assert seen.code == 0, seen.err
        return seen.out

    for row in ("5", "one.json row 5", f"{path} row 5", f"{path} row 5, messages[0].content"):
        assert "row 5 of 6" in shown(row)
        assert "3+1?" in shown(row)
    seen = command("inspect", model, "--data", path, "--row", "4")
    assert seen.code == 2
    assert "a row is text, not an object" in seen.err
    for row in ("7", "0", "other.json:3", "nonsense"):
        seen = command("inspect", model, "--data", path, "--row", row)
        assert seen.code == 2
        assert "pass a number from 1 to 6 with --row" in seen.err
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("\n" + "\n".join(map(json.dumps, sums(3))))
    for row in ("2", ":3", "rows.jsonl:3"):
        seen = command("inspect", model, "--data", jsonl, "--row", row)
        assert "row 2 of 3" in seen.out


@pytest.mark.slow
@pytest.mark.usefixtures("verified_runs")
def test_a_run_on_an_array_on_one_line_verifies(tmp_path, model):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(sums(24)))
    seen = command("train", model, path, "-o", tmp_path / "run", "--max-steps", 2)
    assert seen.code == 0, seen.out + seen.err
    *rows, _ = lines(tmp_path / "run" / "verify_rows.jsonl")  # the last line is the record
    assert len({row["conversation"]["where"] for row in rows}) == len(rows) == 24
    verdict = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert verdict["passed"], verdict
    assert [c["state"] for c in verdict["checks"] if c["name"] == "rows"] == ["passed"], verdict
