"""Describe a tokenizer in llama.cpp's terms.

input   a contract
does    takes tokens, merges and special tokens from the tokenizer as AutoTokenizer opens it; makes
        scores of merges where llama.cpp merges by scores; which token begins texts, and whether a
        space does, is found by encoding
output  Vocabulary, without the pre-tokenizer, which `gguf_ids.py` chooses
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.errors import UnfaithfulTemplate, UsageError
from truetune.findings import Finding

# gguf's numbers of token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer.

    Attributes:
        model: llama.cpp's kind: gpt2 merges bytes by rank, llama merges pieces by score.
        tokens, types, scores: one an embedding row; scores are () if it needs none.
        merges: "left right" each, in their order.
        pre: llama.cpp's pre-tokenizer.
        special: id by gguf's name of the role: bos, eos, eot, eom, unk, pad.
        add_bos: whether llama.cpp puts the first token before every text.
        add_space: whether it puts a space before a text.
        name: that the file gives itself; llama.cpp strips spaces behind special tokens by it.
        template: chat templates, one or several by name.
    """

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    add_bos: bool
    add_space: bool
    template: str | dict[str, str]
    pre: str = "default"
    name: str = ""


def vocabulary_of(contract: PromptContract, rows: int) -> tuple[Vocabulary, list[Finding]]:
    """The vocabulary of a contract's tokenizer, without a pre-tokenizer.

    Args:
        rows: of the model's embedding; rows without a token get one that nothing leads to.

    Raises:
        UsageError: llama.cpp does not support this kind of tokenizer.
    """
    tokenizer = contract.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(type(tokenizer).__name__)
    # A call that padded or cut leaves that setting in the tokenizer; this one takes it out.
    contract.tokens.encode(["a"])
    value = json.loads(backend.to_str())
    model = value["model"]
    byte_level = '"ByteLevel"' in json.dumps([value.get("pre_tokenizer"), value.get("decoder")])
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise _unknown(str(model.get("type")))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens, types = _tokens(value, rows, pieces=not byte_level)
    findings: list[Finding] = []
    starts, finding = _add_bos(contract)
    if finding:
        findings.append(finding)
    special, finding = _special(contract)
    if finding:
        findings.append(finding)
    made = Vocabulary(
        model="gpt2" if byte_level else "llama",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=() if byte_level else tuple(_scores(tokens, types, model["merges"])),
        # llama.cpp wants one at least: of characters that no text holds.
        merges=(tuple(merges) or ("\ufffe \uffff",)) if byte_level else (),
        special=special,
        add_bos=starts,
        add_space=False if byte_level else _adds_space(contract),
        template=contract.saved_template(),
        # llama.cpp strips the space behind special tokens of models that have this in their name,
        # and of no others.
        name="phi-3 " if _strips_right(value) else "",
    )
    return made, findings


def _unknown(kind: str) -> UsageError:
    return UsageError(
        f"a tokenizer of type {kind} cannot be written as GGUF",
        why="only byte-level BPE and BPE with byte fallback are supported",
        fix="use another server with the merged model: truetune export RUN --to merged",
        code="gguf-tokenizer",
    )


def _tokens(value: dict[str, Any], rows: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    """Token and type of each embedding row."""
    texts: dict[int, str] = {}
    types: dict[int, int] = {}
    for text, number in value["model"]["vocab"].items():
        texts[number], types[number] = text, NORMAL
        if pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
    unknown = value["model"].get("unk_token")
    for entry in value["added_tokens"]:
        number = entry["id"]
        texts[number] = entry["content"]
        types[number] = CONTROL if entry["special"] else USER_DEFINED
        if entry["content"] == unknown:
            types[number] = UNKNOWN
    beyond = [number for number in texts if number >= rows]
    if beyond:
        raise UsageError(
            f"the tokenizer has {len(beyond):,} tokens for which the model has no embedding",
            why=f"the model has {rows:,} embeddings, and the first such token is {min(beyond)}",
            fix="use the tokenizer that belongs to the weights",
            code="gguf-tokenizer",
        )
    there = set(texts.values())
    for number in range(rows):
        if number not in texts:
            text = f"[PAD{number}]"
            while text in there:
                text = f"[{text}]"
            texts[number], types[number] = text, UNUSED
    return [texts[n] for n in range(rows)], [types[n] for n in range(rows)]


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Iterable[Any]) -> list[float]:
    """Scores under which llama.cpp, which takes the pair with the best piece, merges as ranks do:
    a piece is as good as the first merge that makes it."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        rank.setdefault(left + right, number)
    last = float(-len(rank) - 1)
    return [
        -float(rank[text]) if text in rank else (0.0 if kind == BYTE else last)
        for text, kind in zip(tokens, types, strict=True)
    ]


def _strips_right(value: dict[str, Any]) -> bool:
    return any(entry.get("rstrip") for entry in value["added_tokens"])


def _adds_space(contract: PromptContract) -> bool:
    """Whether a text's first piece is written as if a space stood before it."""
    pieces = contract.tokenizer.convert_ids_to_tokens(contract.tokens.encode(["a"])[0])
    return bool(pieces) and pieces[0].startswith("\u2581")


_HELLO = [{"role": "user", "content": "Hello"}]


def _add_bos(contract: PromptContract) -> tuple[bool, Finding | None]:
    """Whether llama.cpp is to put the first token before every text.

    It does so before prompts of the chat template too, and takes one away that the template wrote:
    so a served prompt holds it once, or where the template writes none and none is added, not at
    all. What is trained decides.
    """
    first = contract.tokenizer.bos_token_id
    if first is None:
        return False, None
    plain = list(contract.tokenizer("a", verbose=False)["input_ids"])
    adds = plain[:1] == [first]
    try:
        served = contract.prompt_ids(_HELLO)[:1] == [first]
    except UnfaithfulTemplate:
        served = adds
    if adds and not served:
        return False, Finding(
            "gguf-no-bos",
            "note",
            f"the GGUF file does not add {contract.tokens.decode([first])!r} before texts",
            why="the chat template does not write it, so the model was trained without it; "
            "llama.cpp would also put it before rendered prompts",
            fix="nothing to do; completions of plain text will begin without it",
        )
    return adds and served, None


def _special(contract: PromptContract) -> tuple[dict[str, int], Finding | None]:
    """Ids by role; llama.cpp ends replies on eos, eot and eom."""
    tokenizer = contract.tokenizer
    found = {}
    for name in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[name] = int(number)
    stops = list(contract.stop_ids)
    eos = tokenizer.eos_token_id
    if eos in stops:
        stops.remove(eos)
        stops.insert(0, eos)
    found |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    if len(stops) <= 3:
        return found, None
    return found, Finding(
        "gguf-many-stops",
        "note",
        f"replies end on {len(stops)} tokens, but a GGUF file can name only three",
        why="llama.cpp adds those that it recognises by their text; the verification shows "
        "whether it stops on all",
        fix="nothing to do if the export succeeds",
    )
