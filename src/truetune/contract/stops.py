"""The stop set: the ids on which a server ends an answer.

It is what the saved generation_config will hold: the model's own ids and, with stop "auto", the
token that the template writes after an answer, found by rendering sentinels and looking.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.render import Renderer
from truetune.contract.tokens import Tokens
from truetune.errors import UnfaithfulTemplate, UsageError
from truetune.findings import Finding

_QUESTION, _ANSWER = "qqsentinelqq", "aasentinelaa"


@dataclass(frozen=True)
class StopSet:
    """Stop ids, the model's own first, and what is to be told about them."""

    ids: tuple[int, ...]
    findings: tuple[Finding, ...] = ()


def own_stop_ids(
    source: str | None, revision: str | None, tokenizer: Any, *, local_only: bool = False
) -> tuple[int, ...]:
    """The stop ids that the model brings: generation_config, else config, else the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        found = _read_json(source, revision, name, local_only).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _read_json(
    source: str | None, revision: str | None, name: str, local_only: bool
) -> dict[str, Any]:
    if not source:
        return {}
    folder = Path(source)
    if folder.is_dir():
        path: str | None = str(folder / name) if (folder / name).is_file() else None
    else:
        from transformers.utils import cached_file

        try:
            path = cached_file(
                source,
                name,
                revision=revision,
                local_files_only=local_only,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except OSError:
            # A loaded tokenizer may name a folder that is gone.
            if not local_only:
                raise
            path = None
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def stop_set(
    own: tuple[int, ...],
    stop: str | Sequence[str | int] | None,
    renderer: Renderer,
    tokens: Tokens,
) -> StopSet:
    """The stop set for a run.

    Args:
        own: the model's own ids.
        stop: None or "auto" to find the template's; else tokens (texts or ids) to add.

    Raises:
        UsageError: a stop text that is no single token of the vocabulary, or an id outside it.
    """
    if stop is None or stop == "auto":
        written = written_stop(renderer, tokens, own)
        if written is None or written in own:
            return StopSet(own)
        note = Finding(
            code="stop-added",
            level="note",
            what=f"the stop set gains {tokens.decode([written])!r} ({written}), which the template "
            "writes after an answer",
            why="the model's own stop ids are "
            + (", ".join(f"{tokens.decode([i])!r} ({i})" for i in own) or "none"),
            fix="nothing to do: the saved generation_config holds it",
        )
        return StopSet((*own, written), (note,))
    asked = [stop] if isinstance(stop, str | int) else list(stop)
    ids = [_stop_id(item, tokens) for item in asked]
    return StopSet(tuple(dict.fromkeys([*own, *ids])))


def _stop_id(item: str | int, tokens: Tokens) -> int:
    found = item if isinstance(item, int) else tokens.single_id(item)
    if found is None or not tokens.has_id(found):
        raise UsageError(
            f"--stop {item!r} is not one token of this tokenizer",
            why="a server stops on a token id; a text of several tokens never matches one",
            fix="name a token of the vocabulary, or leave --stop auto",
            code="stop-not-a-token",
        )
    return found


def written_stop(renderer: Renderer, tokens: Tokens, own: Sequence[int]) -> int | None:
    """The token that the template writes right after an answer, None if it writes none.

    Of the tokens that follow a sentinel answer, the first that is a special token or one of the
    model's own stops counts; whitespace may stand before it (the model learns to write it).
    """
    conversation = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = renderer.render(conversation)
    except UnfaithfulTemplate:
        return None
    _, found, tail = text.rpartition(_ANSWER)
    if not found:
        return None
    for token in tokens.encode([tail])[0] if tail else []:
        if token in tokens.special_ids or token in own:
            return token
        if tokens.decode([token]).strip():
            return None
    return None
