"""A model that is evaluated: its contract, its context, and the rows as it is asked them.

input   a run, a model or adapter folder, or a Hub id
does    reports invalid names before torch is imported; opens tokenizer and contract, but no
        weights; renders each question as served, with the row's answer as it would be trained
output  Subject, Prompt, and what the model writes
"""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.behaviour.replies import Thinking
from truetune.compare import row_losses
from truetune.contract.contract import PromptContract
from truetune.contract.encoder import Refused
from truetune.contract.example import SFTExample
from truetune.errors import ModelError, UnfaithfulTemplate, UsageError
from truetune.evaluation.questions import Question
from truetune.findings import Finding
from truetune.generate import Sampling, replies_to_ids
from truetune.model.inspect import describe, require_weights
from truetune.model.load import load_model, load_tokenizer
from truetune.model.source import locate
from truetune.model.tokenizer import num_ids
from truetune.run_dir import CONTRACT, RunDir, opened, parsed


@dataclass(frozen=True)
class Prompt:
    """A question as one model is asked it.

    Attributes:
        ids: the served prompt.
        target: prompt and the row's answer, the answer supervised; None if there is none.
        no_target: why.
        expected: the row's answer as text; a call as the template writes it.
        thinking: how replies may think.
        question: of a model that is asked by messages; None of one that is asked by ids.
    """

    ids: tuple[int, ...]
    target: SFTExample | None
    no_target: str
    expected: str
    thinking: Thinking
    question: Question | None = None


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes:
        stage, progress: are called with what is being done, and how far it is.
    """

    sampling: Sampling
    samples: int
    device: str
    stage: Callable[[str], None]
    progress: Callable[[int, int | None], None] | None


@dataclass(frozen=True)
class Said:
    """One reply.

    Attributes:
        tokens: the stop token included, as far as a server counts it.
        split: whether it thinks, whether it ends that, and its answer.
    """

    text: str
    tokens: int
    ended: bool
    split: tuple[bool, bool, str]


@dataclass(frozen=True)
class Written:
    """What a model made of its prompts.

    Attributes:
        replies: as many as samples for each prompt, in their order.
        losses: of each prompt's target, summed over its tokens; None if there is none.
        shown: each prompt as served.
        findings: what opening the model found.
    """

    replies: tuple[Said, ...]
    losses: tuple[float | None, ...]
    shown: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, without its weights.

    Attributes:
        name: as the user wrote it.
        folder: what is loaded for it.
        tokenizer, contract: its own, or the run's.
        context: tokens; None for no limit.
        rows: token ids that it has rows for.
        findings: what the name and the tokenizer found.
    """

    name: str
    folder: str
    revision: str | None
    tokenizer: Any
    contract: PromptContract
    context: int | None
    rows: int
    findings: tuple[Finding, ...] = ()

    @classmethod
    def open(cls, name: str, chat_template: str | None, revision: str | None) -> Subject:
        """Open what a name stands for.

        Raises:
            TruetuneError: it cannot be opened.
        """
        folder = opened(name)
        facts = describe(folder, revision)
        tokenizer = load_tokenizer(folder, revision)
        if chat_template is None:
            contract = PromptContract.of_record(tokenizer, _record(name))
        else:
            contract = PromptContract.load(tokenizer, chat_template)
        # An adapter may bring rows for tokens that it added.
        rows = max(facts.head_rows, num_ids(tokenizer) if facts.base else 0)
        findings = (*_unfinished(name, folder), *contract.findings)
        return cls(
            name, folder, revision, tokenizer, contract, facts.context_length, rows, findings
        )

    def prompts(self, questions: Sequence[Question]) -> list[Prompt | str]:
        """Each question as this model is asked it, or why it cannot be asked."""
        answered = [q for q in questions if q.answer is not None]
        encoded = self.contract.encode_all([q.whole for q in answered], loss_on="last")
        results = {q.where: result for q, result in zip(answered, encoded, strict=True)}
        return [self._prompt(question, results.get(question.where)) for question in questions]

    def write(self, prompts: Sequence[Prompt], asking: Asking) -> Written:
        """Compute the replies and losses, and release the weights afterwards."""
        asking.stage(f"loading {self.name}")
        loaded = load_model(
            self.folder,
            revision=self.revision,
            device=asking.device,
            purpose="inference",
            tokenizer=self.tokenizer,
        )
        asking.stage(f"generating replies with {self.name}")
        which = [prompt for prompt in prompts for _ in range(asking.samples)]
        made = replies_to_ids(
            loaded,
            self.contract,
            [prompt.ids for prompt in which],
            asking.sampling,
            batch_size=None,
            on_progress=asking.progress,
        )
        asking.stage(f"reading the rows' answers with {self.name}")
        targets = [prompt.target for prompt in prompts if prompt.target is not None]
        found = iter(row_losses(loaded, [(t.ids, t.mask) for t in targets], asking.progress))
        losses = tuple(None if prompt.target is None else next(found) for prompt in prompts)
        findings = (*self.findings, *loaded.findings)
        del loaded
        gc.collect()
        return Written(
            tuple(
                Said(r.text, len(r.ids), r.stopped, prompt.thinking.split(r.text))
                for prompt, r in zip(which, made, strict=True)
            ),
            losses,
            tuple(self.contract.tokens.decode(list(prompt.ids)) for prompt in prompts),
            findings,
        )

    def _prompt(self, question: Question, result: Any) -> Prompt | str:
        asked = question.asked
        target = None
        if result is None or isinstance(result, Refused):
            try:
                ids = self.contract.prompt_ids(asked.messages, asked.tools, asked.template_kwargs)
            except UnfaithfulTemplate as error:
                return f"the template refuses the prompt: {error.what}"
            no_target = "the row has no answer" if result is None else result.error.what
        else:
            (target,) = result.examples
            ids, no_target = target.ids[: target.mask.index(1)], ""
        if self.context is not None and len(ids) >= self.context:
            return f"the prompt leaves no room in the context of {self.context:,} tokens"
        if max(ids, default=0) >= self.rows:
            return "the prompt contains a token without an embedding in the model"
        thinking = Thinking.of_contract(self.contract, question.asked.template_kwargs)
        expected = replace(thinking, opened=False).split(question.expected)[2]
        if target is not None and (question.answer or {}).get("tool_calls"):
            written = self.contract.tokens.decode_after(ids, target.ids[len(ids) : -1])
            expected = thinking.split(written)[2].strip()
        if target is not None and self.context is not None and len(target.ids) > self.context:
            target, no_target = None, "prompt and answer are longer than the context"
        elif target is not None and max(target.ids) >= self.rows:
            target, no_target = (
                None,
                ("the answer contains a token without an embedding in the model"),
            )
        return Prompt(tuple(ids), target, no_target, expected, thinking)


