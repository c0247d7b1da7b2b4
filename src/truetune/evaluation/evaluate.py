"""All steps of an evaluation, from model names to the table. Read this file first.

input   models, a data source, how to ask and how to compare
does    refuses invalid requests immediately; turns rows into questions; renders them as each model
        serves them, and keeps those that every model can be asked; then, one model at a time,
        writes replies in batches, compares them, and takes the loss of the rows' answers
output  Evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from truetune.behaviour.text import normalised
from truetune.contract.source import require_template
from truetune.data.load import load
from truetune.data.sources import resolve
from truetune.errors import DataError, UsageError
from truetune.evaluation.match import Match
from truetune.evaluation.questions import LeftOut, Question, grouped, questions_of
from truetune.evaluation.read_answer import with_json_values
from truetune.evaluation.result import (
    Judgement,
    ModelResult,
    RowResult,
    measures_of,
    values_of,
)
from truetune.evaluation.served import Served, is_served, require_served
from truetune.evaluation.subject import (
    Asking,
    Prompt,
    Said,
    Subject,
    require_each_once,
    require_subject,
)
from truetune.evaluation.table import Evaluation
from truetune.findings import counted
from truetune.generate import Sampling
from truetune.model.placement import require_device

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Settings:
    """How models are asked, and how their replies are compared.

    Attributes:
        match: see `Match`.
        sampling: greedy where None and samples is 1; temperature 1 of several samples.
        shots: other rows put before each question.
        samples: replies to each question.
        limit: the first so many rows.
        seed: of shots, sampling and intervals.
        schema, columns, split, data_revision: of the data, as `train` has them.
        chat_template: for every model; its own where None.
        revision: of the models, where they are on the Hub.
        device: auto, cuda, mps or cpu.
    """

    match: Match = Match()
    sampling: Sampling | None = None
    shots: int = 0
    samples: int = 1
    limit: int | None = None
    seed: int = 0
    schema: str = "auto"
    columns: str | None = None
    split: str | None = None
    data_revision: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    device: str = "auto"

    @classmethod
    def of(
        cls,
        *,
        match: str = "exact",
        pattern: str | None = None,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        samples: int = 1,
        seed: int = 0,
        **others: Any,
    ) -> Settings:
        """Settings by the names of the options.

        Raises:
            UsageError: a setting is invalid.
        """
        if samples > 1 and temperature == 0:
            raise UsageError(
                f"{samples} samples at temperature 0 would be {samples} times the same reply",
                where="--temperature",
                fix="omit --temperature (it becomes 1), or request one sample",
                code="samples-greedy",
            )
        heat = (1.0 if samples > 1 else 0.0) if temperature is None else temperature
        sampling = Sampling(max_new_tokens, heat, top_p, top_k, seed=seed)
        made = cls(Match(match, pattern), sampling, samples=samples, seed=seed, **others)  # type: ignore[arg-type]
        for name, least in (("samples", 1), ("shots", 0), ("limit", 1)):
            value = getattr(made, name)
            if value is not None and value < least:
                raise UsageError(
                    f"--{name} is {value}, but it must be at least {least}",
                    code="evaluation-setting",
                )
        return made

    @property
    def drawn(self) -> Sampling:
        return self.sampling or Sampling()

    def as_dict(self) -> dict[str, Any]:
        """What the result says of them."""
        return {
            "match": self.match.kind,
            "pattern": self.match.pattern,
            "compared_by": self.match.description,
            "shots": self.shots,
            "samples": self.samples,
            "limit": self.limit,
            "chat_template": self.chat_template,
            **asdict(self.drawn),
        }


def require_early(models: Sequence[str], data: str | None, settings: Settings) -> None:
    """Refuse invalid requests before torch is imported.

    Raises:
        UsageError, InputError: the first thing that is not there.
    """
    require_each_once(models, "truetune eval MODEL --data DATA")
    if not data:
        raise UsageError(
            "no data was given",
            why="rows are passed with --data, so that a data file is never mistaken for a model, "
            "or a run for rows",
            fix="run truetune eval MODEL [MORE...] --data DATA",
            code="no-data",
        )
    require_device(settings.device)
    if settings.chat_template is not None:
        require_template(settings.chat_template)
    resolve(data, settings.split)
    for name in models:
        if is_served(name):
            require_served(name, settings.chat_template)
        else:
            require_subject(name)


def evaluate(
    models: Sequence[str],
    data: str,
    settings: Settings | None = None,
    *,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Send the questions of a data source to models, as each of them is served, and compare the
    replies.

    Args:
        models: runs, model or adapter folders, Hub ids, GGUF files (served by llama.cpp), or
            addresses of servers that speak OpenAI's protocol; the others are compared with the
            first.
        data: a file, a folder, or a Hub dataset.
        on_stage, on_progress: are called with what is being done, and how far it is.

    Raises:
        TruetuneError: a model or the data cannot be used, or no row fits all models.
    """
    settings = settings or Settings()
    require_early(models, data, settings)
    stage = on_stage or (lambda _: None)
    stage("reading the rows")
    loaded = load(
        data,
        schema=settings.schema,
        columns=settings.columns,
        split=settings.split,
        revision=settings.data_revision,
        # Shots are drawn from all rows.
        limit=None if settings.shots else settings.limit,
        on_progress=on_progress,
    )
    questions, left_out = questions_of(
        loaded, settings.match, shots=settings.shots, seed=settings.seed, limit=settings.limit
    )
    stage("reading the models' templates")
    subjects = [
        Served(m) if is_served(m) else Subject.open(m, settings.chat_template, settings.revision)
        for m in models
    ]
    stage("rendering the prompts")
    questions, prompts, more = _common(subjects, questions)
    found = []
    for subject, asked in zip(subjects, prompts, strict=True):
        found.append(_asked(subject, questions, asked, settings, stage, on_progress))
    stage("comparing")
    measures = measures_of(settings.match.kind, settings.samples)
    counted = values_of([result.rows for result in found], measures, settings.seed)
    results = tuple(
        replace(result, values=values, against_first=differences)
        for result, (values, differences) in zip(found, counted, strict=True)
    )
    return Evaluation(
        data,
        len(questions),
        (*left_out, *more),
        settings.as_dict(),
        results,
        tuple(m for m in measures if any(m.name in result.values for result in results)),
    )


