"""Hold out conversations that training does not contain.

Input:  conversations.
Does:   holds a share out, conversations of one prompt on one side; drops from a given evaluation
        set what is in training.
Output: two lists, in the order of the input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from truetune.data.conversation import Conversation
from truetune.findings import Finding

# Of fewer rows nothing is held out: five of them would say little, and each is needed.
HELD_OUT_FROM = 100


def hold_out(
    conversations: Sequence[Conversation],
    *,
    seed: int,
    share: float = 0.05,
    at_most: int = 200,
    at_least_rows: int = HELD_OUT_FROM,
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits into training and held-out.

    Two conversations stay together if they have the same prompt, or if the prompt of one is an
    earlier turn of the other: a dialogue that is there once in part and once in whole. Whole
    groups are taken in an order that depends on the seed and the prompts alone, not on the order
    of the rows, and skipped where they would exceed the number.

    Args:
        conversations: all of them.
        seed: the same seed gives the same split.
        share: of the conversations, 0 to 1, rounded to the nearest.
        at_most: held-out conversations.
        at_least_rows: below this nothing is held out.

    Returns:
        training, held-out; the second may be empty.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, not {share}")
    if len(conversations) < at_least_rows:
        return list(conversations), []
    groups = _groups(conversations)
    wanted = min(at_most, round(share * len(conversations)))
    held: set[int] = set()
    for name in sorted(groups, key=lambda name: _rank(seed, name)):
        if len(held) == wanted:
            break
        if len(held) + len(groups[name]) <= wanted:
            held.update(groups[name])
    return (
        [c for i, c in enumerate(conversations) if i not in held],
        [c for i, c in enumerate(conversations) if i in held],
    )


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _groups(conversations: Sequence[Conversation]) -> dict[str, list[int]]:
    """Positions by group; the name of a group is the least of its keys."""
    keys = [c.key() for c in conversations]
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for conversation, key in zip(conversations, keys, strict=True):
        for earlier in conversation.turn_keys()[:-1]:
            if earlier in parent:
                low, high = sorted((root(earlier), root(key)))
                parent[high] = low
    groups: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(root(key), []).append(position)
    return groups


def remove_overlap(
    train: Sequence[Conversation], evaluation: Sequence[Conversation]
) -> tuple[list[Conversation], list[Finding]]:
    """Drops evaluation conversations whose prompt is in training, at any turn.

    Returns:
        what is left, and a warning `eval-overlaps-train` with the count, if any was dropped.
    """
    seen = {key for c in train for key in (c.key(), *c.turn_keys())}
    kept = [c for c in evaluation if c.key() not in seen]
    if len(kept) == len(evaluation):
        return kept, []
    first = next(c for c in evaluation if c.key() in seen)
    return kept, [
        Finding(
            code="eval-overlaps-train",
            level="warning",
            what="evaluation rows were left out because their prompt is in the training data",
            where=first.where,
            count=len(evaluation) - len(kept),
            why="the loss on trained rows does not show how the model performs on new ones",
            fix="remove them from one of the two files",
        )
    ]
