"""Datasets that the `datasets` library reads: from the Hub, or a folder it wrote or describes.

Input:  an id (`owner/name`, `owner/name:config`) or a folder, a split, a revision.
Does:   loads it; without a split takes the only one, or train.
Output: `FileRows`, rows numbered from 1 in their split, and `FileInfo` with the hash of those
        read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
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
        limit: read only this many rows, from the first.

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
    """The rows, the split they are (None if there are no splits), and a note on the others."""
    import datasets

    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        found = _reported(lambda: datasets.load_from_disk(name), name)
    else:
        kwargs: dict[str, Any] = {"name": config, "split": split, "revision": revision}
        with _asked_once(name, revision):
            found = _reported(lambda: datasets.load_dataset(name, **kwargs), name, split)
        if split is not None:
            return found, split, []
    if not isinstance(found, dict):
        if split not in (None, "train"):
            raise no_such_split(split or "", ["train"], name, why="the folder is one split")
        return found, None, []
    return _choose(found, name, split)


# The seconds that the Hub may take to say whether it has a dataset.
_HUB_PATIENCE = 10.0


@contextlib.contextmanager
def _asked_once(name: str, revision: str | None) -> Iterator[None]:
    """While `datasets` loads: what the Hub answers when it is asked once.

    `datasets` itself asks six times, prints each failure and takes half a minute to say that there
    is no network. Where the Hub does not answer, only a cached copy of the dataset is looked for.

    Raises:
        DataError: `dataset-unreadable`, if the Hub has no such dataset or revision, or does not
            share it.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if Path(name).exists():
        yield
        return
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, revision=revision, timeout=_HUB_PATIENCE)
    except GatedRepoError as error:
        raise DataError(
            "the Hub shares this dataset only with people who accepted its terms",
            where=name,
            fix="accept them on its page, and log in with `hf auth login`",
            code="dataset-unreadable",
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"the dataset has no revision {revision}",
            where=name,
            fix="check the value of --revision",
            code="dataset-unreadable",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            "there is no local file or folder of this name, and no public dataset on the Hub",
            where=name,
            fix="check the name, or log in with `hf auth login` if the dataset is private",
            code="dataset-unreadable",
        ) from error
    except Exception:  # whatever the library's connection raises
        offline = True
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


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
    import datasets

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
                why=f"the configurations are {names(configs)}",
                fix=f"select one: {name}:{configs[0]}",
                code="which-config",
            ) from error
        if datasets.config.HF_HUB_OFFLINE and isinstance(error, (ConnectionError, OSError)):
            raise DataError(
                "there is no such file or folder, and the Hub cannot be reached (offline)",
                where=name,
                why="the local cache holds no dataset of this name",
                fix="pass the path of a local file or folder, or go online",
                code="dataset-unreadable",
            ) from error
        raise DataError(
            f"the dataset cannot be loaded: {first}",
            where=name,
            why=type(error).__name__,
            fix="check the name, log in with `hf auth login`, or pass a local file",
            code="dataset-unreadable",
        ) from error


def _listed(text: str) -> list[str]:
    """The names in the first `['a', 'b']` of a message."""
    inside = text.partition("[")[2].partition("]")[0]
    return [name.strip(" '\"") for name in inside.split(",") if name.strip()]
