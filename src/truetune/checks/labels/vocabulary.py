"""Compare token ids with the sizes of the embedding and the head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding


@check()
def ids_within_head(facts: LabelFacts) -> Iterator[Finding]:
    """Every id has an embedding; otherwise training on a GPU fails with an unclear message."""
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
        what=f"token id {worst} exceeds the model's {rows:,} embeddings",
        why="tokens were added to the tokenizer but not to the model, or the tokenizer belongs to "
        "another model",
        fix="use the model's own tokenizer, or resize the embedding (upwards only)",
    )
