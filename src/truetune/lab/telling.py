"""A fact in words: one fact, one wording, one clause.

input   a `Fact`, a wording, perhaps a frame around it
does    fills the blanks, capitals as English has them
output  a clause, a sentence, or a sentence cut before its value
"""

from __future__ import annotations

from dataclasses import dataclass

from truetune.lab import plain_wordings
from truetune.lab.carriers import carried
from truetune.lab.wordings import FORWARD, wordings
from truetune.lab.world import Fact, words_of

_ONES = words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = words_of("_ _ twenty thirty forty fifty sixty")


@dataclass(frozen=True)
class Telling:
    """A fact in one wording; `wording` is the template, `frame` a sentence around it or ''."""

    fact: Fact
    wording: str
    frame: str = ""


def number_word(n: int) -> str:
    """English for 0..69."""
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def sum_fact(a: int, b: int) -> Fact:
    """a + b as a fact."""
    return Fact(f"{a} + {b}", "sum", str(a + b))


def difference_fact(a: int, b: int) -> Fact:
    """a - b as a fact (b <= a)."""
    return Fact(f"{a} - {b}", "difference", str(a - b))


def tell(fact: Fact, wording: str, frame: str = "") -> str:
    """The sentence, capitalised, without a full stop."""
    text = clause(fact, wording, frame)
    return text[0].upper() + text[1:]


def clause(fact: Fact, wording: str, frame: str = "") -> str:
    """The same as it stands inside a sentence: only names begin with a capital."""
    if frame:
        return _uncapitalised(frame).format(s=fact.subject, clause=clause(fact, wording))
    template = _uncapitalised(wording)
    if fact.relation not in ("sum", "difference"):
        return template.format(s=fact.subject, v=fact.value)
    a, _, b = fact.subject.split()
    word_a, word_b, word_v = (number_word(int(n)) for n in (a, b, fact.value))
    return template.format(a=a, b=b, v=fact.value, A=word_a, b_word=word_b, v_word=word_v)


def _uncapitalised(template: str) -> str:
    return template if template.startswith("{") else template[0].lower() + template[1:]


def held_out_prefix(fact: Fact, wording: str) -> str:
    """A held-out wording cut just before its value (no trailing space).

    Raises:
        ValueError: the corpus uses the wording, or the value is not its last word.
    """
    patterns = (*FORWARD[fact.relation], *plain_wordings.FORWARD[fact.relation])
    told = {way for pattern in patterns for way in wordings(pattern)}.union(carried(fact.relation))
    if wording in told or not wording.endswith("{v}"):
        raise ValueError(f"not a held-out wording of {fact.relation}: {wording!r}")
    return tell(fact, wording).removesuffix(fact.value).rstrip()
