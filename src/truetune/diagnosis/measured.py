"""Measure one stage on the same rows as every other stage.

input   a model folder or a server, the reference's rows
does    renders prompts by the stage's own tokenizer and template, reads predictions, takes greedy
        replies and the tokens on which it ends them
output  Stage
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from truetune.behaviour.text import goes_round
from truetune.compare import Reading, read
from truetune.contract.contract import PromptContract
from truetune.errors import TruetuneError, UnfaithfulTemplate
from truetune.evaluation.interval import Interval, score
from truetune.evaluation.match import Match
from truetune.exporting.gguf_proof import Apart, Reference
from truetune.findings import Finding
from truetune.generate import replies_to_ids
from truetune.model.draw import Sampling
from truetune.model.load import LoadedModel
from truetune.servers.cases import Case
from truetune.servers.llama_cpp import LlamaCpp
from truetune.system.lazy import torch

# Greedy replies that are taken, and tokens of each at most.
REPLIES, TOKENS = 12, 64


@dataclass(frozen=True)
class Replies:
    """Greedy replies of one stage.

    Attributes:
        ids: without the token that ended each.
        stopped: whether it ended by itself.
        texts: of the replies.
    """

    ids: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Stage:
    """The results of one stage on the rows.

    Attributes:
        name: base, adapter, model, merged, quantised, gguf or url.
        what: the folder, file or address.
        apart: distance of its predictions from the reference's; None if none were read.
        replies: None if none were taken.
        findings: what differs, errors first.
        note: why something was not examined.
    """

    name: str
    what: str
    apart: Apart | None = None
    replies: Replies | None = None
    findings: tuple[Finding, ...] = ()
    note: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def __repr__(self) -> str:
        error = next((finding for finding in self.findings if finding.level == "error"), None)
        state = f"differs: {error.what}" if error else "does not differ"
        return f"<stage {self.name} {self.what!r}: {state}>"


def reply_cases(reference: Reference) -> list[Case]:
    """The rows for which replies are generated, those with an answer first."""
    known = [case for case in reference.cases if case.expected is not None]
    return [*known, *[case for case in reference.cases if case.expected is None]][:REPLIES]


def replies_of(loaded: LoadedModel, contract: PromptContract, cases: Sequence[Case]) -> Replies:
    """A model's greedy replies."""
    made = replies_to_ids(
        loaded, contract, [case.ids for case in cases], Sampling(max_new_tokens=TOKENS)
    )
    cut = [reply.ids[:-1] if reply.stopped else reply.ids for reply in made]
    return Replies(
        tuple(cut), tuple(reply.stopped for reply in made), tuple(reply.text for reply in made)
    )


def served_replies(server: LlamaCpp, contract: PromptContract, cases: Sequence[Case]) -> Replies:
    """A server's greedy replies to the same ids."""
    made = [server.reply(case.ids, TOKENS) for case in cases]
    # A server may count the token that ended a reply.
    ids = [tuple(i for i in found if i not in contract.stop_ids) for found, _ in made]
    texts = [
        contract.tokens.decode_after(case.ids, found)
        for case, found in zip(cases, ids, strict=True)
    ]
    return Replies(tuple(ids), tuple(stopped for _, stopped in made), tuple(texts))


def reading_of(loaded: LoadedModel, reference: Reference) -> Reading | None:
    """A model's predictions where the reference's were read; None if it has no rows for the
    ids."""
    rows = loaded.transformers_model.get_input_embeddings().weight.shape[0]
    top: torch.Tensor = reference.reading.top
    if any(max(probe.ids) >= rows for probe in reference.probes) or int(top.max()) >= rows:
        return None
    return read(loaded, reference.probes, top)


def prompts_of(contract: PromptContract, cases: Sequence[Case]) -> list[tuple[Case, str]]:
    """Cases for which a contract renders different ids, with its text."""
    found = []
    for case in cases:
        try:
            text = contract.prompt_text(case.messages, case.tools, case.template_kwargs)
        except UnfaithfulTemplate as error:
            found.append((case, f"the template refuses it: {error.what}"))
            continue
        if tuple(contract.tokens.encode([text])[0]) != case.ids:
            same = text == case.text
            found.append((case, "the text is the same, but its ids differ" if same else text))
    return found


def rates(replies: Replies, cases: Sequence[Case]) -> dict[str, Any]:
    """Stop rate, repetitive replies and exact matches, with 95 % intervals."""
    number = len(replies.ids)
    if not number:
        return {}
    stopped = sum(replies.stopped)
    found: dict[str, Any] = {
        "replies": number,
        "stopped": _share(stopped, number),
        "going_round": sum(
            goes_round(ids, text) for ids, text in zip(replies.ids, replies.texts, strict=True)
        ),
    }
    known = [
        (text, case.expected)
        for text, case in zip(replies.texts, cases, strict=True)
        if case.expected is not None
    ]
    if known:
        judged = Match("exact").judge([(text, str(wanted)) for text, wanted in known])
        found["match"] = _share(sum(one.right for one in judged), len(known))
    return found


def _share(yes: int, number: int) -> dict[str, Any]:
    interval: Interval = score(yes, number)
    return {"share": yes / number, "low": interval.low, "high": interval.high, "of": number}


def same_replies(one: Replies, other: Replies) -> float:
    """Share of equal replies."""
    pairs = list(zip(one.ids, other.ids, strict=True))
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def unopened(name: str, what: str, error: TruetuneError) -> Stage:
    """The result of a stage that cannot be opened."""
    return Stage(
        name,
        what,
        findings=(
            Finding(
                "stage-unopened",
                "error",
                f"{name} cannot be opened: {error.what}",
                where=error.where or what,
                why=error.why or "files are damaged or belong to another model",
                fix=error.fix or "export it again",
            ),
        ),
    )
