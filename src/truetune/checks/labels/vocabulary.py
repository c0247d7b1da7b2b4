"""Ids against the rows of embedding and head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding


@check()
def ids_within_head(facts: LabelFacts) -> Iterator[Finding]:
    """An id that the embedding has no row for fails on a GPU with an unreadable message."""
    table, rows = facts.table, facts.head_rows
    if rows is None:
        return
    beyond = (table.ids >= rows) | (table.ids < 0)
    if not beyond.any():
        return
    worst = int(table.ids[beyond].max())
    yield rows_finding(
        facts.names,
        np.unique(table.rows_of(np.flatnonzero(beyond))).tolist(),
        code="id-beyond-head",
        level="error",
        what=f"token id {worst} is beyond the model's {rows:,} embedding rows",
        why="the tokenizer has tokens that the model was never given rows for, or it is another "
        "model's",
        fix="use the tokenizer that belongs to the model, or resize the embedding (upwards only)",
    )
