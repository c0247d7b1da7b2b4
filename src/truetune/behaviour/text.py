"""Find what a text alone shows: that it repeats itself, repeats another text, or is written in a
different script.

Replies are untrusted: every reading here takes time in proportion to the text.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache


def normalised(text: str) -> str:
    """Unicode in its composed form, each stretch of whitespace one space, none around it."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# A circle: the end is one stretch, so many times over, of so many tokens at least.
_ROUNDS, _CIRCLE, _LONGEST_ROUND = 4, 16, 64
# In a long reply, the share of different runs of four tokens, and the share of its bytes that are
# left when it is compressed, below which it says the same over and over.
_LONG, _NEW_RUNS, _BYTES, _LEFT = 64, 0.35, 400, 0.12


def goes_round(ids: Sequence[int], text: str) -> bool:
    """Whether a text repeats itself: its end loops, hardly any run of four tokens in it is new, or
    it compresses to almost nothing."""
    if ends_in_circle(ids):
        return True
    if len(ids) >= _LONG:
        runs = Counter(tuple(ids[at : at + 4]) for at in range(len(ids) - 3))
        if len(runs) < _NEW_RUNS * (len(ids) - 3):
            return True
    data = text.encode("utf-8", "replace")
    return len(data) >= _BYTES and len(zlib.compress(data)) < _LEFT * len(data)


def ends_in_circle(ids: Sequence[Hashable]) -> bool:
    """Whether the end of a sequence is one stretch of at most 64 items, four times or more and at
    least 16 items long."""
    number = len(ids)
    for width in range(1, min(_LONGEST_ROUND, number // _ROUNDS) + 1):
        length = max(_ROUNDS * width, _CIRCLE)
        if length > number:
            break
        if all(ids[at] == ids[at - width] for at in range(number - length + width, number)):
            return True
    return False


# Words from which a reply that begins with the question repeats it, and does not just begin alike.
_FEWEST_WORDS = 4
_FIRST_WORDS = 8


def says_again(answer: str, prompt: str, expected: str) -> bool:
    """Whether an answer begins with words of the prompt, which the row's own answer does not.

    The first eight words, or all of them where they are at least four.
    """
    said, asked, wanted = (normalised(text) for text in (answer, prompt, expected))
    words = said.split()[:_FIRST_WORDS]
    if len(words) < _FEWEST_WORDS:
        return False
    start = " ".join(words)
    own = " ".join(wanted.split()[: len(words)])
    return start in asked and not (own and (own in asked or start in wanted))


# Letters that say in which script a text is written.
_FEWEST_LETTERS = 12
_OF_CHINA_AND_JAPAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")


def other_script(text: str, known: str) -> bool:
    """Whether most letters of a text belong to a script that the known text does not use."""
    mine = _scripts(text)
    if sum(mine.values()) < _FEWEST_LETTERS:
        return False
    script, count = mine.most_common(1)[0]
    return 2 * count > sum(mine.values()) and script not in _scripts(known)


def _scripts(text: str) -> Counter[str]:
    found = Counter(script_of(char) for char in text)
    del found[""]
    return Counter(
        "CJK" if script in _OF_CHINA_AND_JAPAN else script for script in found.elements()
    )


@lru_cache(maxsize=65536)
def script_of(char: str) -> str:
    """The first word of a letter's Unicode name, its script; "" for what is no letter."""
    return unicodedata.name(char, "").partition(" ")[0] if char.isalpha() else ""
