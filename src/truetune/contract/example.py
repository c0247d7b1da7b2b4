"""The value that the contract hands to the engine: token ids and which of them are supervised.

Nothing here shifts, pads or cuts. Labels are shifted once, where batches are made.
"""

from __future__ import annotations

from typing import NamedTuple


class SFTExample(NamedTuple):
    """A token sequence with a mask of the same length.

    Attributes:
        ids: token ids, unpadded.
        mask: 1 where the token is a target (supervised), 0 where it is context.
    """

    ids: list[int]
    mask: list[int]

    @property
    def num_supervised(self) -> int:
        """Number of targets that a causal model can be trained on; the first token is never
        predicted."""
        return sum(self.mask[1:])
