"""Compare llama.cpp's ids with a tokenizer's, and find the pre-tokenizer that makes them equal.

input   a vocabulary, its contract
does    tries llama.cpp's pre-tokenizers on texts in twenty scripts, each in a minimal file with the
        vocabulary, until one gives the tokenizer's ids: llama.cpp's own converter recognises
        tokenizers by a hash, and refuses all others
output  the vocabulary with its pre-tokenizer
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.errors import TruetuneError, UsageError
from truetune.exporting.gguf_file import write_trial
from truetune.exporting.gguf_vocabulary import Vocabulary
from truetune.servers.llama_cpp import LlamaCpp, serving
from truetune.servers.scripts import TEXTS

# llama.cpp's byte-level pre-tokenizers, one of each behaviour, likeliest first. It knows them by
# name; which one a tokenizer is, its ids decide.
PRE_TOKENIZERS = (
    *("qwen2", "llama-bpe", "smaug-bpe", "gpt-2", "gpt-4o", "tekken", "qwen35", "deepseek-v3"),
    *("smollm", "command-r", "deepseek-llm", "deepseek-coder", "default", "seed-coder", "falcon"),
    *("bailingmoe", "superbpe", "kimi-k2", "glm4", "minicpm5", "youtu", "viking", "poro-chat"),
)
# Pieces that the tokenizer cuts 1234 into, and the pre-tokenizers that do the same: tried first.
_DIGITS = {
    4: ("qwen2", "tekken", "smollm", "qwen35", "command-r"),
    2: ("llama-bpe", "smaug-bpe", "gpt-4o", "deepseek-v3"),
    1: ("gpt-2", "default"),
}


@dataclass(frozen=True)
class Compared:
    """llama.cpp's ids compared with the tokenizer's.

    Attributes:
        texts: compared.
        wrong: texts with other ids.
        normalised: texts with other ids that have the same ones once they are in the tokenizer's
            own Unicode form.
    """

    texts: int
    wrong: tuple[str, ...]
    normalised: tuple[str, ...]


# Added tokens of a tokenizer that are tried beside the texts; some have a thousand reserved ones.
_MOST_ADDED = 96


def texts_of(contract: PromptContract) -> tuple[str, ...]:
    """The texts on which a tokenizer is compared: those of twenty scripts, and its added tokens,
    the last ones first, because a run's own are among them."""
    added = [t for t in dict.fromkeys(contract.tokens.added_texts[::-1]) if t.strip()]
    return (*TEXTS, *[f"a{text}b" for text in added[:_MOST_ADDED]])


def compare_ids(
    server: LlamaCpp, contract: PromptContract, texts: Sequence[str], *, most_wrong: int = 0
) -> Compared:
    """Tokenize texts with both.

    Args:
        most_wrong: stop after this many differences; 0 never stops early.
    """
    wrong, normalised = [], []
    for text, own in zip(texts, contract.tokens.encode(texts), strict=True):
        if server.tokenize(text) == own:
            continue
        form = _own_form(contract, text, own)
        if form is not None and server.tokenize(form) == own:
            normalised.append(text)
            continue
        wrong.append(text)
        if most_wrong and len(wrong) >= most_wrong:
            break
    return Compared(len(texts), tuple(wrong), tuple(normalised))


def _own_form(contract: PromptContract, text: str, own: list[int]) -> str | None:
    """The text in the Unicode form that the tokenizer makes of it, where that is another."""
    for form in ("NFC", "NFKC"):
        other = unicodedata.normalize(form, text)
        if other != text and contract.tokens.encode([other])[0] == own:
            return other
    return None


def choose_pre_tokenizer(
    vocabulary: Vocabulary, contract: PromptContract, folder: Path
) -> tuple[Vocabulary, Compared]:
    """The vocabulary with the pre-tokenizer that gives the tokenizer's ids.

    Args:
        folder: for trial files, which are removed.

    Raises:
        UsageError: no pre-tokenizer does.
    """
    nearest: tuple[int, str, Compared] | None = None
    names = _ordered(contract) if vocabulary.model == "gpt2" else ("default",)
    for name in names:
        tried = dataclasses.replace(vocabulary, pre=name)
        path = folder / "trial.gguf"
        try:
            write_trial(path, tried)
            with serving(path, context=64) as server:
                found = compare_ids(server, contract, texts_of(contract), most_wrong=3)
        except TruetuneError as error:
            if error.code != "llama-cpp-failed":
                raise
            continue  # a name that this version of llama.cpp does not know
        finally:
            path.unlink(missing_ok=True)
        if not found.wrong:
            return tried, found
        if nearest is None or len(found.wrong) < nearest[0]:
            nearest = (len(found.wrong), name, found)
    shown = nearest[2].wrong[0] if nearest else TEXTS[0]
    raise UsageError(
        "llama.cpp has no pre-tokenizer that reproduces this tokenizer's ids",
        where=repr(shown[:80]),
        why=f"{len(names)} pre-tokenizers were tried on {len(TEXTS)} texts in twenty scripts"
        + (f"; the closest is {nearest[1]}" if nearest else ""),
        fix="use another server with the merged model: truetune export RUN --to merged",
        code="gguf-tokenizer",
    )


def _ordered(contract: PromptContract) -> list[str]:
    """The pre-tokenizers, those first that cut digits as this tokenizer does."""
    backend = contract.tokenizer.backend_tokenizer
    pieces = 1
    if backend.pre_tokenizer is not None:
        pieces = len(backend.pre_tokenizer.pre_tokenize_str("1234"))
    return list(dict.fromkeys([*_DIGITS.get(pieces, ()), *PRE_TOKENIZERS]))
