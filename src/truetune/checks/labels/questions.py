"""Find lost questions: different answers after the same prompt, which contains no question."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from truetune.checks.labels.facts import LabelFacts, has_header, of_turns, unproved
from truetune.checks.labels.served import loosened
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding, share

# Different answers after one prompt that make it a pattern.
_MANY = 3


@check(unproved, has_header, of_turns)
def questions_there(facts: LabelFacts) -> Iterator[Finding]:
    """No prompt without a question has many different answers."""
    table, header, cuts = facts.table, facts.frame.answer_start_ids, facts.separators
    if cuts is None or not cuts.question.strip() or cuts.question.strip() not in cuts.head:
        return
    starts = table.find(header)
    counted = np.concatenate([[0], np.cumsum(table.supervised)])
    rows = table.rows_of(starts)
    ends = table.starts[rows + 1]
    ends[:-1] = np.where(rows[1:] == rows[:-1], starts[1:], ends[:-1])
    trained = counted[ends] - counted[np.minimum(starts + len(header), ends)] > 0
    # The last trained answer of a row: earlier ones may greet.
    last = {
        int(row): (table.ids[table.starts[row] : at].tobytes(), table.ids[at:end].tobytes())
        for at, end, row in zip(starts[trained], ends[trained], rows[trained], strict=True)
    }
    groups: dict[bytes, dict[int, bytes]] = {}
    for row, (prompt, said) in last.items():
        groups.setdefault(prompt, {})[row] = said
    bad: list[int] = []
    for prompt, answers in groups.items():
        ids = np.frombuffer(prompt, dtype=table.ids.dtype).tolist()
        if len(set(answers.values())) >= _MANY and asks_nothing(facts, ids):
            bad += answers
    if bad:
        shown = facts.tokens.decode(table.row_ids(bad[0]))[:80]
        yield rows_finding(
            facts.names,
            bad,
            code="question-missing",
            level="error" if len(bad) > 0.01 * len(table) else "warning",
            what=f"{share(len(bad), len(table))} have no question: different answers follow the "
            "same prompt",
            why="the user turn is empty or missing; templates drop turns of roles that they do "
            f"not know (human, gpt): the rows begin with {shown!r}",
            fix="rename the roles to user and assistant, check that the data contains the "
            "questions, and render the rows again",
        )


def asks_nothing(facts: LabelFacts, prompt: list[int]) -> bool:
    """Whether a prompt has only a system turn, or an empty turn."""
    if facts.separators is None:
        return False
    text = facts.tokens.decode(prompt)
    pattern = re.compile(loosened(facts.separators.question.strip(), facts.tokens.added_texts))
    asked = [
        hit
        for hit in pattern.finditer(text)
        if (hit.groupdict().get("role") or "user") not in ("system", "developer")
    ]
    return not asked or not text[asked[-1].end() :].strip()
