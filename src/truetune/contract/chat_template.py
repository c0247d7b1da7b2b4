"""ChatML-lite in plain Python: the smallest chat format, and its mask.

It renders byte for byte what `templates/chatml-lite.jinja` renders; the lab and tests use it as
an oracle for the contract, which only knows Jinja.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from truetune.contract.example import SFTExample
from truetune.contract.tokens import common_prefix


class Encoder(Protocol):
    """Anything that turns text into token ids."""

    def encode(self, text: str) -> list[int]: ...


class ChatTemplate:
    """A small chat template: a user turn is "<|user|>\\n{content}\\n", an assistant turn
    "<|assistant|>\\n{content}<|end|>"."""

    USER: ClassVar[str] = "<|user|>"
    ASSISTANT: ClassVar[str] = "<|assistant|>"
    END: ClassVar[str] = "<|end|>"

    @classmethod
    def render(cls, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render the whole conversation as text.

        Raises:
            ValueError: there are no messages, a role is neither user nor assistant, or a content is
                not text.
        """
        return "".join(text for text, _ in cls._pieces(messages))

    @classmethod
    def render_with_mask(
        cls, messages: Sequence[Mapping[str, Any]], tokenizer: Encoder
    ) -> SFTExample:
        """Encode `render(messages)`, with mask 1 on assistant content and `<|end|>`.

        If the tokenizer merges text across the boundary between a role marker and an answer, the
        token with the answer's first characters is supervised, so that no part of an answer is left
        out.

        Args:
            messages: dicts with role and content.
            tokenizer: has `encode(str) -> list[int]` and adds no special tokens of its own.

        Raises:
            ValueError: as for `render`.
        """
        pieces = cls._pieces(messages)
        ids = list(tokenizer.encode("".join(text for text, _ in pieces)))
        mask = [0] * len(ids)
        before = ""
        for text, supervised in pieces:
            if supervised:
                start = common_prefix(list(tokenizer.encode(before)), ids)
                through = list(tokenizer.encode(before + text))
                end = common_prefix(through, ids)
                # A last token that goes on into the next turn still holds the answer's end.
                end += end < len(through) and end < len(ids)
                mask[start:end] = [1] * (end - start)
            before += text
        return SFTExample(ids, mask)

    @classmethod
    def _pieces(cls, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """(text, supervised) in order; the texts concatenate to the rendering."""
        if not messages:
            raise ValueError("a conversation needs at least one message")
        pieces: list[tuple[str, bool]] = []
        for number, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if not isinstance(content, str):
                raise ValueError(f"message {number}: content must be a string, not {content!r}")
            if role == "user":
                pieces.append((f"{cls.USER}\n{content}\n", False))
            elif role == "assistant":
                pieces.append((f"{cls.ASSISTANT}\n", False))
                pieces.append((f"{content}{cls.END}", True))
            else:
                raise ValueError(f"message {number}: unknown role {role!r}; use user or assistant")
        return pieces
