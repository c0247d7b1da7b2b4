"""Judge whether a model is a base or an instruct model, by evidence and never by its name.

input   template and stop set; the rows of embedding and head, if there are weights; how well
        the model predicts a conversation in its template, where it was loaded
does    weighs each observation; random weights say nothing
output  StartVerdict: base, instruct or unknown, and the reasons; `recipe/rates.py` has what follows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from truetune.contract.frame import Frame
from truetune.contract.stops import own_stop_ids
from truetune.model.embeddings import ChatRows

Kind = Literal["base", "instruct", "unknown"]


@dataclass(frozen=True)
class StartVerdict:
    """Whether a model is base or instruct, and why.

    Attributes:
        kind: base, instruct, or unknown if it cannot be determined.
        reasons: what speaks for it, the strongest first.
    """

    kind: Kind
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "reasons": list(self.reasons)}


def by_template(tokenizer: Any) -> StartVerdict:
    """Judge without weights, whatever template and stop a run sets: a model that was tuned to chat
    stops on the token that its own template writes after an answer."""
    name = str(getattr(tokenizer, "name_or_path", "") or "") or None
    stops = own_stop_ids(name, None, tokenizer, local_only=True)
    return verdict(Frame.probe(tokenizer, stop_ids=stops))


def verdict(
    frame: Frame,
    rows: Mapping[str, ChatRows] | None = None,
    losses: Mapping[str, float] | None = None,
) -> StartVerdict:
    """Weigh what is known.

    Args:
        frame: probed with the model's own template and stop set.
        rows: of `input` and `head`, where weights were read.
        losses: mean loss in nats of `templated` and `plain` answers, `stop` of the token that ends
            a templated answer and `vocabulary` of guessing, where the model was loaded.
    """
    rows = rows or {}
    if any(found.random for found in rows.values()) or (_guesses(losses) and not rows):
        seen = (
            "the weights look random: the embeddings are alike, or predictions are no better than "
            "chance"
        )
        return StartVerdict("unknown", (seen,))
    if frame.broken:
        return StartVerdict("base", ("its own chat template cannot be used",))
    if not frame.has_template:
        return StartVerdict("base", ("it has no chat template",))
    if _guesses(losses):
        seen = "a plain conversation is predicted no better than by chance"
        return StartVerdict("unknown", (seen,))
    untrained = sorted({i for found in rows.values() for i in found.untrained})
    if untrained:
        named = ", ".join(repr(frame.tokens.decode([i])) for i in untrained[:4])
        return StartVerdict(
            "base", (f"the embeddings of its chat tokens were never trained: {named}",)
        )
    tuned = losses["stop"] < 1.0 < losses["vocabulary"] if losses else frame.own_stop_is_terminator
    return StartVerdict("instruct" if tuned else "base", tuple(_reasons(frame, rows, losses)))


def _guesses(losses: Mapping[str, float] | None) -> bool:
    return losses is not None and losses["plain"] > 0.95 * losses["vocabulary"]


def _reasons(
    frame: Frame, rows: Mapping[str, ChatRows], losses: Mapping[str, float] | None
) -> list[str]:
    reasons = []
    if losses is not None:
        reasons.append(
            f"after an answer in its template, it stops with probability "
            f"{np.exp(-losses['stop']):.2f}; answers have a loss of {losses['templated']:.2f} "
            f"nats per token in the template, {losses['plain']:.2f} as plain text"
        )
    if any(found.trained for found in rows.values()):
        reasons.append("the embeddings of its chat tokens differ from all untrained ones")
    holds = "holds" if frame.own_stop_is_terminator else "lacks"
    reasons.append(f"its own stop set {holds} the token that its template writes after an answer")
    return reasons
