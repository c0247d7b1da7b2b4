"""Datasets that the `datasets` library reads: from the Hub, or a folder it wrote or describes.

Input:  an id (`owner/name`, `owner/name:config`) or a folder, a split, a revision.
Does:   loads it; without a split takes the only one, or train.
Output: `FileRows`, rows numbered from 1 in their split, and `FileInfo` with the hash of those
        read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.data.files import empty_file
from truetune.data.read_table import null_notes, without_nulls
from truetune.data.rows import FileInfo, FileRows, Row, names
from truetune.data.sources import no_such_split
from truetune.errors import DataError
from truetune.findings import Finding

if TYPE_CHECKING:
    import datasets


def read_dataset(
    source: str, *, split: str | None = None, revision: str | None = None, limit: int | None = None
) -> tuple[FileRows, FileInfo]:
    """Reads a dataset.

    Args:
        source: id or folder; `:config` names a configuration.
        split: a split, or a slice such as `train[:10%]`.
        revision: branch, tag or commit on the Hub.
        limit: the first so many rows.

    Raises:
        DataError: `dataset-unreadable`, `no-such-split`, `which-config`, `empty-file`.
    """
    name, config = _name_and_config(source)
    found, chosen, findings = _load(name, config, split, revision)
    label = source + (f"@{revision}" if revision else "")
    # Two splits of one dataset may be trained and held out: a row's place names its own.
    file = f"{label} split {chosen}" if chosen else label
    if limit is not None and limit < len(found):
        found = found.select(range(limit))
    hashed, num_bytes = hashlib.sha256(), 0
    rows: list[Row] = []
    with_nulls: list[Row] = []
    for number, fields in enumerate(found, 1):
        clean, removed = without_nulls(dict(fields))
        rows.append(Row(clean, file, number))
        if removed:
            with_nulls.append(rows[-1])
        raw = json.dumps(fields, default=lambda value: type(value).__name__).encode()
        hashed.update(raw)
        num_bytes += len(raw)
    if not rows:
        raise empty_file(label)
    info = FileInfo(label, hashed.hexdigest(), len(rows), num_bytes)
    return FileRows.of(rows, *findings, *null_notes(with_nulls)), info


def _name_and_config(source: str) -> tuple[str, str | None]:
    if Path(source).exists():
        return source, None
    name, colon, config = source.rpartition(":")
    return (name, config) if colon else (source, None)


def _load(
    name: str, config: str | None, split: str | None, revision: str | None
) -> tuple[datasets.Dataset, str | None, list[Finding]]:
    """The rows, the split they are (None where there are no splits), and a note on the others."""
    import datasets

    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        found = _reported(lambda: datasets.load_from_disk(name), name)
    else:
        kwargs: dict[str, Any] = {"name": config, "split": split, "revision": revision}
        found = _reported(lambda: datasets.load_dataset(name, **kwargs), name, split)
        if split is not None:
            return found, split, []
    if not isinstance(found, dict):
        if split not in (None, "train"):
            raise no_such_split(split or "", ["train"], name, why="the folder is one split")
        return found, None, []
    return _choose(found, name, split)


def _choose(
    found: dict[str, datasets.Dataset], name: str, split: str | None
) -> tuple[datasets.Dataset, str, list[Finding]]:
    there = list(found)
    wanted = split or (there[0] if len(there) == 1 else "train")
    if wanted not in found:
        raise no_such_split(wanted, there, name)
    if split is not None or len(there) == 1:
        return found[wanted], wanted, []
    others = [other for other in there if other != wanted]
    note = Finding(
        code="split-chosen",
        level="note",
        what=f"the split {wanted} was read; not read: {names(others)}",
        where=name,
        count=len(others),
        fix="choose a split with --split",
    )
    return found[wanted], wanted, [note]


def _reported(load: Any, name: str, split: str | None = None) -> Any:
    """The result of `load`; whatever it raises, as a DataError.

    `datasets` raises ValueError for both a missing split and a missing configuration, and a dozen
    types for a dataset that is not there, private, gated or out of reach.
    """
    try:
        return load()
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        first = text.splitlines()[0]
        if "corresponds to no data" in first:  # a slice, or a split without rows
            raise empty_file(name) from error
        if split is not None and "split" in first.lower():
            there = _listed(first)
            raise no_such_split(split, there or ["train"], name, why=first) from error
        if "onfig name is missing" in first or first.startswith("BuilderConfig"):
            configs = _listed(text) or ["CONFIG"]
            raise DataError(
                "the dataset has several configurations, and none was selected"
                if "missing" in first
                else "the dataset has no such configuration",
                where=name,
                why=f"there are {names(configs)}",
                fix=f"select one: {name}:{configs[0]}",
                code="which-config",
            ) from error
        raise DataError(
            f"the dataset cannot be loaded: {first}",
            where=name,
            why=f"{type(error).__name__}: it does not exist, is not public, or the Hub cannot be "
            "reached; there is no local file or folder of this name either",
            fix="check the name, log in with `hf auth login`, or pass a local file",
            code="dataset-unreadable",
        ) from error


def _listed(text: str) -> list[str]:
    """The names in the first `['a', 'b']` of a message."""
    inside = text.partition("[")[2].partition("]")[0]
    return [name.strip(" '\"") for name in inside.split(",") if name.strip()]
