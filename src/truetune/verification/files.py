"""The files of a run, by hash: as they were saved, none missing, none added.

input   a run directory, its manifest and its record
does    hashes what the manifest lists; without one, what the record lists; names the settings that
        differ, where a settings file does
output  checks `files` and `record`

What somebody may do to a finished run: remove checkpoints and trackers' files, and put notes, pages
and other files beside the artifact. Inside the artifact's folder every file may be loaded by
somebody's program: there only a model card, a licence, a notice and hidden files may be added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.errors import InputError
from truetune.findings import phrase
from truetune.run_dir import CHECKPOINTS, MANIFEST, REPORT, RunDir, parsed, sha256
from truetune.verification.record import MOVABLE, Record, settings_of
from truetune.verification.rows import VERIFY_ROWS
from truetune.verification.verdict import Check

ARTIFACTS = ("adapter", "model")
# Removed to save room, or written after the manifest: by a tracker's own process, or made again
# from the other files.
_MAY_GO = (CHECKPOINTS, "trackers", REPORT)
_MAY_CHANGE = ("trackers", REPORT)
# By its whole name: what only begins like one (LICENSE.safetensors, README/code.py) can be loaded.
_CARD = re.compile(r"readme(\.md)?|(license|licence|notice)(\.txt|\.md)?", re.IGNORECASE)
_MOST = 5


def check_files(run: RunDir, folder: str | None = None) -> Check:
    """The run against its manifest.

    Args:
        folder: of a checkpoint; only its files are hashed. None hashes all that is listed.

    Raises:
        InputError: the manifest cannot be read.
    """
    path = run.file(MANIFEST)
    if not path.is_file():
        return Check(
            "files",
            "not-checked",
            f"there is no {MANIFEST}: it is written last, when a run has been verified; this run "
            "has not reached that point, or the file was not copied",
        )
    listed = _listed(path)
    inside = folder and Path(folder).resolve().relative_to(run.path.resolve()).as_posix()
    if inside:
        listed = {name: f for name, f in listed.items() if name.startswith(f"{inside}/")}
        if not listed:
            return Check(
                "files", "not-checked", f"{MANIFEST} does not list any file of this folder"
            )
    missing = [name for name in listed if not run.file(name).is_file()]
    changed = [name for name in listed if name not in missing and _differs(run, name, listed[name])]
    gone = [
        name
        for name in missing
        if _is_card(run, name) or (not inside and name.split("/")[0] in _MAY_GO)
    ]
    touched = [name for name in changed if name.split("/")[0] in _MAY_CHANGE or _is_card(run, name)]
    missing = [name for name in missing if name not in gone]
    changed = [name for name in changed if name not in touched]
    present = [] if inside else _present(run)
    unlisted = [name for name in present if name not in listed and name != MANIFEST]
    added = [name for name in unlisted if _may_be_loaded(run, name)]
    notes = [name for name in unlisted if name not in added]
    numbers = {
        "hashed": len(listed),
        "missing": missing,
        "changed": changed,
        "added": added,
        "removed_checkpoints": len(gone),
        "unlisted": notes,
    }
    if missing or changed or added:
        words = [("missing", missing), ("changed", changed), ("added", added)]
        differences = [f"{word}: {phrase(names, _MOST)}" for word, names in words if names]
        return Check(
            "files",
            "failed",
            f"files of the run differ from those that were saved; {'; '.join(differences)}",
            numbers,
            fix="copy the run again, or export an earlier checkpoint"
            if missing or changed
            else "move the added files elsewhere: programs may load them instead of what was "
            "trained",
        )
    what = f"{len(listed) - len(gone)} files match their hashes (sha256)"
    if gone:
        what += f"; {len(gone)} files of checkpoints, trackers and pages were removed since"
    if notes:
        what += f"; other files, not examined: {phrase(notes, _MOST)}"
    return Check("files", "passed", what, numbers)


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = parsed(path.read_text(encoding="utf-8"))["files"]
        return {
            str(name): {"bytes": int(facts["bytes"]), "sha256": str(facts["sha256"])}
            for name, facts in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{MANIFEST} cannot be read: {error}", where=str(path), fix="copy the run again"
        ) from error


def _differs(run: RunDir, name: str, facts: Mapping[str, Any]) -> bool:
    path = run.file(name)
    return path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]


def _present(run: RunDir) -> list[str]:
    """Files and links of the run; hidden ones belong to the system or to a tool."""
    found = (path.relative_to(run.path) for path in sorted(run.path.rglob("*")))
    return [
        path.as_posix()
        for path in found
        if not any(part.startswith(".") for part in path.parts)
        and ((run.path / path).is_symlink() or not (run.path / path).is_dir())
    ]


def _may_be_loaded(run: RunDir, name: str) -> bool:
    return name.partition("/")[0] in ARTIFACTS and not _is_card(run, name)


def _is_card(run: RunDir, name: str) -> bool:
    """A model card, a licence or a notice of the artifact, which its owner writes on or removes: a
    file of its own, not a link, beside the weights."""
    top, _, rest = name.partition("/")
    path = run.file(name)
    plain = not path.is_symlink() and (path.is_file() or not path.exists())
    return top in ARTIFACTS and plain and _CARD.fullmatch(rest) is not None


def check_record(run: RunDir, record: Record | None, rows: str) -> Check:
    """The artifact and what it was trained under against the record, which was taken when it was
    saved; a manifest is not needed.

    Args:
        rows: the digest of the rows as they are now.
    """
    if record is None:
        return Check(
            "record",
            "failed",
            f"{VERIFY_ROWS} contains no record of the trained model",
            fix="copy the run again; continue a run that was killed while it saved with `truetune "
            "train --resume`",
        )
    artifact = run.artifact()
    differences = []
    if rows != record.rows:
        differences.append(f"rows of {VERIFY_ROWS} were changed")
    differences += [f"{name}: {difference}" for name, difference in _settings(artifact, record)]
    named = {words.partition(":")[0] for words in differences}
    differences += [
        f"{name} {'was changed' if run.file(name).is_file() else 'is missing'}"
        for name, digest in [*record.run.items(), *record.files.items()]
        if name.split("/")[-1] not in named and _changed(run, name, digest, record)
    ]
    differences += [
        f"{name} was added"
        for name in _present(run)
        if _may_be_loaded(run, name) and name not in record.files
    ]
    if differences:
        return Check(
            "record",
            "failed",
            f"changed since it was saved: {phrase(differences, _MOST, '; ')}",
            {"differing": differences},
            fix="copy the run again, or undo the change",
        )
    count = len(record.files) + len(record.run)
    return Check(
        "record", "passed", f"{count} files match the record made when the model was saved"
    )


def _changed(run: RunDir, name: str, digest: str, record: Record) -> bool:
    path = run.file(name)
    if path.is_file() and sha256(path) == digest:
        return False
    # The base of an adapter may lie elsewhere now; the other settings were compared by value.
    return path.name not in MOVABLE or path.name not in record.settings or not path.is_file()


def _settings(artifact: Path | None, record: Record) -> list[tuple[str, str]]:
    """(file, what differs) of the artifact's JSON files."""
    now = settings_of(artifact) if artifact else {}
    differing = []
    for name, then in record.settings.items():
        if name not in now:
            differing.append((name, "missing or damaged"))
            continue
        movable = MOVABLE.get(name, frozenset())
        for key in sorted(then.keys() | now[name].keys()):
            one, two = then.get(key), now[name].get(key)
            if one != two and key not in movable:
                differing.append((name, _both(key, one, two)))
    return differing


def _both(key: str, one: Any, two: Any) -> str:
    """A setting then and now; only its name where the values are long."""
    shown = [json.dumps(value, ensure_ascii=True, default=str) for value in (one, two)]
    if max(map(len, shown)) > 48:
        return f"{key} is different"
    return f"{key} was {shown[0]} and is now {shown[1]}"
