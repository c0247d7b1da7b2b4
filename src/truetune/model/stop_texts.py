"""Truncate streamed text before the first stop text, without ever showing part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Holds back what could be the beginning of a stop text.

    What comes out does not depend on where the pieces were cut: the stop text that is whole first
    ends the text, of several that end at one place the longest.

    Attributes:
        found: whether one has come; nothing follows it.

    Args:
        texts: empty ones never stop.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text for text in texts if text]
        self.found = False
        self._held = ""

    def add(self, piece: str) -> str:
        """Text that belongs to the reply for certain."""
        held = self._held + piece
        places = [(at, text) for text in self.texts if (at := held.find(text)) >= 0]
        if places:
            self.found, self._held = True, ""
            at, _ = min(places, key=lambda place: (place[0] + len(place[1]), place[0]))
            return held[:at]
        keep = max((_begun(held, text) for text in self.texts), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return the held-back text at the end of the reply, because it was not a stop text."""
        held, self._held = self._held, ""
        return held


def _begun(held: str, stop: str) -> int:
    """How many letters at the end of a text are the beginning of a stop text."""
    most = min(len(held), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if held.endswith(stop[:n])), 0)
