"""Compare the masks in the dataset with the tokens that are really targets.

A column of labels or of a mask says what its author wants to train. Some trainers and collators
ignore it and make their own labels; the loss does not show that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from truetune.auditing.read import IGNORED, Array, Reading, ReadRow
from truetune.auditing.subject import Subject
from truetune.findings import Finding, rows_finding, share

# Number of rows that are compared with their columns, spread evenly.
_MOST = 2_000
# Columns that say which tokens are targets, as transformers and TRL name them.
_MASKS = ("labels", "completion_mask", "assistant_masks")


def mask_findings(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """No token is a target that a mask column of its row excludes."""
    declared = _declared(subject)
    if subject.rows is None or not declared or not hasattr(subject.rows, "__getitem__"):
        return
    rows = [row for row in reading.rows if row.index is not None]
    rows = [rows[i * len(rows) // _MOST] for i in range(_MOST)] if len(rows) > _MOST else rows
    ignored: dict[str, list[int]] = {}
    trained: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for number, row in enumerate(rows):
        try:
            cells = subject.rows[row.index]
        except (IndexError, KeyError, TypeError):
            return
        if not isinstance(cells, Mapping):
            return
        targets = _targets(row)
        for name in declared:
            asked = _asked(cells, name, row)
            if asked is not None and (targets & ~asked).any():
                ignored.setdefault(name, []).append(number)
                trained[name] = trained.get(name, 0) + int(targets.sum())
                wanted[name] = wanted.get(name, 0) + int(asked.sum())
    for name, bad in ignored.items():
        yield rows_finding(
            [row.name for row in rows],
            bad,
            code="mask-ignored",
            level="warning",
            what=f"the column {name!r} marks {wanted[name]:,} tokens of "
            f"{share(len(bad), len(rows))} as targets, but {trained[name]:,} are supervised",
            why=_why(subject, name),
            fix=_fix(subject, name),
        )


def _declared(subject: Subject) -> list[str]:
    """The columns that say what is to be trained, without those that were switched off."""
    off = getattr(subject.args, "completion_only_loss", None) is False
    return [name for name in _MASKS if not (off and name == "completion_mask")]


def _targets(row: ReadRow) -> np.ndarray:
    """(T,) what is trained; the first token of a row has nothing that predicts it."""
    inside = row.real != 0
    on = row.labels[inside] != IGNORED
    on[:1] = False
    return on


def _asked(cells: Mapping[str, Any], name: str, row: ReadRow) -> np.ndarray | None:
    """(T,) what a column of the row wants trained; None if it has none of that length."""
    column, ids = cells.get(name), cells.get("input_ids")
    own: Array = row.ids[row.real != 0]
    if column is None or ids is None:
        return None
    try:
        flags, source = (np.asarray(value, dtype=np.int64).reshape(-1) for value in (column, ids))
    except (TypeError, ValueError):
        return None
    if len(flags) != len(source) or not len(own) or not np.array_equal(source[: len(own)], own):
        return None
    asked = (flags != IGNORED) if name == "labels" else (flags != 0)
    asked[:1] = False
    # A mask without a target asks for nothing.
    return asked[: len(own)] if asked.any() else None


def _why(subject: Subject, name: str) -> str:
    if name == "labels":
        return (
            f"the collator {_collator(subject)} builds its own labels from the ids and ignores "
            "those of the dataset (as DataCollatorForLanguageModeling does): masked tokens are "
            "learned"
        )
    return (
        "the trainer does not read this column: it builds the labels from the ids, and masked "
        "tokens are learned"
    )


def _fix(subject: Subject, name: str) -> str:
    if name == "labels":
        return "use a collator that pads existing labels, such as DataCollatorForSeq2Seq"
    if name == "completion_mask" and hasattr(subject.args, "completion_only_loss"):
        return (
            "set completion_only_loss=True in the SFTConfig; if loss on all tokens is intended, "
            "set it to False or remove the column"
        )
    return f"put labels into the dataset, with -100 where {name!r} is 0; or remove the column"


def _collator(subject: Subject) -> str:
    collator = getattr(subject.train, "collate_fn", None)
    inner = getattr(collator, "data_collator", collator)
    return getattr(inner, "__name__", type(inner).__name__)
