"""Find the template arguments that change the served prompt, and the values under which the rows
can be encoded.

input   a contract and rows
does    renders prompts with each value of each argument that the template reads; encodes rows
        under those that differ
output  `ArgumentSearch.fit`: a contract under which the rows fit; `advise`: refusals that name the
        argument that would take the row
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from truetune.contract.behaviour import answer, user
from truetune.contract.encode import Encoded, LossOn
from truetune.contract.encoder import Encoding, Refused
from truetune.contract.shape import split_reasoning
from truetune.data.conversation import Conversation
from truetune.data.rows import evenly
from truetune.errors import UnfaithfulTemplate
from truetune.findings import Finding

T = TypeVar("T", bound=Encoding)

# Rows looked at when template arguments are chosen: enough to see every kind of row, cheap.
_FIT_ROWS = 200
# Refused rows of one kind that are tried under the argument that would take the first.
_ADVISED_ROWS = 256
# Values of one argument that are tried, and values in all: each is tried on the sample of rows.
_MOST_CANDIDATES = 32
# Refusals that a template argument may mend.
_OFF = "thinking-off"
_THINKING = ("thinking-only", _OFF)
# Refusals under an argument that say no more than the refusal without it.
_NO_ADVICE = (*_THINKING, "template-refuses")
_ARGUMENT_ERRORS = frozenset({"target-invented", "target-dropped", *_THINKING})


class ArgumentSearch(Generic[T]):
    """The template arguments around one contract."""

    def __init__(self, contract: T) -> None:
        self.contract = contract

    def fit(self, conversations: list[Conversation], loss_on: LossOn) -> T:
        """See `PromptContract.fit`."""
        contract = self.contract
        sample = [c for c in evenly(conversations, _FIT_ROWS) if c.text is None]
        if (contract.explicit_kwargs and not contract.template_kwargs) or not sample:
            return contract
        # The template's own way comes before a block that is closed by hand.
        trial = contract
        if contract.policy.reasoning == "empty":
            trial = replace(contract, policy=replace(contract.policy, reasoning="auto"))
        pairs = contract.behaviour().pairs
        plain = not any(
            split_reasoning(m, pairs).get("reasoning_content")
            for c in sample
            for m in trial.prepared(c.messages)
        )
        hybrid = plain and not contract.behaviour().closed
        best, best_refused = contract.template_kwargs, _num_refused(trial, sample, loss_on)
        kept = trial.encoder.kept
        for kwargs in self.candidates() if best_refused or hybrid else []:
            candidate = replace(trial, template_kwargs={**contract.template_kwargs, **kwargs})
            # A row without reasoning takes the form in which the template does not think.
            switched_off = hybrid and bool(candidate.behaviour().closed)
            if not (best_refused or switched_off):
                continue
            refused = _num_refused(candidate, sample, loss_on)
            if refused < best_refused or (switched_off and not refused):
                best, best_refused, kept = (
                    candidate.template_kwargs,
                    refused,
                    candidate.encoder.kept,
                )
                hybrid = hybrid and not switched_off
            if best_refused == 0 and not hybrid:
                break
        if best == contract.template_kwargs:
            return contract
        chosen = {k: v for k, v in best.items() if k not in contract.template_kwargs}
        note = Finding(
            code="template-argument",
            level="note",
            what=f"the template argument {json.dumps(chosen)} was chosen: with it the rows render "
            "unchanged",
            why="without it the template adds or drops parts of the answers",
            fix="nothing to do: it becomes the default in the saved template",
        )
        made = replace(contract, template_kwargs=best, findings=(*contract.findings, note))
        if trial is contract:
            made.encoder.kept |= kept
        return made

    def advise(
        self,
        conversations: Sequence[Conversation],
        results: list[Encoded | Refused],
        loss_on: LossOn,
    ) -> list[Encoded | Refused]:
        """Name the template argument that would take a refused row, found on the first of each
        kind."""
        kinds: dict[str, list[int]] = {}
        for index, result in enumerate(results):
            if isinstance(result, Refused) and result.error.code in _ARGUMENT_ERRORS:
                kinds.setdefault(result.error.code, []).append(index)
        for code, indices in kinds.items():
            argument, candidate = self._candidate_for(conversations[indices[0]], code, loss_on)
            if candidate is None:
                continue
            rows = [conversations[index] for index in indices[:_ADVISED_ROWS]]
            for index, found in zip(indices, candidate.encoder.few(rows, loss_on), strict=False):
                result = results[index]
                assert isinstance(result, Refused)
                if isinstance(found, Encoded):
                    results[index] = replace(result, error=_advised(result.error, argument))
                elif code in _THINKING and found.error.code not in _NO_ADVICE:
                    results[index] = replace(result, error=_under(found.error, argument))
        return results

    def _candidate_for(
        self, conversation: Conversation, code: str, loss_on: LossOn
    ) -> tuple[str, T | None]:
        """An argument that would take a refused row, and the contract with it; else, of a row that
        the served prompt's think block stands against, one under which it does not; ("", None)
        if there is neither."""
        other: tuple[str, T | None] = "", None
        for kwargs in self._changing(self.contract.renderer.variables()):
            if not kwargs:
                continue
            candidate = replace(
                self.contract, template_kwargs={**self.contract.template_kwargs, **kwargs}
            )
            (result,) = candidate.encoder.few([conversation], loss_on)
            argument = " ".join(f"{name}={json.dumps(value)}" for name, value in kwargs.items())
            if isinstance(result, Encoded):
                return argument, candidate
            if code in _THINKING and result.error.code not in _NO_ADVICE and other[1] is None:
                other = argument, candidate
        # The refusal itself names another way, which may take the row.
        return (
            ("", None) if code in _THINKING and self._fits_closed(conversation, loss_on) else other
        )

    def _fits_closed(self, conversation: Conversation, loss_on: LossOn) -> bool:
        """Whether a row is taken where a block that the prompt opens is closed at once."""
        policy = replace(self.contract.policy, reasoning="empty")
        (result,) = replace(self.contract, policy=policy).encoder.few([conversation], loss_on)
        return isinstance(result, Encoded)

    def candidates(self) -> list[dict[str, Any]]:
        """Values of arguments that change a served prompt, those set by hand left out."""
        names = [
            n for n in self.contract.renderer.variables() if n not in self.contract.template_kwargs
        ]
        return [kwargs for kwargs in self._changing(names) if kwargs]

    def _changing(self, names: Iterable[str]) -> list[dict[str, Any]]:
        tried: list[dict[str, Any]] = [{}]
        tried += [{name: value} for name in names for value in self.contract.values_of(name)]
        tried = tried[: _MOST_CANDIDATES + 1]
        first = self.contract.served_under(tried, [user("?")])
        second = self.contract.served_under(tried, [user("?"), answer("!"), user("?")])
        seen: set[tuple[str, str]] = set()
        found = []
        for kwargs, *texts in zip(tried, first, second, strict=True):
            key = (texts[0], texts[1])
            if any(key) and key not in seen:
                found.append(kwargs)
            seen.add(key)
        return found


def _num_refused(contract: Encoding, sample: Sequence[Conversation], loss_on: LossOn) -> int:
    return sum(isinstance(result, Refused) for result in contract.encoder.few(sample, loss_on))


def _under(error: UnfaithfulTemplate, argument: str) -> UnfaithfulTemplate:
    """Add the argument under which a row was refused to the refusal."""
    why = f"with --template-arg {argument}: {error.why}"
    return UnfaithfulTemplate(**{**error.words, "why": why})


def _advised(error: UnfaithfulTemplate, argument: str) -> UnfaithfulTemplate:
    fix = (
        f"--template-arg {argument} would accept this row; a row may also have its own "
        "chat_template_kwargs"
    )
    return UnfaithfulTemplate(**{**error.words, "fix": fix})
