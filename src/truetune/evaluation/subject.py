"""A model that is evaluated: its contract, its context, and the rows as it is asked them.

input   a run, a model or adapter folder, or a Hub id
does    says what is wrong with a name before torch is imported; opens tokenizer and contract, no
        weights; renders each question as served, with the row's answer as it would be trained
output  Subject, Prompt
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from truetune.behaviour.replies import Thinking
from truetune.contract.contract import PromptContract
from truetune.contract.encoder import Refused
from truetune.contract.example import SFTExample
from truetune.errors import ModelError, UnfaithfulTemplate, UsageError
from truetune.evaluation.questions import Question
from truetune.model.inspect import describe, require_weights
from truetune.model.load import load_tokenizer
from truetune.model.source import locate
from truetune.model.tokenizer import num_ids
from truetune.run_dir import CONTRACT, RunDir, opened

_SUPPORTED = "a run, a model or adapter folder, or a Hub id"


@dataclass(frozen=True)
class Prompt:
    """A question as one model is asked it.

    Attributes:
        ids: the served prompt.
        target: prompt and the row's answer, the answer supervised; None where there is none.
        no_target: why.
        expected: the row's answer as text; a call as the template writes it.
        thinking: how replies may think.
    """

    ids: tuple[int, ...]
    target: SFTExample | None
    no_target: str
    expected: str
    thinking: Thinking


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, without its weights.

    Attributes:
        name: as the user wrote it.
        folder: what is loaded for it.
        tokenizer, contract: its own, or the run's.
        context: tokens; None for no limit.
        rows: token ids that it has rows for.
    """

    name: str
    folder: str
    revision: str | None
    tokenizer: Any
    contract: PromptContract
    context: int | None
    rows: int

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
        return cls(name, folder, revision, tokenizer, contract, facts.context_length, rows)

    def prompts(self, questions: Sequence[Question]) -> list[Prompt | str]:
        """Each question as this model is asked it, or why it cannot be asked."""
        answered = [q for q in questions if q.answer is not None]
        encoded = self.contract.encode_all([q.whole for q in answered], loss_on="last")
        results = {q.where: result for q, result in zip(answered, encoded, strict=True)}
        return [self._prompt(question, results.get(question.where)) for question in questions]

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
            return "the prompt holds a token that the model has no row for"
        thinking = Thinking.of_contract(self.contract, question.asked.template_kwargs)
        expected = replace(thinking, opened=False).split(question.expected)[2]
        if target is not None and (question.answer or {}).get("tool_calls"):
            written = self.contract.tokens.decode_after(ids, target.ids[len(ids) : -1])
            expected = thinking.split(written)[2].strip()
        if target is not None and self.context is not None and len(target.ids) > self.context:
            target, no_target = None, "prompt and answer are longer than the context"
        elif target is not None and max(target.ids) >= self.rows:
            target, no_target = None, "the answer holds a token that the model has no row for"
        return Prompt(tuple(ids), target, no_target, expected, thinking)


def require_subject(name: str) -> None:
    """Say what is wrong with a name, as far as that is known without torch.

    Raises:
        UsageError, InputError: it leads nowhere, or to something that is not evaluated yet.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise UsageError(
            f"{name} is a web address, but models behind a server cannot be evaluated",
            why=f"a model is {_SUPPORTED}",
            fix="pass the folder that the server was started with",
            code="subject-unsupported",
        )
    if name.lower().endswith(".gguf"):
        raise UsageError(
            f"{name} is a GGUF file, which cannot be evaluated",
            why=f"a model is {_SUPPORTED}",
            fix="pass the folder that it was converted from",
            code="subject-unsupported",
        )
    folder = opened(name)
    locate(folder, weights=False)
    require_weights(folder)


def _record(name: str) -> dict[str, Any]:
    """The contract that a run was trained under; {} for anything else."""
    run = RunDir(name)
    if not run.looks_like_one():
        return {}
    try:
        record: dict[str, Any] = json.loads(run.file(CONTRACT).read_text(encoding="utf-8"))
        return {**record}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{CONTRACT} cannot be read: {error}",
            where=str(run.file(CONTRACT)),
            fix="copy the run again, or pass its model or adapter folder",
            code="contract-unreadable",
        ) from error
