"""One fact in one wording: a `Fact` and a pattern -> a clause, or a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from truetune.lab.words import words
from truetune.lab.world import Fact


@dataclass(frozen=True)
class Telling:
    """A fact in one wording; `wording` is the template, `frame` a sentence around it or ''."""

    fact: Fact
    wording: str
    frame: str = ""


def number_word(n: int) -> str:
    """English for 0..69."""
    ones, tens = words("building/plain")["ones"], words("building/plain")["tens"]
    if n < 20:
        return ones[n]
    return tens[n // 10 - 2] + (f"-{ones[n % 10]}" if n % 10 else "")


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
