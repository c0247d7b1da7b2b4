"""Find text in messages that is tokenized as control tokens, or that belongs elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from truetune.checks.conversations.rows import DataFacts
from truetune.checks.registry import check
from truetune.contract.specials import first_controls
from truetune.findings import Finding, rows_finding, share


@check()
def control_tokens_absent(facts: DataFacts) -> Iterator[Finding]:
    """Messages contain no control tokens: the model would read the token, not its letters."""
    found = first_controls(facts.control, facts.train)
    if not found:
        return
    common = Counter(control.token for control in found.values()).most_common(3)
    shown = ", ".join(f"{token!r} ({n:,})" for token, n in common)
    first = next(iter(found.values()))
    turn = f" of a turn of the {first.role}" if first.role else ""
    rendered = [row for row in found if _begins_with(facts, row)]
    twice = len(rendered) > 1 and 2 * len(rendered) > len(found)
    texts = twice and all(facts.train[row].text is not None for row in rendered)
    yield rows_finding(
        facts.names,
        found,
        code="control-token-in-content",
        level="warning",
        what=f"{share(len(found), len(facts.train))} contain control tokens in their text: "
        f"{shown}; the first is in {first.field}{turn}",
        why="the tokenizer turns the text into the token itself, in training and in serving"
        + (_RENDERED[texts].format(rows=len(rendered)) if twice else ""),
        fix=_MESSAGES
        if texts
        else "use the original messages, from before they were rendered"
        if twice
        else f"remove them, or break them up (`{_broken_up(common[0][0])}`)"
        # In plain text its author wrote the token for the model.
        + ("; --content-specials error makes truetune refuse such rows" if first.role else ""),
    )


# By whether the rows are plain text.
_RENDERED = {
    False: "; the text of {rows:,} rows begins with one, as rendered conversations do: the chat "
    "template would be applied twice",
    True: "; the text of {rows:,} rows begins with one: they are conversations that were already "
    "rendered; as plain text, all of their tokens are supervised, including the questions",
}
_MESSAGES = (
    "pass the original messages, or split the text at the markers: "
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; '
    "the template then renders them, and only the answers are supervised"
)


def _broken_up(token: str) -> str:
    """A token as text that is no token any more."""
    size = 2 if token[:2] in ("<|", "</", "<\uff5c", "[/") else 1
    return f"{token[:size]} {token[size:]}"


# Beside or inside a control token: a turn begins, and no document.
_SPEAKER = re.compile(r"user|human|assistant|system|model|inst\b", re.IGNORECASE)


def _begins_with(facts: DataFacts, row: int) -> bool:
    """Whether the text of a turn begins with a control token, as a rendered conversation does; or
    a plain text, which then names who speaks."""
    conversation, controls = facts.train[row], tuple(facts.control)
    contents = (m.get("content") for m in conversation.messages)
    if conversation.text is None:
        return any(isinstance(t, str) and t.lstrip().startswith(controls) for t in contents)
    text = conversation.text.lstrip()
    if not text.startswith(controls):
        return False
    token = re.compile("|".join(map(re.escape, facts.control)))
    return any(
        _SPEAKER.search(hit.group()) or _SPEAKER.match(text[hit.end() :].lstrip()[:12])
        for hit in token.finditer(text)
    )


# ------------------------------------------------------------------ lengths


@check()
def one_length(facts: DataFacts) -> Iterator[Finding]:
    """No small group of answers is far longer than all others."""
    lengths = np.array([len(answer) for answer in facts.answers])
    written = lengths[lengths > 0]
    if len(written) < 50:
        return
    logs = np.log(written)
    middle = float(np.median(logs))
    spread = max(float(np.quantile(logs, 0.95)) - middle, 0.5)
    limit = np.exp(middle + 4 * spread)
    rows = np.flatnonzero(lengths > limit).tolist()
    if not rows or len(rows) > 0.01 * len(written):
        return
    rows.sort(key=lambda i: -lengths[i])
    yield rows_finding(
        facts.names,
        rows,
        code="length-outlier",
        level="note",
        what=f"{share(len(rows), len(written))} have answers longer than {int(limit):,} characters "
        f"(the longest has {int(lengths[rows[0]]):,}, a typical one {int(np.exp(middle)):,})",
        why="such answers are often several rows that were never split, or a whole document",
        fix="inspect them: they determine how much memory a step needs",
    )
