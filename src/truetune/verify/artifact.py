"""Is what was saved what was trained? Asked of files alone, by a process that saw no training.

input   a run directory, or a model or adapter folder
does    hashes the files against the manifest; opens the artifact in a fresh process; compares its
        template, stop set and tokenizer with contract.json, its ids on the run's rows with the
        trained ones, its log-probabilities with those of the model in memory when it was saved
output  Verdict
who     pipeline.py, the verify verb
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truetune.compare import Agreement, Measured, agreement
from truetune.contract import PromptContract
from truetune.errors import InputError, TruetuneError, UnfaithfulTemplate
from truetune.model import load_tokenizer
from truetune.run import CONTRACT, MANIFEST, RunDir, opened, sha256
from truetune.verify.fresh import VerifyError, ask
from truetune.verify.rows import VerifyRow, examples_of, read_rows, reference_of
from truetune.verify.verdict import Check, Verdict, judge

VERDICT = "verify.json"
# Where a folder comes without rows: whatever is served, it must answer prompts like these.
_PROBES = ("What is 17 + 25?", "Write one sentence about a river.", "\u4f60\u597d \U0001f600")
_NUM_REPLIES = 8


def verify(source: str, *, base: str | None = None, device: str = "auto") -> Verdict:
    """Verify a run, or a model or adapter folder.

    Args:
        source: folder of either.
        base: where an adapter's base is now; None where its config says.
        device: where to open it.

    Raises:
        UsageError: a run that has saved nothing yet.
    """
    run = run_of(source)
    folder = opened(source)
    final = run is not None and _is_artifact(folder, run)
    checks = [_files(run)] if run and final else []
    rows = read_rows(run) if run else []
    request = {
        "artifact": {"folder": folder, "base": base},
        "conversations": [dataclasses.asdict(row.conversation) for row in rows],
        "rows": examples_of(rows) or _probe_rows(folder),
        "loss_on": _loss_on(run),
        "contract": _recorded(run),
        "device": device,
    }
    try:
        found = ask(request)
    except VerifyError as error:
        return Verdict(folder, (*checks, _unopened(error)))
    checks.append(_opened(found))
    if run:
        checks += [_contract(run, found), _rows(rows, found)]
        checks.append(
            _logits(rows, found, run)
            if final
            else Check("logits", "not-checked", "a checkpoint: the run measured its last step only")
        )
    return Verdict(folder, tuple(checks))


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
        "rows": examples_of(rows) or _probe_rows(adapter),
        "loss_on": _loss_on(run),
        "contract": _recorded(run),
        "num_replies": _NUM_REPLIES,
        "device": device,
    }
    try:
        found = ask(request)
    except VerifyError as error:
        return Verdict(merged, (_unopened(error),))
    checks = [_opened(found)]
    if rows:
        checks.append(_rows(rows, found))
    count = len(rows) or len(_PROBES)
    words = f"merged against the adapter on {count} {kind} prompts"
    check = judge("merge", Agreement(**found["agreement"]), dtype, words)
    same = found["same_replies"]
    numbers = {**check.numbers, "same_replies": sum(same), "num_replies": len(same)}
    return Verdict(merged, (*checks, dataclasses.replace(check, numbers=numbers)))


def run_of(source: str) -> RunDir | None:
    """The run that a path is or lies in; None where it is no run's."""
    path = Path(source)
    for folder in (path, path.parent, path.parent.parent):
        run = RunDir(folder)
        if run.looks_like_one():
            return run
    return None


def _is_artifact(folder: str, run: RunDir) -> bool:
    artifact = run.artifact()
    return artifact is not None and artifact.resolve() == Path(folder).resolve()


def _files(run: RunDir) -> Check:
    path = run.file(MANIFEST)
    if not path.is_file():
        return Check("files", "not-checked", "the run has no manifest: it was not finished")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        artifact = {
            name: facts["sha256"]
            for name, facts in listed.items()
            if name.split("/")[0] in ("adapter", "model")
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{MANIFEST} cannot be read: {error}", where=str(path), fix="copy the run again"
        ) from error
    missing = [name for name in artifact if not run.file(name).is_file()]
    changed = [
        name
        for name in artifact
        if name not in missing and sha256(run.file(name)) != artifact[name]
    ]
    if missing or changed:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"changed: {', '.join(changed)}"] if changed else []
        return Check(
            "files",
            "failed",
            "files of the artifact are not those that were saved; " + "; ".join(parts),
            {"missing": missing, "changed": changed},
            fix="copy the run again, or export an earlier checkpoint",
        )
    return Check("files", "passed", f"{len(artifact)} files are as they were saved (sha256)")


