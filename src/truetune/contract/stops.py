"""The stop set: the ids on which a server ends an answer.

It is what the saved generation_config will hold: the model's own ids and, with stop "auto", the
token that the template writes after an answer, found by rendering sentinels and looking.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.behaviour import Behaviour
from truetune.contract.tokens import Tokens, common_prefix
from truetune.errors import UsageError
from truetune.findings import Finding


@dataclass(frozen=True)
class StopSet:
    """Stop ids, the model's own first, and what is to be reported about them."""

    ids: tuple[int, ...]
    findings: tuple[Finding, ...] = ()


def listed_stop_ids(config: Any) -> tuple[int, ...] | None:
    """The ids that a config names as ends; None if it names none.

    Args:
        config: a GenerationConfig or another one, or what its file holds.
    """
    if isinstance(config, Mapping):
        found = config.get("eos_token_id")
    else:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        return None
    return tuple(int(i) for i in found) if isinstance(found, list | tuple) else (int(found),)


def served_stops(configs: Iterable[tuple[str, Any]], tokenizer: Any) -> tuple[tuple[int, ...], str]:
    """The ids on which a server ends an answer, and what they come from, as transformers has it:
    the first config that names some, else the tokenizer.

    Args:
        configs: names and configs, in the order in which they count.
    """
    for name, config in configs:
        if (found := listed_stop_ids(config)) is not None:
            return found, name
    eos = tokenizer.eos_token_id
    return () if eos is None else (int(eos),), "the tokenizer"


# The files of a model that name its ends, the first that does counts.
STOP_FILES = ("generation_config.json", "config.json")


def own_stop_ids(
    source: str | None, revision: str | None, tokenizer: Any, *, local_only: bool = False
) -> tuple[int, ...]:
    """The stop ids that the model brings: generation_config, else config, else the tokenizer."""
    files = ((name, _read_json(source, revision, name, local_only)) for name in STOP_FILES)
    return served_stops(files, tokenizer)[0]


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
    behaviour: Behaviour,
    tokens: Tokens,
) -> StopSet:
    """The stop set for a run.

    Args:
        own: the model's own ids.
        stop: None or "auto" to find the template's; else tokens (texts or ids) to add.
        behaviour: what the template writes after an answer and after a tool call.

    Raises:
        UsageError: a stop text that is no single token of the vocabulary, or an id outside it.
    """
    if stop is not None and stop != "auto":
        asked = [stop] if isinstance(stop, str | int) else list(stop)
        ids = [_stop_id(item, tokens) for item in asked]
        return StopSet(tuple(dict.fromkeys([*own, *ids])))
    answer = answer_stop(behaviour, tokens, own)
    known = own if answer is None else tuple(dict.fromkeys([*own, answer]))
    call = call_stop(behaviour, tokens, known)
    added = [i for i in dict.fromkeys([answer, call]) if i is not None and i not in own]
    notes = tuple(
        _added(i, own, tokens, "a tool call" if i == call else "an answer") for i in added
    )
    return StopSet((*own, *added), notes)


def _added(token: int, own: Sequence[int], tokens: Tokens, after: str) -> Finding:
    return Finding(
        code="stop-added",
        level="note",
        what=f"added to the stop set: {tokens.decode([token])!r} ({token}), which the template "
        f"writes after {after}",
        why="the model's own stop ids are " + (tokens.named(own) or "none"),
        fix="nothing to do: it is saved in generation_config",
    )


def _stop_id(item: str | int, tokens: Tokens) -> int:
    found = item if isinstance(item, int) else tokens.single_id(item)
    if found is None or not tokens.has_id(found):
        raise UsageError(
            f"--stop {item!r} is not one token of this tokenizer",
            why="a server stops on a single token id, which text of several tokens never matches",
            fix="pass a token of the vocabulary, "
            + (f"add this one (--add-token {shlex.quote(item)}), " if isinstance(item, str) else "")
            + "or use --stop auto",
            code="stop-not-a-token",
        )
    return found


def answer_stop(behaviour: Behaviour, tokens: Tokens, own: Sequence[int]) -> int | None:
    """The token that ends an answer, from what the template writes after a last answer and after
    an answer in the history.

    What it writes in both places is the end of the turn (the end of the whole text may follow
    once). If these are several tokens, it is the last one that also ends a question, or else the
    last one. If the two places have nothing in common, it is what follows the last answer; if
    nothing follows a last answer, it is what begins the next turn.
    """
    last, later = (_written(tail, tokens, own) for tail in behaviour.answer_end)
    common = last[: common_prefix(last, later)] if last and later else []
    asked = _written(behaviour.user_end, tokens, own)
    if asked and asked[0] in common and not any(token in own for token in common):
        # What holds the text of every turn is before what ends it.
        shared = common[common.index(asked[0]) :]
        return shared[common_prefix(shared, asked) - 1]
    for candidates, take in ((common, -1), (last, 0), (later, 0)):
        if any(token in own for token in candidates):
            return next(token for token in candidates if token in own)
        if candidates:
            return candidates[take]
    return None


def closing_stop(behaviour: Behaviour, tokens: Tokens, own: Sequence[int]) -> int | None:
    """The token that ends an answer, where the template writes it after the last one too."""
    found = answer_stop(behaviour, tokens, own)
    return found if found in _written(behaviour.answer_end[0], tokens, own) else None


def call_stop(behaviour: Behaviour, tokens: Tokens, known: Sequence[int]) -> int | None:
    """The token that ends a turn of tool calls; tokens that stand between two calls are none."""
    inner = set(_special(behaviour.call_between, tokens, known)) - set(known)
    last, later = (
        [t for t in _special(tail, tokens, known) if t not in inner] for tail in behaviour.call_end
    )
    common = last[: common_prefix(last, later)] if last and later else []
    for candidates, take in ((common, -1), (last, -1), (later, 0)):
        if any(token in known for token in candidates):
            return next(token for token in candidates if token in known)
        if candidates:
            return candidates[take]
    return None


def _special(text: str, tokens: Tokens, own: Sequence[int]) -> list[int]:
    """The control tokens and stops in a text."""
    ids = tokens.encode([text])[0] if text else []
    return [token for token in ids if token in tokens.special_ids or token in own]


def _written(tail: str, tokens: Tokens, own: Sequence[int]) -> list[int]:
    """The control tokens after an answer, past whitespace and no further."""
    found = []
    for token in tokens.encode([tail])[0] if tail else []:
        if token in tokens.special_ids or token in own:
            found.append(token)
        elif tokens.decode([token]).strip():
            break
    return found
