"""The value that leaves the data room.

Input:  normalised messages (see `messages.py`) or plain text.
Does:   holds them with their provenance, and hashes them.
Output: `Conversation`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation, or one plain text.

    Attributes:
        messages: OpenAI messages. `role` is system, developer, user, assistant or tool; `content`
            is always a str, '' where the data has none. Present only where the data has them:
            `reasoning_content` (str, not empty), `tool_calls` (`[{"type": "function", "id",
            "function": {"name", "arguments"}}]`, arguments an object wherever they are one),
            `name`, `tool_call_id`, `train` (bool).
        where: its place, which no other conversation of a load has: `file:line`, or `file row N`
            where the line does not tell rows apart; an instance of a row is named behind it.
        tools: `{"type": "function", "function": {...}}` each; None if the row has none.
        template_kwargs: the row's own `chat_template_kwargs`.
        text: the plain text; then `messages` is empty. None for a conversation.
    """

    messages: tuple[Message, ...]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    text: str | None = None

    def turn_keys(self) -> list[str]:
        """One hash for each assistant turn: of all messages before it. [] for plain text."""
        running = hashlib.sha256()
        keys = []
        for message in self.messages:
            if message["role"] == "assistant":
                keys.append(running.hexdigest())
            running.update(_canonical(message))
        return keys

    def key(self) -> str:
        """Hash of the prompt: all messages before the last assistant turn, or the text."""
        if self.text is not None:
            return hashlib.sha256(_encoded(self.text)).hexdigest()
        keys = self.turn_keys()
        if keys:
            return keys[-1]
        return hashlib.sha256(b"".join(map(_canonical, self.messages))).hexdigest()

    def digest(self) -> str:
        """Hash of everything that can be trained on; `where` is not part of it."""
        whole = hashlib.sha256()
        for message in self.messages:
            whole.update(_canonical(message, with_train=True))
        whole.update(_encoded([self.tools, self.template_kwargs, self.text]))
        return whole.hexdigest()


def text_of(row: Conversation) -> str:
    """All words of a row as one text; "" of a row without any."""
    if row.text is not None:
        return row.text.strip()
    return "\n\n".join(str(message["content"]) for message in row.messages).strip()


def _canonical(message: Message, *, with_train: bool = False) -> bytes:
    # Fields are sorted, but not the keys inside them: the order of tool arguments is rendered.
    # `train` says what is a target, not what the prompt is.
    return _encoded([[k, message[k]] for k in sorted(message) if with_train or k != "train"])


def _encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=repr).encode("ascii")
