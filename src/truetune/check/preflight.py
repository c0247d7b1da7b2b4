"""The checks of a coming run that need no weights.

input   Preflight: the examples as they will be trained, and the plan's numbers
does    the label families on the examples, then the families on the run
output  findings, the most severe first; an error among them stops `truetune train`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from truetune.check import run_settings
from truetune.check.facts import LabelFacts, LossOn
from truetune.check.labels import label_findings
from truetune.check.markers import Markers
from truetune.check.run_settings import RunFacts
from truetune.check.table import TokenTable
from truetune.contract import PromptContract, SFTExample
from truetune.findings import Finding, merged


@dataclass(frozen=True)
class Preflight:
    """What the checks look at: plain values of the coming run.

    Attributes:
        examples: what will be trained, in order; `rows` says where each came from.
        is_text: plain text: no turn, so no answer that could end.
        loss_on: which tokens were meant to be targets.
        head_rows: rows of embedding and head.
        base_stop_ids: on which a server of the base model ends an answer.
        lora: whether an adapter is trained.
        learning_rate, suggested_rate: what is set, and the default for this case.
        max_steps, warmup_steps: optimiser steps.
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

    @cached_property
    def labels(self) -> LabelFacts:
        """The examples as the label families look at them. Their prompts are proved: they came
        out of the contract."""
        contract = self.contract
        markers = Markers.probe(
            contract.tokenizer, stop_ids=contract.stop_ids, chat_template=contract.chat_template
        )
        return LabelFacts(
            TokenTable.of_examples(self.examples, self.rows),
            markers,
            head_rows=self.head_rows,
            loss_on=self.loss_on,
            is_text=self.is_text,
            proved=True,
        )

    @property
    def run(self) -> RunFacts:
        """The numbers of the run, without its rows."""
        return RunFacts(
            stop_ids=self.contract.stop_ids,
            is_text=self.is_text,
            base_stop_ids=tuple(self.base_stop_ids),
            lora=self.lora,
            learning_rate=self.learning_rate,
            suggested_rate=self.suggested_rate,
            max_steps=self.max_steps,
            warmup_steps=self.warmup_steps,
        )


def preflight(facts: Preflight) -> list[Finding]:
    """All findings, the most severe first."""
    return merged([*label_findings(facts.labels), *_run_findings(facts.run)])


def _run_findings(facts: RunFacts) -> Iterator[Finding]:
    checks: tuple[Callable[[RunFacts], Iterator[Finding]], ...] = run_settings.CHECKS
    for check in checks:
        yield from check(facts)
