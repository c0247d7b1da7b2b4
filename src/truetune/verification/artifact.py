"""Verify that what was saved is what was trained, from files alone and in a process that did not
train.

input   a run directory, or a model or adapter folder
does    hashes the files against the manifest and the record; opens the artifact in a fresh process;
        compares its template, stop set and tokenizer with those of training, its ids on the run's
        rows with the trained ones, its predictions with those of the model in memory when it was
        saved
output  Verdict
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.compare import Agreement
from truetune.errors import InputError, UsageError
from truetune.findings import counted
from truetune.model.source import ADAPTER_CONFIG
from truetune.run_dir import CONTRACT, MANIFEST, RECIPE, RunDir, opened, parsed
from truetune.verification.files import check_files, check_record
from truetune.verification.fresh import VerifyError, ask
from truetune.verification.record import Record, read_record, rows_digest
from truetune.verification.rows import VerifyRow, examples_of, read_rows
from truetune.verification.verdict import Check, Verdict, judge, judge_reading, judge_rounding

_NUM_REPLIES = 8


def verify(source: str, *, base: str | None = None, device: str = "auto") -> Verdict:
    """Verify a run, or a model or adapter folder.

    Args:
        source: folder of either.
        base: where an adapter's base is now; None takes its config's.
        device: where to open it.

    Raises:
        UsageError: there is no such folder, or it is a run that has not saved its model yet.
    """
    if not os.path.isdir(source):
        raise UsageError(
            f"there is no folder {source}",
            where=source,
            why=f"{source} is a file" if os.path.isfile(source) else "",
            fix="pass the folder of a run, a model or an adapter",
            code="no-run",
        )
    run = run_of(source)
    if run is None and not _holds_anything(Path(source)):
        raise UsageError(
            f"{source} is neither a run nor a model",
            where=source,
            why="it contains no recipe.yaml, manifest.json, config.json or weights",
            fix="pass the folder of a run, a model or an adapter",
            code="no-run",
        )
    folder = opened(source)
    if run is not None:
        _require_saved(source, run, folder)
    final = run is not None and _is_artifact(folder, run)
    rows = read_rows(run) if run else []
    record = read_record(run) if run else None
    checks = []
    if run:
        checks.append(check_files(run, None if final else folder))
    if run and final:
        checks.append(check_record(run, record, rows_digest(rows)))
    request = {
        "artifact": {"folder": folder, "base": base},
        "conversations": [dataclasses.asdict(row.conversation) for row in rows],
        "rows": examples_of(rows),
        "loss_on": _loss_on(run),
        "contract": _recorded(run),
        "device": device,
    }
    if final and record:
        held = record.as_dict()
        request |= {name: held[name] for name in ("probes", "reading", "machine", "way")}
    try:
        found = ask(request)
    except VerifyError as error:
        return Verdict(folder, (*checks, _unopened(error)))
    checks.append(_opened(found))
    if run:
        checks += [_contract(run, found, record if final else None), _rows(rows, found)]
        checks += _logits(record, found) if final else [_NO_LOGITS]
    return Verdict(folder, tuple(checks))


def check_saved(source: str) -> Verdict | None:
    """What a run saved against its manifest and its record, without opening it; a manifest that was
    removed hides nothing. None if it is no run's, or an adapter without a record.

    An adapter is compared with the record alone: its base may lie elsewhere now, which a manifest
        does
    not know.

    Raises:
        InputError: manifest or record are damaged.
    """
    run = run_of(source)
    if run is None:
        return None
    folder = opened(source)
    checks = []
    if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        checks.append(check_files(run, folder))
    if _is_artifact(folder, run) and (record := read_record(run)):
        checks.append(check_record(run, record, rows_digest(read_rows(run))))
    return Verdict(folder, tuple(checks)) if checks else None


def _require_saved(source: str, run: RunDir, folder: str) -> None:
    """Refuse a run without a final model: a checkpoint that passes must not stand for the run."""
    if run.path != Path(source) or run.finished or run.artifact() is not None:
        return
    raise UsageError(
        f"{source} has no final model: the run is not finished",
        where=source,
        why=f"its last checkpoint is {os.path.basename(folder)}",
        fix=f"continue it with `truetune train --resume {shlex.quote(source)}`, or verify the "
        f"checkpoint: truetune verify {shlex.quote(folder)}",
        code="run-unfinished",
    )


def _holds_anything(folder: Path) -> bool:
    """Whether a folder was a run or a model, even if a part of it is gone."""
    names = (RECIPE, CONTRACT, MANIFEST, "config.json", "adapter_config.json")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.safetensors*"))


_NO_LOGITS = Check("logits", "not-checked", "a checkpoint: the run measured only its last step")


def verify_merge(
    adapter: str,
    merged: str,
    *,
    base: str | None,
    load_in: str,
    dtype: str,
    run: RunDir | None,
    device: str = "auto",
) -> Verdict:
    """Compare a merged model with its adapter, in a fresh process, on the run's rows.

    Args:
        adapter, merged: folders.
        base, load_in: as the adapter is to be opened.
        dtype: that the merged weights were saved in.
        run: that trained the adapter; None: some probes of our own.
    """
    rows = read_rows(run) if run else []
    kind = "held-out" if any(row.held_out for row in rows) else "trained" if rows else "neutral"
    request = {
        "artifact": {"folder": merged},
        "reference": {"folder": adapter, "base": base, "load_in": load_in},
        "conversations": [dataclasses.asdict(row.conversation) for row in rows],
        "rows": examples_of(rows),
        "loss_on": _loss_on(run),
        "contract": _recorded(run),
        "num_replies": _NUM_REPLIES,
        "dtype": dtype,
        "device": device,
    }
    try:
        found = ask(request)
    except VerifyError as error:
        return Verdict(merged, (_unopened(error),))
    checks = [_opened(found)]
    if rows:
        checks.append(_rows(rows, found))
    words = f"the merged model compared with the adapter on {found['num_rows']} {kind} prompts"
    floor = Agreement(**found["floor"]) if found["floor"] else None
    check = judge("merge", Agreement(**found["agreement"]), dtype, words, floor)
    same = found["same_replies"]
    numbers = {**check.numbers, "same_replies": sum(same), "num_replies": len(same)}
    return Verdict(merged, (*checks, dataclasses.replace(check, numbers=numbers)))


def run_of(source: str) -> RunDir | None:
    """The run that a path is or lies in; None if it is no run's."""
    path = Path(source)
    for folder in (path, path.parent, path.parent.parent):
        run = RunDir(folder)
        if run.looks_like_one():
            return run
    return None


