"""Settings of a run about prompts and answers, besides the template and its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from truetune.contract.shape import Markers, canonical, split_reasoning

if TYPE_CHECKING:
    from truetune.contract.behaviour import Behaviour

ReasoningPolicy = Literal["auto", "inline", "empty", "drop"]
HistoryPolicy = Literal["as-data", "no-reasoning"]
SystemPolicy = Literal["keep", "merge"]
WordsPolicy = Literal["refuse", "keep"]


@dataclass(frozen=True)
class Policy:
    """How to treat rows with parts for which the template has no place.

    Attributes:
        reasoning: auto (passed to the template; rows are refused if it has no place for it),
            inline (written between think markers before the answer), empty (for rows without
            reasoning, a block that the prompt opens is closed at once), drop (reasoning is left
            out of the data).
        think_markers: opening and closing marker for inline; None means the template's own, or
            <think> and </think>.
        history: whether the template receives the reasoning of earlier turns.
        system: keep, or merge a system turn into the first user turn.
        template_words: refuse answers to which the template adds words, or keep: they become
            targets, and are counted.
    """

    reasoning: ReasoningPolicy = "auto"
    think_markers: tuple[str, str] | None = None
    history: HistoryPolicy = "as-data"
    system: SystemPolicy = "keep"
    template_words: WordsPolicy = "refuse"

    def as_dict(self) -> dict[str, object]:
        """Return the policy as contract.json contains it."""
        return {
            "reasoning": self.reasoning,
            "think_markers": list(self.think_markers) if self.think_markers else None,
            "history": self.history,
            "system": self.system,
            "template_words": self.template_words,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Policy:
        """Restore a policy from the output of `as_dict`; missing settings have their earlier fixed
        values."""
        known = {
            name: record[name]
            for name in ("reasoning", "history", "system", "template_words")
            if name in record
        }
        markers = record.get("think_markers")
        return cls(**known, think_markers=(markers[0], markers[1]) if markers else None)

    def prepared(
        self, messages: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]
    ) -> list[dict[str, Any]]:
        """Return the messages in canonical form, with reasoning omitted and the system turn merged
        if requested.

        Args:
            pairs: think markers that the template knows.

        Raises:
            UnfaithfulTemplate: content that is no text, reasoning or tool call.
        """
        made = [canonical(message) for message in messages]
        if self.reasoning == "drop":
            # Reasoning is in the content too, between the template's markers or the usual ones.
            known = (*pairs, (Markers().open, Markers().close))
            made = _without_reasoning([split_reasoning(message, known) for message in made])
        return _merged_system(made) if self.system == "merge" else made

    def past(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return earlier turns as they are passed to the template."""
        return _without_reasoning(messages) if self.history == "no-reasoning" else messages

    def routes(self, seen: Behaviour, messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """Return the reasoning routes of a conversation, in the order in which they are tried."""
        if not any(message.get("reasoning_content") for message in messages):
            return ("none",)
        if self.reasoning == "inline":
            return ("inline",)
        return seen.routes or ("reasoning_content",)

    def markers(self, seen: Behaviour) -> Markers:
        """What is around reasoning that is written into the content."""
        if self.think_markers:
            opening, closing = self.think_markers
            return Markers(opening, closing, f"{opening}\n", f"\n{closing}\n\n")
        return seen.markers or Markers()


def _without_reasoning(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


def _merged_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A first system turn put before the first user turn, as its text."""
    if len(messages) < 2 or messages[0]["role"] not in ("system", "developer"):
        return messages
    if messages[1]["role"] != "user":
        return messages
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}".strip()
    return [{**messages[1], "content": text}, *messages[2:]]
