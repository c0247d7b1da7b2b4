"""Text inside messages that becomes something else when it is tokenized, or belongs elsewhere."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from truetune.checks.conversations.rows import DataFacts, said
from truetune.checks.registry import check
from truetune.contract.specials import first_controls
from truetune.findings import Finding, percent, rows_finding, share


@check()
def control_tokens_absent(facts: DataFacts) -> Iterator[Finding]:
    """A special token written in a message is that token for the model, not its letters."""
    found = first_controls(facts.control, facts.train)
    if found:
        common = Counter(control.token for control in found.values()).most_common(3)
        shown = ", ".join(f"{token!r} ({n:,})" for token, n in common)
        first = next(iter(found.values()))
        turn = f" of a {first.role} turn" if first.role else ""
        rendered = sum(_begins_with(facts, row) for row in found)
        twice = rendered > 1 and 2 * rendered > len(found)
        yield rows_finding(
            facts.names,
            found,
            code="control-token-in-content",
            level="warning",
            what=f"{share(len(found), len(facts.train))} hold control tokens in their text: "
            f"{shown}; the first in {first.field}{turn}",
            why="the tokenizer makes the real token of it: the text opens or closes a turn of its "
            "own, in training and when served"
            + (
                f"; the text of {rendered:,} rows begins with one, as a conversation does that the "
                "template was applied to before: it would be applied twice"
                if twice
                else ""
            ),
            fix="give the messages as they were before they were rendered"
            if twice
            else "take them out, or break them up (`<| im_end |>`); truetune refuses such rows "
            "with --content-specials error",
        )


def _begins_with(facts: DataFacts, row: int) -> bool:
    """Whether the text of a turn begins with a control token, as a rendered conversation does."""
    contents = (message.get("content") for message in facts.train[row].messages)
    return any(
        isinstance(text, str) and text.lstrip().startswith(tuple(facts.control))
        for text in contents
    )


# ------------------------------------------------------------------ languages

_WORD = re.compile(r"[^\W\d_]{2,}")
_COMMON = 200
# Shorter texts say too little about their language.
_LEAST_LETTERS = 40


@check()
def one_language(facts: DataFacts) -> Iterator[Finding]:
    """A few rows in another script, or in other words, than all the others."""
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
        strange = sorted({*strange, *_foreign_words(texts, scripts, main)})
    if not strange or len(strange) > 0.05 * judged:
        return
    others = Counter(scripts[i] for i in strange if scripts[i] != main)
    named = ", ".join(f"{script} ({n:,})" for script, n in others.most_common(3))
    yield rows_finding(
        facts.names,
        strange,
        code="language-outlier",
        level="note",
        what=f"{share(len(strange), len(facts.train))} are in another language than the others"
        + (f": {named}" if named else ""),
        why=f"{percent(number / judged)} of the rows are written in {main} letters; these share "
        "next to none of their common words",
        fix="look at them; leave out those that are there by accident",
    )


def _script(text: str) -> str:
    """The script of most letters, by the first word of their Unicode names; "" for too few."""
    if text.isascii():
        return "LATIN" if len(text) >= _LEAST_LETTERS else ""
    counts = Counter(_script_of(char) for char in text[:2000])
    del counts[""]
    total = sum(counts.values())
    if not total or (total < _LEAST_LETTERS and not counts.keys() & _DENSE):
        return ""
    return counts.most_common(1)[0][0]


# One letter of these says as much as several of an alphabet.
_DENSE = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})
_ONE_LANGUAGE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


@lru_cache(maxsize=65536)
def _script_of(char: str) -> str:
    if not char.isalpha():
        return ""
    word = unicodedata.name(char, "").partition(" ")[0]
    return _ONE_LANGUAGE.get(word, word)


def _foreign_words(texts: list[str], scripts: list[str], main: str) -> list[int]:
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
    """A few answers far longer than all others are often several that were never split."""
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
        what=f"{share(len(rows), len(written))} have answers beyond {int(limit):,} characters, "
        f"the longest {int(lengths[rows[0]]):,}; the usual one has {int(np.exp(middle)):,}",
        why="often several rows that were never split, or a document in place of an answer",
        fix="look at them: they decide how much memory a step needs",
    )