def _is_artifact(folder: str, run: RunDir) -> bool:
    artifact = run.artifact()
    return artifact is not None and artifact.resolve() == Path(folder).resolve()


def _unopened(error: VerifyError) -> Check:
    if error.code == "model-too-large":
        return Check(
            "opens",
            "not-checked",
            f"there is not enough memory to open it: {error.why or error.what}",
        )
    return Check(
        "opens",
        "failed",
        f"a fresh process cannot open the saved model: {error.what}",
        {"code": error.code, "why": error.why, "where": error.where},
        fix=error.fix,
    )


def _opened(found: dict[str, Any]) -> Check:
    if not found["finite"]:
        return Check(
            "opens",
            "failed",
            "the saved model gives NaN or infinite probabilities",
            fix="export an earlier checkpoint",
        )
    what = f"a fresh process opens it ({found['parameters']:,} weights)"
    if found.get("base"):
        what += f" on {found['base']}, which is compared by hashes of samples of each tensor"
    return Check("opens", "passed", what)


def _contract(run: RunDir, found: dict[str, Any], record: Record | None) -> Check:
    """Stop set, size, and with a record all that the tokenizer and its template do."""
    path = run.file(CONTRACT)
    try:
        trained = parsed(path.read_text(encoding="utf-8"))
        then = {"stop": sorted(s["id"] for s in trained["stop"])}
        then["size"] = trained["tokenizer"]["size"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{CONTRACT} cannot be read: {error}", where=str(path), fix="copy the run again"
        ) from error
    now = {
        "stop": sorted(s["id"] for s in found["contract"]["stop"]),
        "size": found["contract"]["tokenizer"]["size"],
    }
    numbers = {name: [then[name], now[name]] for name in then}
    differences = [
        f"{name}: {then[name]} then, {now[name]} now" for name in then if then[name] != now[name]
    ]
    if record:
        differences += _behaviours(
            record.tokenizer, {**found["tokenizer"], "template": found["template"]}
        )
        if not differences and record.tokenizer.get("stop") != now["stop"]:
            differences.append(f"stop: {record.tokenizer.get('stop')} then, {now['stop']} now")
    if differences:
        return Check(
            "contract",
            "failed",
            "the saved model is served differently from how it was trained: "
            + "; ".join(differences),
            numbers,
            fix="restore the tokenizer and generation_config that were saved",
        )
    return Check("contract", "passed", f"replies end on the token ids {now['stop']}", numbers)


# What a difference in one of the entries of `behaviour_of` means.
_MEANINGS = {
    "ids": "texts in many scripts give different ids",
    "texts": "ids give different texts",
    "readable": "ids give different texts without special tokens",
    "vocabulary": "ids stand for different tokens",
    "added": "the added tokens are different",
    "special": "the special tokens are different",
    "side": "it pads on the other side",
    "template": "its chat template is different",
}


def _behaviours(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [words for name, words in _MEANINGS.items() if then.get(name) != now[name]]


def _rows(rows: Sequence[VerifyRow], found: dict[str, Any]) -> Check:
    """The central equation again, on what the saved tokenizer and template make of the rows."""
    if not rows:
        return Check("rows", "not-checked", "the run kept no rows to verify with")
    wrong = []
    for row, encoded in zip(rows, found["encoded"], strict=True):
        if encoded is None or [tuple(e) for e in encoded] != [tuple(e) for e in row.examples]:
            wrong.append(row.conversation.where)
    numbers = {"rows": len(rows), "differing": wrong}
    if wrong:
        return Check(
            "rows",
            "failed",
            f"{len(wrong)} of {len(rows)} rows give different ids than in training, first "
            f"{wrong[0]}",
            numbers,
            fix="restore the tokenizer and template that were saved",
        )
    return Check(
        "rows",
        "passed",
        f"the ids of {counted(len(rows), 'row')} are the same as in training",
        numbers,
    )


def _logits(record: Record | None, found: dict[str, Any]) -> list[Check]:
    """The predictions against those of the model in memory; and what rounding it had cost."""
    if record is None:
        return [
            Check("logits", "not-checked", "the run recorded no measurement of the trained model")
        ]
    checks = [judge_reading(record, found)]
    if record.rounding:
        checks.append(judge_rounding(Agreement(**record.rounding), record.dtype))
    return checks


def _loss_on(run: RunDir | None) -> str:
    if run is None:
        return "assistant"
    import yaml

    try:
        value = yaml.safe_load(run.file(RECIPE).read_text(encoding="utf-8"))["loss_on"]["value"]
    except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
        return "assistant"
    return str(value)


def _recorded(run: RunDir | None) -> dict[str, Any]:
    """What contract.json says of how prompts were made; {} if it says nothing."""
    try:
        found = parsed(run.file(CONTRACT).read_text(encoding="utf-8")) if run else {}
    except (OSError, ValueError):
        return {}  # reported where the contract is compared
    return found if isinstance(found, dict) else {}
