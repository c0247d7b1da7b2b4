"""Stop texts: what comes out does not depend on where the pieces were cut."""

from __future__ import annotations

import itertools

import pytest

from truetune.model.stop_texts import StopTexts


def cut(pieces: list[str], texts: list[str]) -> tuple[str, bool]:
    stops = StopTexts(texts)
    said = ""
    for piece in pieces:
        said += stops.add(piece)
        for text in filter(None, texts):
            assert text not in said
        if stops.found:
            return said, True
    return said + stops.finish(), False


@pytest.mark.parametrize(
    ("text", "texts", "expected", "found"),
    [
        ("one two three", ["two"], "one ", True),
        ("one two three", ["four"], "one two three", False),
        # It begins, and does not come.
        ("one tw", ["two"], "one tw", False),
        ("ababac", ["abac"], "ab", True),
        # The one that is whole first; of two that end together the longer.
        ("xabcd", ["abcd", "bc"], "xa", True),
        ("xabc", ["bc", "abc"], "x", True),
        ("a\n\nb", ["\n\n"], "a", True),
        ("abc", [], "abc", False),
        ("abc", [""], "abc", False),
        ("stop", ["stop"], "", True),
        ("été", ["t\u00e9"], "é", True),
    ],
)
def test_every_cut_gives_the_same_text(
    text: str, texts: list[str], expected: str, found: bool
) -> None:
    for size in range(len(text)):
        for places in itertools.combinations(range(1, len(text)), min(size, 4)):
            ends = [0, *places, len(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
            assert cut(pieces, texts) == (expected, found)
    assert cut(list(text), texts) == (expected, found)
