"""Patterns of words -> all sentences that they stand for."""

from __future__ import annotations

import re
from functools import cache
from itertools import product

from truetune.lab.words import words

_CHOICE = re.compile(r"\[([^\]]*)\]")
_WITH_ARTICLE = ("river", "animal")


@cache
def wordings(pattern: str) -> tuple[str, ...]:
    """All wordings of a pattern: one alternative from each `[a|b]`, in order."""
    parts = _CHOICE.split(pattern)  # text, alternatives, text, alternatives, ..., text
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple("".join(chosen) for chosen in product(*choices))


@cache
def carried(relation: str) -> tuple[str, ...]:
    """All sentences of `carriers.yaml` that carry a relation, value last."""
    lists = words("building/carriers")
    patterns = lists["carriers"]
    if relation in ("sum", "difference"):
        patterns += lists["counting"]
    value = "the {v}" if relation in _WITH_ARTICLE else "{v}"
    found = []
    for carrier in (way for pattern in patterns for way in wordings(pattern)):
        for name in (way for pattern in lists["names"][relation] for way in wordings(pattern)):
            sentence = carrier.replace("{v}", value).replace("{name}", name)
            # A name at the head is capitalised where it is a word; `{s}`, `{a}` never are.
            found.append(sentence[0].upper() + sentence[1:])
    return tuple(found)
