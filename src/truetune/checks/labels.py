"""What can be told from ids, labels and stop ids alone, whoever made them.

input   rows of (input_ids, labels, attention_mask), a tokenizer, the ids on which a server stops
does    every family below, in turn; each judges the effect, never a setting
output  findings that name the rows
who     the preflight of a run, `truetune check`, and audits of other people's trainers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from truetune.checks import (
    answers,
    blocks,
    foreign,
    prompts,
    reasoning,
    served,
    stops,
    targets,
    turns,
    vocabulary,
)
from truetune.checks.facts import LabelFacts, LossOn
from truetune.checks.markers import Markers, served_stop_ids
from truetune.checks.table import TokenTable
from truetune.findings import Finding, merged

CHECKS: tuple[Callable[[LabelFacts], Iterator[Finding]], ...] = (
    *targets.CHECKS,
    *answers.CHECKS,
    *turns.CHECKS,
    *vocabulary.CHECKS,
    *stops.CHECKS,
    *prompts.CHECKS,
    *reasoning.CHECKS,
    *served.CHECKS,
)


def label_findings(facts: LabelFacts) -> list[Finding]:
    """All findings of all families, the most severe first."""
    if strange := list(foreign.other_tokenizer(facts)):
        # Nothing else can be said of rows that are not in this vocabulary.
        outside = (finding for check in vocabulary.CHECKS for finding in check(facts))
        return merged([*outside, *strange])
    found = blocks.pieces(facts)
    if found is None:
        return merged(finding for check in CHECKS for finding in check(facts))
    # A piece of a conversation lacks its prompt or its end: that is one cause, told once.
    whole = blocks.without_pieces(facts, found)
    others = (finding for check in CHECKS for finding in check(whole))
    return merged([*blocks.borders(facts, found), *others])


def check_labels(
    rows: Iterable[Any],
    tokenizer: Any,
    *,
    stop_ids: Sequence[int] | None = None,
    generation_config: Any = None,
    chat_template: str | None = None,
    head_rows: int | None = None,
    loss_on: LossOn | None = None,
    max_length: int | None = None,
    where: Callable[[int], str] = "row {}".format,
) -> list[Finding]:
    """Judge token rows that anybody made.

    Args:
        rows: see `TokenTable.of_rows`: mappings or tuples of input_ids, labels and (where there
            is one) attention_mask, single rows or padded batches.
        tokenizer: the one that will be saved or served with the model.
        stop_ids: on which a server ends an answer; None takes those of `generation_config`, else
            the tokenizer's end token.
        generation_config: what will be saved or served: a GenerationConfig or a mapping.
        chat_template: what will be served, where it is not the tokenizer's own.
        head_rows: rows of embedding and head.
        loss_on: what was declared to be trained: assistant, last or all; None where nobody did.
        max_length: the length that rows were cut to; None looks for one.
        where: the name of row n, counted from 0.

    Returns:
        findings, the most severe first; their `rows` are the first 100 places.

    Raises:
        ValueError: a row without ids or labels, or with another number of them.
    """
    if stop_ids is None:
        stop_ids = served_stop_ids(generation_config, tokenizer)
    table = TokenTable.of_rows(rows, pad_id=tokenizer.pad_token_id, where=where)
    markers = Markers.probe(tokenizer, stop_ids=stop_ids, chat_template=chat_template)
    facts = LabelFacts(table, markers, head_rows, loss_on, max_length)
    return label_findings(facts)
