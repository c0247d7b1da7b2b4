"""Judge whether a server's parser finds the reasoning of the row, and values in one notation."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from truetune.contract.twin import Leaf
from truetune.contract.words import PART, is_tag, markers_of, side_of

# A value between tags that Python writes so, and JSON otherwise.
_PYTHON = re.compile(r">\s*(?:True|False|None)\s*<|>\s*[\[{][^<>\"]*'[^<>\"]*<")


def loose_reasoning(
    pieces: Sequence[str | int],
    leaves: Sequence[Leaf],
    prompt: str,
    pairs: Sequence[tuple[str, str]],
    marks: Collection[str],
    controls: re.Pattern[str],
    content: str,
) -> str:
    """What is wrong with the markers around the reasoning of a turn, "" for nothing.

    Args:
        pieces: see `Skeleton.pieces`.
        pairs: opening and closing markers of reasoning that are known of the template.
        marks: texts that templates cut reasoning and content at.
        content: of the row, which may hold such markers of its own.
    """
    places = [
        at for at, p in enumerate(pieces) if isinstance(p, int) and leaves[p].kind == "reasoning"
    ]
    if not places:
        return ""
    before, behind = str(pieces[places[0] - 1]), str(pieces[places[-1] + 1])
    in_front = (prompt[-200:] + before).rstrip()
    opening = next(
        (m for m in reversed(markers_of(in_front, controls)) if in_front.endswith(m)), ""
    )
    closings = markers_of(behind, controls)
    if side_of(opening)[1] < 0 and any(opening == close.strip() for _, close in pairs):
        return f"{opening!r}, which closes reasoning, precedes it"
    if not closings and not any(mark.strip() and mark.strip() in behind for mark in marks):
        return f"no marker closes it{f' after {opening!r}' if opening else ''}"
    name, side = side_of(opening)
    if side > 0 and is_tag(opening) and (name, -1) not in map(side_of, closings):
        return f"{opening!r} is not closed after it"
    # A parser cuts at the first closing marker: another one is text of the answer.
    said = [at for at, p in enumerate(pieces) if isinstance(p, int) and leaves[p].kind == "content"]
    after = max([places[-1] + 1, *said]) + 1
    later = "".join(p for p in pieces[after:] if isinstance(p, str))
    for opened, close in pairs:
        again = close.strip()
        if again in content:
            continue
        if again and is_tag(again) and opened.strip() == opening and again in later:
            return f"{again!r} occurs again after the answer"
    return ""


def mixed(leaves: Sequence[Leaf], pieces: Sequence[str | int]) -> int | None:
    """A text that is between tags in double quotes, as JSON has it, where another value is
    between tags in Python's notation; None for none."""
    text = "".join(p if isinstance(p, str) else PART for p in pieces)
    if not _PYTHON.search(text):
        return None
    for one, at, two in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if not isinstance(at, int) or not isinstance(leaves[at].value, str):
            continue
        if re.search(r">\s*\"$", str(one)) and re.match(r"\"\s*<", str(two)):
            return at
    return None
