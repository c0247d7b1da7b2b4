"""The checks of a planned run that need no weights.

input   Preflight: the examples as they will be trained, and the plan's numbers
does    runs the label checks on the examples, then the checks of the run
output  findings, the most severe first; an error among them stops `truetune train`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from truetune.checks import coming_run, conversations
from truetune.checks.conversations.rows import DataFacts
from truetune.checks.labels.facts import LabelFacts, LossOn
from truetune.checks.labels.judge import label_findings
from truetune.checks.labels.table import TokenTable
from truetune.checks.registry import checks_of
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.contract.frame import Frame
from truetune.contract.specials import control_tokens
from truetune.data.conversation import Conversation
from truetune.findings import Finding, merged


@dataclass(frozen=True)
class Preflight:
    """What the checks examine: plain values of the planned run.

    Attributes:
        examples: what will be trained, in order; `rows` says where each came from.
        is_text: plain text: no turn, so no answer that could end.
        loss_on: which tokens were meant to be targets.
        head_rows: rows of embedding and head.
        base_stop_ids: on which a server of the base model ends an answer.
        lora: whether an adapter is trained.
        learning_rate, suggested_rate: what is set, and the default for this case.
        max_steps, warmup_steps: optimizer steps.
        train, held_out: the conversations behind the examples.
        model, revision: what an adapter is trained on; None looks at no weights.
        trained_tokens: ids whose rows this run trains beside an adapter.
    """

    contract: PromptContract
    examples: Sequence[SFTExample]
    rows: Sequence[str]
    is_text: bool
    loss_on: LossOn
    head_rows: int
    base_stop_ids: Sequence[int]
    lora: bool
    learning_rate: float
    suggested_rate: float
    max_steps: int
    warmup_steps: int
    train: Sequence[Conversation] = ()
    held_out: Sequence[Conversation] = ()
    model: str | None = None
    revision: str | None = None
    trained_tokens: Sequence[int] = ()

    @cached_property
    def labels(self) -> LabelFacts:
        """The examples as the label checks examine them. Their prompts are proved: they came out of
        the contract."""
        return LabelFacts(
            TokenTable.of_examples(self.examples, self.rows),
            Frame.of_contract(self.contract),
            head_rows=self.head_rows,
            loss_on=self.loss_on,
            is_text=self.is_text,
            proved=True,
        )

    @cached_property
    def data(self) -> DataFacts:
        """The conversations as the data checks examine them."""
        return DataFacts(self.train, self.held_out, control_tokens(self.contract))


def preflight(
    facts: Preflight, on_progress: Callable[[int, int | None], None] | None = None
) -> list[Finding]:
    """Run all checks, and return their findings, the most severe first.

    Args:
        on_progress: is called with (families done, families in total).
    """
    families: list[Callable[[], Iterable[Finding]]] = [
        *(partial(check, facts.data) for check in checks_of(conversations)),
        partial(label_findings, facts.labels),
        *(partial(check, facts) for check in checks_of(coming_run)),
    ]
    found: list[Finding] = []
    for done, family in enumerate(families):
        if on_progress:
            on_progress(done, len(families))
        found += family()
    # Reasoning without an end is found in the text and in the ids: the text says more.
    open_ended = [f for f in found if f.code == "reasoning-unclosed"][1:]
    return merged(f for f in found if f not in open_ended)
