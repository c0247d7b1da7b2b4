"""Whatever bytes a file holds, reading it ends soon, in rows or in one error of our own.

A mutant that once broke this is kept in `corpus/`, under a name that ends with its extension.
"""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from mutate import mutants, seeds

from truetune.data.load import load
from truetune.errors import TruetuneError
from truetune.recipe.sources import make_recipe, read_recipe

CORPUS = Path(__file__).parent / "corpus"
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "txt", "jsonl.gz", "jsonl.zst", "yaml")
QUICK = 40
WHOLE = 1000
_SECONDS = 20
_BYTES = 64 * 2**20


def read(path: Path) -> str:
    """What came of a file: "rows", or the code of the error."""
    start = time.process_time()
    try:
        if path.suffix == ".yaml":
            make_recipe((str(path), read_recipe(path)))
        else:
            loaded = load(path)
            assert len(set(loaded.places)) == len(loaded.places) > 0
            wheres = [conversation.where for conversation in loaded.conversations]
            assert len(set(wheres)) == len(wheres)
        end, words = "rows", "rows"
    except TruetuneError as error:
        end, words = error.code or "recipe", f"{error}"
    assert words
    assert "\x1b" not in words
    assert time.process_time() - start < _SECONDS
    return end


def try_all(folder: Path, extension: str, number: int, seed: int) -> dict[str, int]:
    path = folder / f"mutant.{extension}"
    ends: dict[str, int] = {}
    tracemalloc.start()
    try:
        for at, data in enumerate(mutants(extension, number, seed)):
            path.write_bytes(data)
            try:
                end = read(path)
            except BaseException as error:
                kept = CORPUS / f"found-{seed}-{at}.{extension}"
                kept.write_bytes(data)
                raise AssertionError(f"{kept.name}: {type(error).__name__}: {error}") from error
            ends[end] = ends.get(end, 0) + 1
        assert tracemalloc.get_traced_memory()[1] < _BYTES
    finally:
        tracemalloc.stop()
    return ends


@pytest.mark.parametrize("extension", FORMATS)
def test_sound_files_are_read(tmp_path, extension):
    if extension == "yaml":
        (tmp_path / "sound.yaml").write_bytes(seeds()["yaml"][0])
        assert read_recipe(tmp_path / "sound.yaml")["learning_rate"] in (1e-4, "1e-4")
        return
    for number, data in enumerate(seeds()[extension]):
        path = tmp_path / f"sound{number}.{extension}"
        path.write_bytes(data)
        assert read(path) == "rows"


@pytest.mark.parametrize("extension", FORMATS)
def test_a_few_mutants(tmp_path, extension):
    assert sum(try_all(tmp_path, extension, QUICK, seed=1).values()) == QUICK


@pytest.mark.slow
@pytest.mark.parametrize("extension", FORMATS)
def test_a_thousand_mutants(tmp_path, extension):
    ends = try_all(tmp_path, extension, WHOLE, seed=20261121)
    assert sum(ends.values()) == WHOLE
    # Not all of them die at the first byte: rows are read, and refused for several reasons.
    assert len(ends) > 1


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_once_broke_a_reader(tmp_path, path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    read(copy)
