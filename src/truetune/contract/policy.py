"""What a run decides about prompts and answers beside the template and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

ReasoningPolicy = Literal["auto", "inline", "empty", "drop"]
HistoryPolicy = Literal["as-data", "no-reasoning"]
SystemPolicy = Literal["keep", "merge"]
REASONING: tuple[ReasoningPolicy, ...] = get_args(ReasoningPolicy)


@dataclass(frozen=True)
class Policy:
    """How rows meet a template that has no place for a part of them.

    Attributes:
        reasoning: auto (where the template takes it; refused if nowhere), inline (written between
            think markers before the answer), empty (a block that the prompt opens is closed at
            once, for rows without reasoning), drop (reasoning is left out of the data).
        think_markers: opening and closing marker for inline; None takes the template's own, or
            <think> and </think>.
        history: whether earlier turns show the template their reasoning.
        system: keep, or merge a system turn into the first user turn.
    """

    reasoning: ReasoningPolicy = "auto"
    think_markers: tuple[str, str] | None = None
    history: HistoryPolicy = "as-data"
    system: SystemPolicy = "keep"

    def as_dict(self) -> dict[str, object]:
        """What contract.json holds."""
        return {
            "reasoning": self.reasoning,
            "think_markers": list(self.think_markers) if self.think_markers else None,
            "history": self.history,
            "system": self.system,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Policy:
        """What `as_dict` wrote; what it lacks is as it was before there was a choice."""
        known = {
            name: record[name] for name in ("reasoning", "history", "system") if name in record
        }
        markers = record.get("think_markers")
        return cls(**known, think_markers=(markers[0], markers[1]) if markers else None)
