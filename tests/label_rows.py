"""Token rows as anybody made them, read as an audit reads them and held to the label families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from truetune.auditing.read import read_batches
from truetune.checks.labels.facts import LabelFacts
from truetune.checks.labels.judge import label_findings
from truetune.checks.labels.table import TokenTable
from truetune.contract.frame import Frame
from truetune.contract.stops import served_stops
from truetune.findings import Finding


def table_of(
    rows: Sequence[Any],
    *,
    pad_id: int | None = None,
    ends: Sequence[int] = (),
    where: Callable[[int], str] = "row {}".format,
) -> TokenTable:
    """Rows or batches (mappings, or tuples of ids, labels and a mask) as the families see them."""
    if not rows:
        return TokenTable.of_documents([], [])
    read = read_batches(rows, name="rows", pad_id=pad_id, max_rows=10**6, ends=ends).rows
    read = [dataclasses.replace(row, name=where(number)) for number, row in enumerate(read)]
    return TokenTable.of_documents((row.documents() for row in read), [row.name for row in read])


def check_labels(
    rows: Sequence[Any],
    tokenizer: Any,
    *,
    stop_ids: Sequence[int] | None = None,
    generation_config: Any = None,
    chat_template: str | None = None,
    where: Callable[[int], str] = "row {}".format,
    **facts: Any,
) -> list[Finding]:
    """What the families find in rows of ids and labels."""
    if stop_ids is None:
        stop_ids = served_stops([("generation_config", generation_config)], tokenizer)[0]
    ends = [tokenizer.eos_token_id, *stop_ids]
    table = table_of(rows, pad_id=tokenizer.pad_token_id, ends=ends, where=where)
    frame = Frame.probe(tokenizer, stop_ids=stop_ids, chat_template=chat_template)
    return label_findings(LabelFacts(table, frame, **facts))
