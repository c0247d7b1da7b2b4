"""Find text in messages that is tokenized as control tokens, or that belongs elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from truetune.behaviour.text import script_of
from truetune.checks.conversations.rows import DataFacts, said
from truetune.checks.registry import check
from truetune.contract.specials import first_controls
from truetune.findings import Finding, percent, rows_finding, share


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
    "rendered; as plain text, all of their tokens are trained, including the questions",
}
_MESSAGES = (
    "pass the original messages, or split the text at the markers: "
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; '
    "the template then renders them, and only the answers are trained"
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


# ------------------------------------------------------------------ languages

_WORD = re.compile(r"[^\W\d_]{2,}")
_COMMON = 200
# Shorter texts say too little about their language.
_LEAST_LETTERS = 40


@check()
def one_language(facts: DataFacts) -> Iterator[Finding]:
    """No small group of rows is in another script or language than all the others."""
    if len(facts.train) < 20:
        return
    texts = [said(conversation) for conversation in facts.train]
    scripts = [_script(text) for text in texts]
    kinds = Counter(script for script in scripts if script)
    if not kinds:
        return
    main, number = kinds.most_common(1)[0]
    judged = sum(kinds.values())
    strange = [i for i, s in enumerate(scripts) if s not in ("", main)]
    if number >= 0.95 * judged:
        strange = sorted({*strange, *_foreign_words(texts, main)})
    if not strange or len(strange) > 0.05 * judged:
        return
    others = Counter(scripts[i] for i in strange if scripts[i] != main)
    named = ", ".join(f"{script} ({n:,})" for script, n in others.most_common(3))
    yield rows_finding(
        facts.names,
        strange,
        code="language-outlier",
        level="note",
        what=f"{share(len(strange), len(facts.train))} are in a different language from the others"
        + (f": {named}" if named else ""),
        why=f"{percent(number / judged)} of the rows are written in {main} letters; these rows "
        "share almost none of their common words",
        fix="inspect them, and remove those that do not belong in the data",
    )


def _script(text: str) -> str:
    """The script of most letters, by the first word of their Unicode names; "" for too few."""
    if text.isascii():
        return "LATIN" if len(text) >= _LEAST_LETTERS else ""
    counts = Counter(map(script_of, text[:2000]))
    for script, other in _ONE_LANGUAGE.items():
        counts[other] += counts.pop(script, 0)
    del counts[""]
    total = sum(counts.values())
    if not total or (total < _LEAST_LETTERS and not counts.keys() & _DENSE):
        return ""
    return counts.most_common(1)[0][0]


# One letter of these says as much as several of an alphabet.
_DENSE = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})
_ONE_LANGUAGE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


def _foreign_words(texts: list[str], main: str) -> list[int]:
    """Texts that use next to none of the words that the others use most."""
    if main in _DENSE:
        return []
    words = [_WORD.findall(text[:1500].lower()) for text in texts]
    counts: Counter[str] = Counter()
    for found in words:
        counts.update(set(found))
    common = {word for word, n in counts.most_common(_COMMON) if n >= 5}
    shares = np.array(
        [
            sum(w in common for w in found) / len(found) if len(found) >= 12 else np.nan
            for found in words
        ]
    )
    judged = shares[~np.isnan(shares)]
    # Where rows have few words in common anyhow (code, names), nothing can be said.
    if len(judged) < 20 or np.quantile(judged, 0.1) < 0.2:
        return []
    return [i for i, s in enumerate(shares) if not np.isnan(s) and s < 0.06]


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
