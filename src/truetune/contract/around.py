"""Judge the text directly next to a part of a turn: whether it changes what a parser reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

from truetune.contract.tokens import common_prefix
from truetune.contract.twin import Leaf, in_json_forms

# A sign that belongs to no format where it stands against a part of a call.
_SIGNS = frozenset("!?.+*#$%@^~-\u2026")
# The quote that holds a part, and what is between the two.
_OPENED = re.compile(r"[\s:,=\[({>](\\*[\"'`])([^\"'`\n]*)$")
_EXPRESSION = re.compile(r"[\[({:=/]")


def glued(leaf: Leaf, before: str, behind: str, *, quoted: bool = True) -> bool:
    """Whether something next to a part of a call turns it into a different one: a sign or a digit,
    or anything between the part and its quotes.

    Args:
        quoted: whether the part may be in quotes.
    """
    if leaf.kind in ("reasoning", "content"):
        return False
    if not isinstance(leaf.value, str) and (
        re.search(r"\d$", before) or re.match(r"\d|\.\d", behind)
    ):
        return True
    opened = _OPENED.search(before) if quoted else None
    if opened:
        inside, closed, _ = behind.partition(opened[1])
        if closed and not re.search(r"[\"'`\n]", inside):
            rest = opened[2] + inside
            if leaf.kind in ("name", "key") and _EXPRESSION.search(rest):
                return False
            return not (_is_space(opened[2], leaf.around[0]) and _is_space(inside, leaf.around[1]))
    first, last = before[-1:], behind[:1]
    if leaf.kind in ("value", "arguments"):
        return first in _SIGNS or last in _SIGNS
    # Names have a namespace before them, keys the dashes or dots of an option.
    plain = first == "." and (leaf.kind == "key" or re.search(r"\w\.$", before) is not None)
    signed = first in _SIGNS and not plain and not (leaf.kind == "key" and first == "-")
    return signed or last in _SIGNS


def in_quotes(pieces: Sequence[str | int], piece: int, at: int = 0) -> bool:
    """Whether a quote is open at a place, judged by the number of quotes before it."""
    before = "".join(p for p in pieces[:piece] if isinstance(p, str))
    return (before + str(pieces[piece])[:at]).count('"') % 2 == 1


def _is_space(text: str, own: str) -> bool:
    """Whether a text is empty, or is the row's own outer whitespace in one of its forms."""
    return not text or text in (own, repr(own)[1:-1], *in_json_forms(own))


def bare(piece: str | int, controls: re.Pattern[str] | None) -> str:
    """The text, with a tag in place of each control token."""
    return controls.sub("<\x01>", str(piece)) if controls else str(piece)


def listed(before: str, behind: str) -> bool:
    """Whether a key is the first of a pair in a list, and not the key of its value."""
    opened = re.search(r"[\[(]\s*(\\*[\"'])$", before)
    return opened is not None and re.match(re.escape(opened[1]) + r"\s*,", behind) is not None


def quoted(before: str, behind: str) -> bool:
    """Whether a number, true, false or null is between quotes, as a JSON string does."""
    quote = re.search(r"[:,\[]\s*(\\*[\"'])$", before)
    return quote is not None and behind.startswith(quote[1])


def is_cut_from(short: str, full: str) -> bool:
    """Whether `short` is `full` with one contiguous piece removed."""
    both = common_prefix(short, full) + common_prefix(short[::-1], full[::-1])
    return both >= len(short)