def require_each_once(models: Sequence[str], usage: str) -> None:
    """Refuse no model, and a model that is given twice.

    Raises:
        UsageError: there is no model, or one is given twice.
    """
    if not models:
        raise UsageError("no model was given", fix=f"run {usage}", code="no-model")
    twice = next((name for at, name in enumerate(models) if name in models[:at]), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice", fix="pass each model once", code="model-twice")


def require_subject(name: str) -> None:
    """Refuse an invalid name, as far as that can be judged without torch.

    Raises:
        UsageError, InputError: there is no such model.
    """
    folder = opened(name)
    locate(folder, weights=False)
    require_weights(folder)


def _unfinished(name: str, folder: str) -> list[Finding]:
    """That a checkpoint stands in for what the run has not saved yet."""
    run = RunDir(name)
    if not run.looks_like_one() or run.artifact() is not None:
        return []
    return [
        Finding(
            "checkpoint-evaluated",
            "warning",
            f"the run is unfinished: its checkpoint {Path(folder).name} is evaluated",
            where=name,
            fix=f"finish it with truetune train --resume {shlex.quote(name)}",
        )
    ]


def _record(name: str) -> dict[str, Any]:
    """The contract that a run was trained under; {} for anything else."""
    run = RunDir(name)
    if not run.looks_like_one():
        return {}
    try:
        record: dict[str, Any] = parsed(run.file(CONTRACT).read_text(encoding="utf-8"))
        return {**record}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{CONTRACT} cannot be read: {error}",
            where=str(run.file(CONTRACT)),
            fix="copy the run again, or pass its model or adapter folder",
            code="contract-unreadable",
        ) from error
