"""Divide an encoded row into pieces for display: what is served, what is supervised, where it
stops.

input   Encoded, a contract
does    cuts each example at the changes of its mask, token for token
output  Piece values; the text of all pieces together is the decoded example
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from truetune.contract.encode import Encoded
from truetune.contract.example import SFTExample
from truetune.contract.remarks import REMARKS

if TYPE_CHECKING:
    from truetune.contract.contract import PromptContract

Kind = Literal["shared", "prompt", "context", "supervised", "stop"]
# What each kind is, for a legend.
KINDS: dict[Kind, str] = {
    "shared": "said in an earlier sequence",
    "prompt": "served prompt",
    "context": "between answers",
    "supervised": "supervised",
    "stop": "supervised stop",
}


@dataclass(frozen=True)
class Piece:
    """Tokens of one kind that stand together.

    Attributes:
        kind: see `KINDS`.
        ids: token ids.
        texts: the text that each id adds; "" if several ids make up one character.
    """

    kind: Kind
    ids: tuple[int, ...]
    texts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def pieces(contract: PromptContract, encoded: Encoded, index: int) -> list[Piece]:
    """The pieces of one example, in order."""
    example, shared = encoded[index], encoded.shared[index]
    texts = token_texts(contract, example.ids)
    found = []
    for kind, start, end in _spans(example, shared, set(contract.stop_ids)):
        found.append(Piece(kind, tuple(example.ids[start:end]), tuple(texts[start:end])))
    return found


# Examples of a run's page, and tokens of one; what is left out is counted.
_EXAMPLES, _TOKENS = 3, 400


def pictures(
    contract: PromptContract, encoded: Sequence[Encoded], limit: int
) -> list[dict[str, Any]]:
    """A few examples in pieces, as JSON has them: of the shortest, a middle and the longest row
    within the limit."""
    whole = sorted(
        (row for row in encoded if len(row) and max(len(e.ids) for e in row) <= limit),
        key=lambda row: max(len(e.ids) for e in row),
    )
    chosen = {id(row): row for row in whole[:1] + whole[len(whole) // 2 :][:1] + whole[-1:]}
    return [_picture(contract, row) for row in list(chosen.values())[:_EXAMPLES]]


def _picture(contract: PromptContract, encoded: Encoded) -> dict[str, Any]:
    index = max(range(len(encoded)), key=lambda at: len(encoded[at].ids))
    example = encoded[index]
    left, shown = _TOKENS, []
    for piece in pieces(contract, encoded, index):
        kept = piece.ids[:left], piece.texts[:left]
        if kept[0]:
            shown.append({"kind": piece.kind, "ids": kept[0], "texts": kept[1]})
        left -= len(kept[0])
    return {
        "where": encoded.row,
        "sequences": len(encoded),
        "tokens": len(example.ids),
        "supervised": sum(example.mask),
        "pieces": shown,
    }


def _spans(example: SFTExample, shared: int, stops: set[int]) -> Iterator[tuple[Kind, int, int]]:
    """(kind, start, end) of each piece."""
    mask, size = example.mask, len(example.ids)
    first = mask.index(1) if 1 in mask else size
    start = 0
    for position in range(1, size + 1):
        if position < size and mask[position] == mask[start] and position != shared:
            continue
        if mask[start]:
            last = position - 1
            is_stop = example.ids[last] in stops and (position == size or not mask[position])
            yield "supervised", start, last if is_stop else position
            if is_stop:
                yield "stop", last, position
        elif position <= shared:
            yield "shared", start, position
        else:
            yield ("prompt" if start < first else "context"), start, position
        start = position


def token_texts(contract: PromptContract, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it.

    A character may need several tokens: its text stands with the last of them.
    """
    texts = []
    held: list[int] = []
    for position, token in enumerate(ids):
        held.append(token)
        text = contract.tokens.decode_after(
            ids[max(0, position + 1 - len(held) - 8) : position + 1 - len(held)], held
        )
        # The decoder writes this character for bytes that are no whole character yet.
        if text.endswith("\ufffd") and len(held) < 8 and position + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text)
        held = []
    return texts


def story(encoded: Encoded) -> list[str]:
    """Explain in sentences how the row was encoded."""
    lines = []
    if len(encoded) == 1:
        turns = len(encoded.turns[0])
        lines.append(
            f"one sequence: {turns} supervised turn{'s' if turns != 1 else ''}"
            + (", each later prompt continues the turn before it" if turns > 1 else "")
        )
    else:
        lines.append(f"{len(encoded)} sequences: the template rewrites history")
        lines += [reason for reason in encoded.reasons if reason]
    if encoded.route:
        lines.append(
            f"reasoning reaches the template by: {_ROUTE_WORDS.get(encoded.route, encoded.route)}"
        )
    lines += [REMARKS[remark].what for remark in dict.fromkeys(encoded.remarks)]
    return lines


_ROUTE_WORDS = {
    "opened": "no field; the prompt opens the think block, and the completion continues inside it",
    "filled": "no field; it fills the block that the template leaves empty",
    "inline": "think markers before the answer, because of --reasoning inline",
    "markers in content": "think markers inside the content",
}
