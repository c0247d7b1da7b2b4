"""Is a model base or instruct? By evidence, never by its name.

input   template and stop set; the rows of embedding and head, where there are weights; how well
        the model predicts a conversation in its template, where it was loaded
does    weighs each observation; random weights say nothing
output  Verdict: base, instruct or unknown, the reasons, and what it means for a recipe
who     the check of a run and of a finished model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from truetune.checks.markers import Markers
from truetune.model.tables import TableFacts

Kind = Literal["base", "instruct", "unknown"]

# A row this like another was copied from it, or neither was ever trained.
_SAME = 0.99


@dataclass(frozen=True)
class ChatRows:
    """The chat tokens of a model, judged against its other rows.

    Attributes:
        trained, untrained: ids by verdict; ids that nothing can be said of are in neither.
        why: what was seen, one line each untrained id.
        random: the table as a whole looks never trained.
    """

    trained: tuple[int, ...]
    untrained: tuple[int, ...]
    why: dict[int, str]
    random: bool


@dataclass(frozen=True)
class Verdict:
    """What a model is, and why.

    Attributes:
        kind: base, instruct, or unknown where nothing can be told.
        reasons: what speaks for it, the strongest first.
        means: what follows for a recipe.
    """

    kind: Kind
    reasons: tuple[str, ...]
    means: str

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "reasons": list(self.reasons), "means": self.means}


def chat_ids(markers: Markers) -> list[int]:
    """Ids that a template writes around turns and nothing else does, the answer's end included."""
    tokens = markers.tokens
    text = f"{markers.answer_start}\n{markers.user_start}"
    written = set(tokens.encode([text])[0]) if markers.has_template else set()
    ends = {markers.terminator} if markers.terminator is not None else set()
    # What opens a text or ends a document is trained in pretraining already.
    plain = {tokens.tokenizer.bos_token_id}
    return sorted((written & tokens.special_ids | ends) - plain)


def judge_rows(table: TableFacts, ids: Sequence[int], num_tokens: int) -> ChatRows:
    """Whether the rows of chat tokens were ever trained.

    Args:
        ids: of the chat tokens.
        num_tokens: ids that the tokenizer has; rows above are padding that no text trains.
    """
    if table.looks_random:
        return ChatRows((), (), {}, True)
    norms = table.norms
    unused = norms[num_tokens:]
    text = norms[:num_tokens]
    middle = float(np.median(text))
    low = float(np.quantile(text, 0.001))
    trained, untrained, why = [], [], {}
    for i in ids:
        if i >= len(norms):
            continue
        neighbour, cosine = table.nearest.get(i, (-1, 0.0))
        norm = float(norms[i])
        if cosine > _SAME and neighbour >= 0:
            untrained.append(i)
            why[i] = f"its row is the same as that of {neighbour} (cosine {cosine:.4f})"
        elif norm < min(low, 0.5 * middle):
            untrained.append(i)
            why[i] = f"its row is {norm / middle:.2f} of the usual length"
        elif len(unused) >= 8 and _among(norm, unused) and not _among(middle, unused):
            untrained.append(i)
            why[i] = "its row is as long as those of padding, which no text trains"
        else:
            trained.append(i)
    return ChatRows(tuple(trained), tuple(untrained), why, False)


def _among(value: float, values: np.ndarray) -> bool:
    """Whether a length lies where nearly all of these lie, with a little room."""
    low, high = np.quantile(values, [0.01, 0.99])
    room = 0.02 * max(float(high), 1e-12)
    return bool(low - room <= value <= high + room)


def verdict(
    markers: Markers,
    rows: Mapping[str, ChatRows] | None = None,
    losses: Mapping[str, float] | None = None,
) -> Verdict:
    """Weigh what is known.

    Args:
        markers: probed with the model's own template and stop set.
        rows: of `input` and `head`, where weights were read.
        losses: mean loss in nats of `templated` and `plain` answers, `stop` of the token that ends
            a templated answer and `vocabulary` of guessing, where the model was loaded.
    """
    rows = rows or {}
    if any(found.random for found in rows.values()) or (_guesses(losses) and not rows):
        return Verdict(
            "unknown",
            (
                "the weights look random: their rows are alike, or nothing is predicted better "
                "than by chance",
            ),
            "nothing was learned yet, so nothing can be told; " + _UNKNOWN,
        )
    if not markers.has_template:
        return Verdict("base", ("it has no chat template",), _MEANS["base"])
    if _guesses(losses):
        seen = "a plain conversation is predicted no better than by chance: it is of other words"
        return Verdict("unknown", (seen,), _UNKNOWN)
    untrained = {i for found in rows.values() for i in found.untrained}
    if untrained:
        named = ", ".join(repr(markers.tokens.decode([i])) for i in sorted(untrained)[:4])
        seen = f"the rows of its chat tokens were never trained: {named}"
        return Verdict("base", (seen,), _MEANS["base"])
    reasons = _reasons(markers, rows, losses)
    if losses is not None:
        kind: Kind = "instruct" if losses["stop"] < 1.0 < losses["vocabulary"] else "base"
        return Verdict(kind, tuple(reasons), _MEANS[kind])
    kind = "instruct" if markers.own_stop_is_terminator else "base"
    return Verdict(kind, tuple(reasons), _MEANS[kind])


_UNKNOWN = "say what you want with --learning-rate and --epochs"
_MEANS = {
    "base": "2e-4 for LoRA, 3 epochs; rows of chat tokens must be trained, or use a template "
    "without new tokens",
    "instruct": "1e-4 for LoRA, 2 epochs: less is needed, and more is forgotten",
}


def _guesses(losses: Mapping[str, float] | None) -> bool:
    return losses is not None and losses["plain"] > 0.95 * losses["vocabulary"]


def _reasons(
    markers: Markers, rows: Mapping[str, ChatRows], losses: Mapping[str, float] | None
) -> list[str]:
    reasons = []
    if losses is not None:
        reasons.append(
            f"after an answer in its template it ends with probability "
            f"{np.exp(-losses['stop']):.2f}; answers cost {losses['templated']:.2f} nats a token "
            f"there, {losses['plain']:.2f} in plain form"
        )
    if any(found.trained for found in rows.values()):
        reasons.append("the rows of its chat tokens differ from every row that was never trained")
    ends = markers.own_stop_is_terminator
    reasons.append(
        "its own stop set "
        + ("holds" if ends else "lacks")
        + " the token that its template writes "
        "after an answer"
    )
    return reasons
