"""Fifty first contacts: files in the shapes that published sets have, and wrong inputs, each with
its end, its exit code, the time to a refusal, and nothing left behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from first_contact_files import FILES
from tiny_models import write_model
from tiny_runs import command, sums, write_rows
from truetune.data.load import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", FILES)
def test_a_published_shape_is_read_whole(tmp_path, name):
    write, number = FILES[name]
    loaded = load(write(tmp_path))
    assert len(loaded.conversations) == number
    assert not [finding for finding in loaded.findings if finding.level == "error"]
    assert len(set(loaded.places)) == number
    if loaded.schema != "text":
        for conversation in loaded.conversations:
            ask, say = conversation.messages[-2]["content"], conversation.messages[-1]["content"]
            assert ask.endswith("?")
            assert say.startswith("It is")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_published_shape_trains(tmp_path, model, name):
    write, _ = FILES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    run = tmp_path / "run"
    shown = command(
        *(
            "train",
            model,
            write(folder),
            "-o",
            run,
            "--max-steps",
            1,
            "--overlong",
            "truncate-prompt",
        )
    )
    assert shown.code == 0, shown.out + shown.err
    assert (run / "manifest.json").is_file()


def rows(content: str | bytes, name: str = "rows.jsonl") -> Callable[[Path], object]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def loop(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    return folder / "a.jsonl"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def nothing(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


_ROW = json.dumps(sums(1)[0])
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
# Name: (what stands where the data should, words of the error, exit code).
WRONG: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "no file": (lambda folder: folder / "gone.jsonl", "there is no such file", 2),
    "near name": (lambda folder: (rows(_ROW)(folder), folder / "row.jsonl")[1], "did you mean", 2),
    "empty file": (rows(""), "holds no rows", 2),
    "white space": (rows("\n\n"), "holds no rows", 2),
    "empty folder": (nothing, "holds no data files", 2),
    "symlink loop": (loop, "symbolic link", 2),
    "a pipe": (pipe, "stream", 2),
    "standard input": (lambda folder: "-", "stream", 2),
    "an address": (lambda folder: "https://example.org/rows.jsonl", "curl -LO https://", 2),
    "address of a set": (lambda folder: "https://huggingface.co/datasets/a/b", "give a/b", 2),
    "git lfs": (rows(_POINTER), "Git LFS", 2),
    "unknown format": (rows(_ROW, "rows.xlsx"), "not a supported format", 2),
    "broken json": (rows(f"{_ROW}\n{{'a': 1}}"), "line 2", 2),
    "cut off": (rows(_ROW[:-5]), "ends too early", 2),
    "not utf-8": (rows(b'{"prompt": "\xe9"}'), "not UTF-8", 2),
    "utf-16": (rows("prompt,completion\na,b".encode("utf-16"), "rows.csv"), "iconv -f UTF-16", 2),
    "ragged csv": (rows("prompt,completion\na,b,c", "rows.csv"), "3 cells", 2),
    "nul in csv": (rows("prompt,completion\na\0,b", "rows.csv"), "NUL", 2),
    "no parquet": (rows("PAR1nothing", "rows.parquet"), "parquet", 2),
    "no gzip": (rows(_ROW, "rows.jsonl.gz"), "cannot be unpacked", 2),
    "no zstd": (rows(_ROW, "rows.jsonl.zst"), "cannot be unpacked", 2),
    "unknown columns": (rows('{"foo": "a", "bar": "b"}'), "--columns", 2),
    "a key twice": (rows('{"prompt": "a", "prompt": "b", "completion": "c"}'), "occurs twice", 1),
    "nan": (rows('{"prompt": "a", "completion": NaN}'), "NaN", 1),
    "no answer": (rows('{"messages": [{"role": "user", "content": "a"}]}'), "no assistant turn", 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_refused_and_leaves_nothing(tmp_path, model, name):
    make, words, code = WRONG[name]
    folder = tmp_path / "data"
    folder.mkdir()
    data = make(folder)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    start = time.process_time()
    shown = command("train", model, data, "-o", tmp_path / "run", "--max-steps", 1)
    # What the first refusal of a session imports counts in tests/test_early.py.
    assert time.process_time() - start < (3 if code == 2 else 10)
    said = " ".join((shown.out + shown.err).split())
    assert shown.code in ((code,) if code == 2 else (1, 2)), said
    assert words in said
    assert "Traceback" not in said
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_fifty() -> None:
    assert (len(FILES), len(WRONG)) == (25, 25)


def test_one_huge_row_is_no_reason_for_a_huge_limit(tmp_path, model):
    huge = {"prompt": "a" * 20_000, "completion": "b"}
    path = write_rows(tmp_path / "rows.jsonl", [*sums(12), huge])
    shown = command("train", model, path, "-o", tmp_path / "run", "--max-steps", 1)
    said = " ".join((shown.out + shown.err).split())
    assert shown.code in (1, 2)
    assert "--max-length 20" not in said
    assert "split the rows that exceed the model's context" in said
