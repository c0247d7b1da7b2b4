"""Encode and decode text; the tokenizer's peculiarities are found by trial.

Prompts are tokenized once, with no token added. A completion is encoded so that it gains no
prefix space, and is read back in the context of its prompt, because some decoders treat the
first token of a text specially.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

# Texts to put before a completion so that it is not encoded as the start of a text; the first
# that stays a token sequence of its own serves.
_ANCHORS = ("\n", ":", ".", "a", "0", "<", "|")
# Prompt tokens kept before a completion when it is decoded: enough to complete a character.
_CONTEXT = 8
_MOST_CONTEXTS = 10_000
# Characters of a prompt from which it is cut at each of its splitting tokens.
_LONG = 4_000


class Tokens:
    """A tokenizer as the contract uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added, nothing cut."""
        if not texts:
            return []
        if self._backend is not None and self._backend.truncation is self._backend.padding is None:
            made = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in made]
        return self._encode_through_wrapper(texts)

    def _encode_through_wrapper(self, texts: Sequence[str]) -> list[list[int]]:
        # verbose=False: a text beyond model_max_length is judged by the length policy.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def encode_turns(self, pairs: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
        """text -> ids for pairs of a prompt and a longer text, which begins with it or does not.

        Where the tokenizer splits at the last special token of the prompt, what is before it is
        encoded once for both.
        """
        parts: dict[str, list[str]] = {}
        for prompt, through in pairs:
            if len(prompt) > _LONG and self._splitting is not None:
                # Many turns have most of their text in common: each piece is encoded once.
                for text in (prompt, through):
                    if text not in parts:
                        parts[text] = self._pieces(text)
                continue
            cut = self._cut(prompt) if through.startswith(prompt) else 0
            parts.setdefault(prompt, [prompt[:cut], prompt[cut:]])
            parts.setdefault(through, [through[:cut], through[cut:]])
        pieces = dict.fromkeys(piece for some in parts.values() for piece in some if piece)
        ids_of = dict(zip(pieces, self.encode(list(pieces)), strict=True)) | {"": []}
        return {
            text: list(itertools.chain.from_iterable(ids_of[piece] for piece in some))
            for text, some in parts.items()
        }

    def _pieces(self, text: str) -> list[str]:
        """The text, split after each of its splitting tokens."""
        assert self._splitting is not None
        ends = [found.end() for found in self._splitting.finditer(text)]
        return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]

    def _cut(self, text: str) -> int:
        """The position at which a text may be split: after its last splitting token, or 0."""
        if self._splitting is None:
            return 0
        # The last one is near the end: a generation prompt begins with it.
        ends = [found.end() for found in self._splitting.finditer(text, max(0, len(text) - 200))]
        return ends[-1] if ends else 0

    @cached_property
    def _splitting(self) -> re.Pattern[str] | None:
        """Special tokens after which text may be split without changing its ids, found by trying.

        A tokenizer separates added tokens from the text before it merges anything. But some add a
        space before what follows, or strip one, so each token is tried with what may follow.
        """
        tries = ("a", " a", "\n", "\n\na", "\u00e9", "\u6f22", "assistant\nThe 1", "  x", ".")
        # A shorter token that begins like a longer one would cut inside it. In their order, a text
        # stands right before those that begin with it.
        ordered = sorted(set(self.added_texts))
        texts = [
            text
            for text, after in itertools.zip_longest(ordered, ordered[1:], fillvalue="")
            if len(text) >= 4 and not after.startswith(text)
        ]
        ends = self.encode(tries)
        heads = self.encode(["z" + text for text in texts])
        joint = self.encode(["z" + text + end for text in texts for end in tries])
        found = [
            text
            for i, text in enumerate(texts)
            if joint[i * len(tries) : (i + 1) * len(tries)] == [heads[i] + end for end in ends]
        ]
        longest = sorted(found, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest))) if found else None

    @cached_property
    def _backend(self) -> Any:
        """The library's own tokenizer under transformers' wrapper, where the two do the same."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            return None
        probes = ["Hello  world\n\n", " a\u0301 \u6f22\U0001f600", "<s>x</s> y"]
        probes += [f"a{text} b" for text in self.tokenizer.all_special_tokens[:8]]
        expected = self._encode_through_wrapper(probes)
        found = [e.ids for e in backend.encode_batch_fast(probes, add_special_tokens=False)]
        same = found == expected and all(
            backend.decode(ids, skip_special_tokens=False) == self._decode_through_wrapper(ids)
            for ids in expected
        )
        return backend if same else None

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
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=False))
        return self._decode_through_wrapper(ids)

    def _decode_through_wrapper(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def decode_after(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add after a prompt."""
        context = tuple(prompt_ids[-_CONTEXT:])
        head = self._contexts.get(context)
        if head is None:
            if len(self._contexts) > _MOST_CONTEXTS:
                self._contexts.clear()
            head = self._contexts[context] = self.decode(context)
        whole = self.decode([*context, *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def gains_space(self, prompt_ids: Sequence[int], first: int, written: str) -> bool:
        """Whether the first token after a prompt reads with a space that was not written."""
        if written[:1] == " ":
            return False
        key = (*prompt_ids[-2:], first)
        if key not in self._gains:
            self._gains[key] = self.decode_after(prompt_ids[-2:], [first])[:1] == " "
        return self._gains[key]

    @cached_property
    def _contexts(self) -> dict[tuple[int, ...], str]:
        return {}

    @cached_property
    def _gains(self) -> dict[tuple[int, ...], bool]:
        return {}

    def single_id(self, text: str) -> int | None:
        """The id of a text that is one token of the vocabulary, else None."""
        ids = self.encode([text])[0]
        # Read back, because one id may also be the unknown token.
        return ids[0] if len(ids) == 1 and self.decode(ids) == text else None

    def named(self, ids: Iterable[int], most: int | None = None) -> str:
        """Tokens with their ids, to be read; "" for none."""
        shown = itertools.islice(ids, most)
        return ", ".join(f"{self.decode([i])!r} ({i})" for i in shown)

    def has_id(self, token: int) -> bool:
        """Whether the vocabulary has a token of this id."""
        known = 0 <= token < self.tokenizer.vocab_size or token in self.special_ids
        return known and self.tokenizer.convert_ids_to_tokens(token) is not None

    def normalised(self, text: str) -> str:
        """The text as the tokenizer's own normaliser leaves it, read back: where it writes spaces
        as a letter, that letter comes back as a space."""
        if self._normaliser is not None:
            text = self._normaliser.normalize_str(text)
        return text.replace("\u2581", " ") if self._space_letter else text

    @cached_property
    def _space_letter(self) -> bool:
        return self.decode(self.encode(["a\u2581a"])[0]).strip() == "a a"

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


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix of two lists of ids, or of two texts."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    # Comparing slices is much faster than comparing one by one.
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return next(i for i in range(low, high) if a[i] != b[i])