def _unopened(error: VerifyError) -> Check:
    if error.code == "model-too-large":
        return Check("opens", "not-checked", f"no room to open it: {error.why or error.what}")
    return Check(
        "opens",
        "failed",
        f"a fresh process cannot open it: {error.what}",
        {"code": error.code, "why": error.why, "where": error.where},
        fix=error.fix,
    )


def _opened(found: dict[str, Any]) -> Check:
    if not found["finite"]:
        return Check(
            "opens",
            "failed",
            "it gives NaN or infinite probabilities",
            fix="export an earlier checkpoint",
        )
    return Check("opens", "passed", f"a fresh process opens it ({found['parameters']:,} weights)")


def _contract(run: RunDir, found: dict[str, Any]) -> Check:
    path = run.file(CONTRACT)
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))
        then = {"stop": {s["id"] for s in trained["stop"]}, "size": trained["tokenizer"]["size"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{CONTRACT} cannot be read: {error}", where=str(path), fix="copy the run again"
        ) from error
    now = {
        "stop": {s["id"] for s in found["contract"]["stop"]},
        "size": found["contract"]["tokenizer"]["size"],
    }
    differing = [name for name in then if then[name] != now[name]]
    numbers = {name: [_plain(then[name]), _plain(now[name])] for name in then}
    if differing:
        sides = "; ".join(
            f"{name}: {_plain(then[name])} then, {_plain(now[name])} now" for name in differing
        )
        return Check(
            "contract",
            "failed",
            f"the saved model is served otherwise than it was trained: {sides}",
            numbers,
            fix="put back the tokenizer and generation_config that were saved",
        )
    return Check("contract", "passed", f"it stops on {sorted(now['stop'])}", numbers)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


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
            f"{len(wrong)} of {len(rows)} rows give other ids than were trained, first {wrong[0]}",
            numbers,
            fix="put back the tokenizer and template that were saved",
        )
    return Check("rows", "passed", f"{len(rows)} rows give the ids that were trained", numbers)


def _logits(rows: Sequence[VerifyRow], found: dict[str, Any], run: RunDir) -> Check:
    reference = reference_of(rows)
    if not reference.logprobs:
        return Check("logits", "not-checked", "the run kept no measurement of the trained model")
    measured = Measured(tuple(map(tuple, found["logprobs"])), tuple(map(tuple, found["greedy"])))
    if [len(r) for r in measured.logprobs] != [len(r) for r in reference.logprobs]:
        return Check("logits", "failed", "the rows were cut otherwise than in training")
    dtype = "float32" if (run.artifact() or Path()).name == "adapter" else found["dtype"]
    words = f"reloaded against the trained model in memory on {len(rows)} rows"
    return judge("logits", agreement(reference, measured), dtype, words)


def _loss_on(run: RunDir | None) -> str:
    if run is None:
        return "assistant"
    import yaml

    from truetune.run import RECIPE

    try:
        value = yaml.safe_load(run.file(RECIPE).read_text(encoding="utf-8"))["loss_on"]["value"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "assistant"
    return str(value)


def _recorded(run: RunDir | None) -> dict[str, Any]:
    """What contract.json says of how prompts were made; {} where it says nothing."""
    try:
        found = json.loads(run.file(CONTRACT).read_text(encoding="utf-8")) if run else {}
    except (OSError, ValueError):
        return {}  # told where the contract is compared
    return found if isinstance(found, dict) else {}


def _probe_rows(folder: str) -> list[tuple[list[int], list[int]]]:
    """Prompts of our own, every position measured."""
    try:
        contract = PromptContract.load(load_tokenizer(folder))
        ids = [contract.prompt_ids([{"role": "user", "content": text}]) for text in _PROBES]
    except UnfaithfulTemplate:
        tokenizer = load_tokenizer(folder)
        ids = [list(tokenizer.encode(text)) for text in _PROBES]
    except TruetuneError:
        # What is wrong with it is told by the fresh process.
        return []
    return [(row, [1] * len(row)) for row in ids if len(row) > 1]
