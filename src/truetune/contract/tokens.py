"""Text to ids and back, with the tokenizer's habits found by trying them.

Prompts are tokenized once, with no token added. A completion is encoded so that it gains no
prefix space, and is read back in the context of its prompt, because some decoders treat the
first token of a text specially.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

# Texts to put in front of a completion so that it is not encoded as the start of a text; the first
# that stays a token sequence of its own serves.
_ANCHORS = ("\n", ":", ".", "a", "0", "<", "|")
# Prompt tokens kept in front of a completion when it is decoded: enough to complete a character.
_CONTEXT = 8


class Tokens:
    """A tokenizer seen from the contract."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added, nothing cut."""
        if not texts:
            return []
        # verbose=False: a text beyond model_max_length is judged by the length policy.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def encode_completion(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Ids of a completion on its own, without a prefix space, for where joint encoding merges
        across the seam."""
        first: list[int] | None = None
        for anchor in _ANCHORS:
            head, joint = self.encode([anchor, anchor + text])
            if joint[: len(head)] != head:
                continue
            ids = joint[len(head) :]
            first = first or ids
            if self.decode_after(prompt_ids, ids) == text:
                return ids
        return first if first is not None else self.encode([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of ids, special tokens and spaces as they are."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def decode_after(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add after a prompt."""
        context = list(prompt_ids[-_CONTEXT:])
        head = self.decode(context)
        whole = self.decode([*context, *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def single_id(self, text: str) -> int | None:
        """The id of a text that is one token of the vocabulary, else None."""
        ids = self.encode([text])[0]
        # Read back, because one id may also be the unknown token.
        return ids[0] if len(ids) == 1 and self.decode(ids) == text else None

    def has_id(self, token: int) -> bool:
        """Whether the vocabulary has a token of this id."""
        known = 0 <= token < self.tokenizer.vocab_size or token in self.special_ids
        return known and self.tokenizer.convert_ids_to_tokens(token) is not None

    def normalised(self, text: str) -> str:
        """The text as the tokenizer's own normaliser leaves it, with the space marker undone."""
        if self._normaliser is None:
            return text
        return self._normaliser.normalize_str(text).replace("\u2581", " ")

    @cached_property
    def _normaliser(self) -> Any:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return getattr(backend, "normalizer", None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of added tokens: those that text is split at before anything is merged."""
        return frozenset(getattr(self.tokenizer, "added_tokens_decoder", {})) | frozenset(
            self.tokenizer.all_special_ids
        )

    @cached_property
    def added_texts(self) -> tuple[str, ...]:
        """The texts of `special_ids`."""
        return tuple(self.decode([token]) for token in sorted(self.special_ids))

    @property
    def unknown_id(self) -> int | None:
        return self.tokenizer.unk_token_id


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length in tokens of the longest common prefix."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
