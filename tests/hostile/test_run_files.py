"""Files of a run that a stranger wrote: numbers without measure and values of other types are
damage that the page and the checks name, and never a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from run_folders import files, write_run
from truetune.errors import TruetuneError
from truetune.reporting.card import card
from truetune.reporting.facts import RunFacts
from truetune.reporting.page import page
from truetune.run_dir import RunDir, parsed
from truetune.verification.artifact import _contract, _loss_on, _recorded
from truetune.verification.files import check_files
from truetune.verification.record import _digest, read_record
from truetune.verification.rows import VERIFY_ROWS, read_rows

# As JSON text: Python writes neither of the last two.
HOSTILE = [
    *("1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 290, "NaN", "Infinity", "-1", "true", "null"),
    *('"x"', f'"{"y" * 5000}"', "[]", "[1]", "[null]", "{}", '{"a": 1}', "1e400", "9" * 5000),
]
MARK = "!hostile!"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    inner = value.items() if isinstance(value, dict) else ()
    inner = list(enumerate(value))[:1] if isinstance(value, list) else inner
    for key, held in inner:
        yield from places(held, (*at, key))


def changed(value: Any, at: tuple[Any, ...]) -> Any:
    if not at:
        return MARK
    value = copy.deepcopy(value)
    held = value
    for key in at[:-1]:
        held = held[key]
    held[at[-1]] = MARK
    return value


def text_of(name: str, value: Any, hostile: str) -> str:
    if name.endswith(".yaml"):
        return yaml.safe_dump(value).replace(f"'{MARK}'", hostile)
    lines = value if name.endswith(".jsonl") else [value]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return text.replace(f'"{MARK}"', hostile)


def short(name: str, value: Any) -> Any:
    """One line of each kind."""
    if name != "metrics.jsonl":
        return value[:1] if name.endswith(".jsonl") else value
    return list({tuple(line): line for line in value}.values())


@pytest.mark.parametrize("adapter", [True, False])
def test_pages_of_hostile_files(tmp_path: Path, adapter: bool) -> None:
    contents = files(adapter=adapter)
    write_run(tmp_path, contents)
    chance = random.Random(7)
    for name, whole in contents.items():
        if isinstance(whole, str):
            continue
        value = short(name, whole)
        path = tmp_path / name
        before = path.read_text()
        # Each place with a few values; every value at some place.
        for at in places(value):
            if name.endswith(".jsonl") and not at:
                continue
            for hostile in chance.sample(HOSTILE, 2):
                path.write_text(text_of(name, changed(value, at), hostile))
                facts = RunFacts.read(RunDir(tmp_path))
                assert page(facts).rstrip().endswith("</html>")
                assert card(facts, "model", is_adapter=adapter)
        path.write_text(before)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("hostile", ["1" + "0" * 400, "1e400", "NaN", '"x"', "9" * 5000, "true"])
def test_a_step_that_is_no_number_is_a_damaged_line(
    tmp_path: Path, name: str, hostile: str
) -> None:
    contents = files()
    write_run(tmp_path, contents)
    healthy = RunFacts.read(RunDir(tmp_path))
    assert healthy.problems == []
    lines = [json.dumps(line) for line in contents[name]]
    lines[0] = json.dumps({**contents[name][0], "step": MARK}).replace(f'"{MARK}"', hostile)
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    facts = RunFacts.read(RunDir(tmp_path))
    assert facts.problems == [f"1 lines of {name} are damaged and were skipped"]
    left = {"metrics.jsonl": facts.metrics, "samples.jsonl": facts.samples}[name]
    assert len(left) == len(lines) - 1


def test_numbers_that_runs_write_are_no_damage(tmp_path: Path) -> None:
    contents = files()
    contents["metrics.jsonl"][3]["loss"] = float("nan")
    contents["metrics.jsonl"][4]["grad_norm"] = float("inf")
    write_run(tmp_path, contents)
    facts = RunFacts.read(RunDir(tmp_path))
    assert facts.problems == []
    assert len(facts.metrics) == len(contents["metrics.jsonl"])
    # A tokenizer without a limit, as transformers writes it.
    assert parsed("1000000000000000019884624838656") == 10**30 + 19884624838656
    assert parsed('{"a": [1, -2.5e-7, null, true]}') == {"a": [1, -2.5e-7, None, True]}
    for text in ("1" + "0" * 400, "-1e999", "[" * 100_000, "{"):
        with pytest.raises(ValueError):  # noqa: PT011 (of either parser)
            parsed(text)


def uses(run: RunDir) -> None:
    """What verification reads of a run before it loads anything."""
    found = {"contract": {"stop": [{"id": 0}], "tokenizer": {"size": 8}}, "behaviour": {}}
    for use in (
        lambda: check_files(run),
        lambda: read_rows(run),
        lambda: read_record(run),
        lambda: _loss_on(run),
        lambda: _recorded(run),
        lambda: _contract(run, found, None),
        lambda: run.require_room(overwrite=True),
    ):
        with contextlib.suppress(TruetuneError):
            use()


ROW = {
    "conversation": {"source": "a", "messages": [{"role": "user", "content": "a"}]},
    "held_out": True,
    "examples": [[[1, 2], [0, 1]]],
}
NAMES = ("run", "files", "settings", "tokenizer", "way", "machine", "floor")
RECORD: dict[str, Any] = {
    "rows": "",
    "format": 1,
    "probes": [[[1, 2], [1]]],
    "dtype": "float32",
    "rounding": None,
    "reading": {"top": "AAAA", "logprobs": "AAAA", "greedy": [1], "spread": 1.0, "digest": "a"},
} | {name: {} for name in NAMES}


@pytest.mark.parametrize("name", ["manifest.json", "contract.json", "recipe.yaml", VERIFY_ROWS])
def test_verification_of_hostile_files(tmp_path: Path, name: str) -> None:
    contents = files()
    contents["manifest.json"]["files"] = {"recipe.yaml": {"bytes": 1, "sha256": "a"}}
    write_run(tmp_path, contents)
    run = RunDir(tmp_path)
    sealed = {"record": RECORD, "sha256": _digest(RECORD)}
    value = [ROW, sealed] if name == VERIFY_ROWS else contents[name]
    chance = random.Random(7)
    tops = [(1, "record", *at) for at in places(RECORD)] if name == VERIFY_ROWS else []
    for at in [*places(value), *tops]:
        for hostile in chance.sample(HOSTILE, 3):
            text = text_of(name, changed(value, at), hostile) if at else f"{hostile}\n"
            (tmp_path / name).write_text(text)
            uses(run)
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "\xff"):
        (tmp_path / name).write_text(f"{text}\n")
        uses(run)
