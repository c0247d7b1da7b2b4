"""Judge rows by their ids, labels and stop tokens alone, whatever tool made them.

input   rows of (input_ids, labels, attention_mask), a tokenizer, the ids on which a server stops
does    runs every check of this room; each judges the effect, never a setting
output  findings that name the rows
"""

from __future__ import annotations

from truetune.checks import labels
from truetune.checks.labels import blocks, foreign, vocabulary
from truetune.checks.labels.causes import told_apart
from truetune.checks.labels.facts import LabelFacts
from truetune.checks.registry import ask
from truetune.findings import Finding, merged


def label_findings(facts: LabelFacts) -> list[Finding]:
    """All findings, the most severe first."""
    if strange := list(foreign.other_tokenizer(facts)):
        # Nothing else can be said of rows that are not in this vocabulary.
        return merged([*ask(vocabulary, facts), *strange])
    said: list[Finding] = []
    if (found := blocks.pieces(facts)) is not None:
        # A piece of a conversation lacks its prompt or its end: that is one cause, reported once.
        said += blocks.borders(facts, found)
        facts = blocks.without_pieces(facts, found)
    causes, facts = told_apart(facts)
    return merged([*said, *causes, *ask(labels, facts)])
