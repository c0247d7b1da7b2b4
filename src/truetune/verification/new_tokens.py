"""Test whether the trained model writes its new tokens.

input   the trained model, rows with the ids they were proved with (held-out ones if there are)
does    gives it the beginnings of rows whose answers hold a new token, and reads what it writes
output  counts for new_tokens.json; a warning where a token is never written

Rows that moved are not enough: a marker can have a trained row and still lose to every other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truetune.contract.contract import PromptContract
from truetune.findings import Finding
from truetune.generate import Sampling, replies_to_ids
from truetune.model.load import LoadedModel
from truetune.model.new_tokens import NewToken
from truetune.verification.rows import VerifyRow

# Enough to tell never from sometimes; answers cost more than the rest of the proof.
_PROMPTS = 8
_LONGEST = 512


@dataclass(frozen=True)
class Written:
    """A new token in the model's own answers.

    Attributes:
        text: of the token.
        asked: prompts whose trained answer holds it.
        written: of those, the ones in whose answer the model writes it.
        held_out: whether the prompts were kept out of training.
    """

    text: str
    asked: int
    written: int
    held_out: bool


def written_tokens(
    loaded: LoadedModel,
    contract: PromptContract,
    rows: Sequence[VerifyRow],
    tokens: Sequence[NewToken],
) -> list[Written]:
    """Ask up to eight of the rows' prompts, greedily.

    Args:
        loaded: returned to its previous mode.
        rows: the last trained answer of each is what it is asked for.
        tokens: of these, those that stand in such an answer are counted.
    """
    new = {token.id for token in tokens}
    asked = [(row, *parts) for row in rows if (parts := _last_answer(row, new))][:_PROMPTS]
    if not asked:
        return []
    # Half as much again as the longest way to a last marker.
    room = max(
        1 + max(i for i, token in enumerate(answer) if token in new) for _, _, answer in asked
    )
    sampling = Sampling(max_new_tokens=min(room + room // 2 + 8, _LONGEST))
    found = replies_to_ids(loaded, contract, [prompt for _, prompt, _ in asked], sampling)
    counts = []
    for token in tokens:
        own = [
            token.id in reply.ids
            for (_, _, answer), reply in zip(asked, found, strict=True)
            if token.id in answer
        ]
        if own:
            held_out = all(row.held_out for row, _, _ in asked)
            counts.append(Written(token.text, len(own), sum(own), held_out))
    return counts


def _last_answer(row: VerifyRow, new: set[int]) -> tuple[list[int], list[int]] | None:
    """Prompt and trained answer, as ids; None if no new token is in the answer."""
    ids, mask = row.examples[-1]
    if 1 not in mask:
        return None
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start and mask[start - 1]:
        start -= 1
    answer = ids[start:end]
    return (ids[:start], answer) if start and new & set(answer) else None


def written_findings(counts: Sequence[Written]) -> list[Finding]:
    """A warning for tokens that are never written, a note for the others."""
    if not counts:
        return []
    kind = "held-out" if counts[0].held_out else "trained"
    shares = ", ".join(f"{c.text!r} in {c.written} of {c.asked}" for c in counts)
    what = (
        f"where answers to {kind} prompts should contain new tokens, the trained model writes "
        f"{shares}"
    )
    if all(count.written for count in counts):
        return [Finding("new-tokens-written", "note", what)]
    return [
        Finding(
            "new-token-unwritten",
            "warning",
            what,
            count=sum(not count.written for count in counts),
            why="their embeddings were trained, but for too few steps or at too low a rate: "
            "another token is more likely wherever the new one should be",
            fix="train longer (--epochs) or at a higher --learning-rate, and check samples.jsonl",
        )
    ]