def _common(
    subjects: Sequence[Subject | Served], questions: Sequence[Question]
) -> tuple[list[Question], list[list[Prompt]], list[LeftOut]]:
    """The questions that every model can be asked, how each is asked them, and the others.

    Raises:
        DataError: there is none.
    """
    rendered = [subject.prompts(questions) for subject in subjects]
    kept = [
        at for at in range(len(questions)) if all(isinstance(row[at], Prompt) for row in rendered)
    ]
    left: list[LeftOut] = []
    counted: set[int] = set()
    for subject, row in zip(subjects, rendered, strict=True):
        # A row that several models refuse is counted once, with the first.
        missing = [
            (at, reason)
            for at, reason in enumerate(row)
            if isinstance(reason, str) and at not in counted
        ]
        counted |= {at for at, _ in missing}
        left += grouped(((why, questions[at].where) for at, why in missing), subject.name)
    if not kept:
        raise DataError(
            "there is no row that all of the models can use",
            why="; ".join(f"{out.model}: {out.count:,} rows: {out.reason}" for out in left[:4]),
            fix="truetune inspect MODEL shows a model's template and context",
            code="nothing-to-ask",
        )
    prompts = [[p for p in (row[at] for at in kept) if isinstance(p, Prompt)] for row in rendered]
    return [questions[at] for at in kept], prompts, left


def _asked(
    subject: Subject | Served,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    settings: Settings,
    stage: Callable[[str], None],
    on_progress: Progress | None,
) -> ModelResult:
    """One model's replies, judged, and losses."""
    number = settings.samples
    asking = Asking(settings.drawn, number, settings.device, stage, on_progress)
    written = subject.write(prompts, asking)
    judged = iter(_judged(settings.match, questions, prompts, written.replies, number))
    rows = [
        RowResult(
            question.where,
            shown,
            prompt.expected,
            tuple(next(judged) for _ in range(number)),
            loss,
            0 if prompt.target is None else prompt.target.num_supervised,
        )
        for question, prompt, shown, loss in zip(
            questions, prompts, written.shown, written.losses, strict=True
        )
    ]
    without = grouped(
        (prompt.no_target, question.where)
        for question, prompt in zip(questions, prompts, strict=True)
        if prompt.target is None and question.answer is not None
    )
    notes = _notes(rows, subject, prompts, settings)
    raised = tuple(finding for finding in written.findings if finding.level != "note")
    return ModelResult(subject.name, {}, {}, tuple(rows), tuple(without), notes, raised)


def _judged(
    match: Match,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    written: Sequence[Said],
    number: int,
) -> list[Judgement]:
    """All replies, in their order."""
    which = [at for at in range(len(prompts)) for _ in range(number)]
    # Calls are equal where their arguments are: as values, in any order.
    calls = [bool((question.answer or {}).get("tool_calls")) for question in questions]
    pairs = [(said.split[2], prompts[at].expected) for at, said in zip(which, written, strict=True)]
    found = match.judge(
        [
            (with_json_values(reply), with_json_values(expected))
            if calls[at]
            else (reply, expected)
            for at, (reply, expected) in zip(which, pairs, strict=True)
        ]
    )
    return [
        Judgement(
            text=said.text,
            tokens=said.tokens,
            ended=said.ended,
            right=said.ended and one.right,
            would_be_right=one.right and not said.ended,
            said=one.said,
            thought=said.split[0],
            closed=said.split[1],
            empty=not said.text.strip(),
            copied=_copied(said.split[2], questions[at].last_words, prompts[at].expected),
            slow=one.slow,
        )
        for at, said, one in zip(which, written, found, strict=True)
    ]


# Words from which a reply that begins with the question repeats it, and does not just begin alike.
_FEWEST_WORDS = 4


def _copied(answer: str, question: str, expected: str) -> bool:
    """Whether an answer is the question over again, which the row's own answer is not."""
    said, asked, wanted = normalised(answer), normalised(question), normalised(expected)
    if not asked or wanted.startswith(asked):
        return False
    return said == asked or (len(asked.split()) >= _FEWEST_WORDS and said.startswith(asked))


def _notes(
    rows: Sequence[RowResult],
    subject: Subject | Served,
    prompts: Sequence[Prompt],
    settings: Settings,
) -> tuple[str, ...]:
    """Return notes on what the measures do not show."""
    replies = [reply for row in rows for reply in row.replies]
    most = settings.drawn.max_new_tokens
    context = subject.context
    short = 0
    if context is not None:
        short = sum(len(prompt.ids) + most > context for prompt in prompts)
    notes = []
    if cut := sum(reply.would_be_right for reply in replies):
        notes.append(
            "replies that contain the expected answer but did not end do not match "
            f"({cut:,} of them): raise --max-new-tokens"
        )
    if short:
        notes.append(
            f"fewer than {most:,} tokens of the context remain for the reply after "
            f"{counted(short, 'prompt')}"
        )
    if slow := sum(reply.slow for reply in replies):
        notes.append(
            f"{counted(slow, 'reply', 'replies')} took too long to compare and did not match"
        )
    return tuple(notes)
