"""Tasks of lm-evaluation-harness: each model asked as it is served, and by the raw prompt.

input   models, names of tasks or YAML files
does    refuses at once what cannot be; asks every model both ways; holds the served prompt to the
        raw one, and each model to the first, on the same documents
output  TaskEvaluation
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import html
import importlib.util
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truetune.contract.source import require_template
from truetune.errors import DataError, TruetuneError, UsageError
from truetune.evaluation.interval import Bootstrap, Interval, interval, score, score_difference
from truetune.evaluation.result import Difference, Measure, difference
from truetune.evaluation.served import is_served
from truetune.evaluation.subject import Subject, require_each_once, require_subject
from truetune.evaluation.table import of_model, short_names, wrapped
from truetune.findings import Finding
from truetune.model.load import load_model
from truetune.model.placement import require_device

Progress = Callable[[int, int | None], None]

SERVED, RAW = "as served", "raw prompt"
# Columns of the table.
_LABEL, _CELL = 22, 27


@dataclass(frozen=True)
class Score:
    """One metric of one task, for one model under one way of asking.

    Attributes:
        value: as the harness aggregates it.
        interval: 95 %, over documents.
        each: a number per document; () if the metric is no mean of such.
        number: of documents.
    """

    value: float
    interval: Interval | None
    each: tuple[float, ...]
    number: int


@dataclass(frozen=True)
class TaskMetric:
    """What is measured.

    Attributes:
        task, metric, filter: as the harness names them.
        better: 1 where more is better, -1 where less is.
        percent: a share, shown in percent.
    """

    task: str
    metric: str
    filter: str
    better: int
    percent: bool

    @property
    def label(self) -> str:
        of = "" if self.filter == "none" else f" ({self.filter})"
        return f"{self.task}: {self.metric}{of}{', %' if self.percent else ''}"


@dataclass(frozen=True)
class TaskModel:
    """One model on all tasks.

    Attributes:
        name: as the user wrote it.
        scores: by the way of asking, then in the order of the metrics.
        served_against_raw: in the order of the metrics.
        against_first: of the served prompts; () for the first model.
        samples: what the harness logged, by the way of asking, then by task.
        notes: what else is to be reported.
        findings: what opening the model had to tell.
    """

    name: str
    scores: dict[str, tuple[Score, ...]]
    served_against_raw: tuple[Difference, ...]
    against_first: tuple[Difference, ...]
    samples: dict[str, dict[str, list[dict[str, Any]]]]
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class TaskEvaluation:
    """Models on the same tasks.

    Attributes:
        tasks: the tasks, as the user named them.
        settings: how replies were generated and scored.
        metrics: what was measured.
        models: the results, in the order given; the others are compared with the first.
    """

    tasks: tuple[str, ...]
    settings: dict[str, Any]
    metrics: tuple[TaskMetric, ...]
    models: tuple[TaskModel, ...]

    def __getitem__(self, model: str) -> TaskModel:
        """A model's results, by its name."""
        return of_model(self.models, model)

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def lines(self) -> Iterator[str]:
        """Yield the table as lines: how the models were prompted, scores, differences, notes."""
        names = short_names([model.name for model in self.models])
        shots = self.settings["shots"]
        yield from wrapped(
            f"tasks of lm-evaluation-harness: {', '.join(self.tasks)}; "
            + ("each task's own number of shots" if shots is None else f"{shots} shots")
        )
        yield from wrapped(
            f"{SERVED}: with the model's own chat template and stop tokens; {RAW}: the task's "
            f"text without a template"
        )
        for name, model in zip(names, self.models, strict=True):
            if name != model.name:
                yield from wrapped(f"{name} is {model.name}")
        for first in range(0, len(names), 2):
            shown = range(first, min(first + 2, len(names)))
            yield ""
            yield _row("", [names[at] for at in shown])
            for at, metric in enumerate(self.metrics):
                yield from wrapped(
                    f"{metric.label}, {self.models[0].scores[SERVED][at].number:,} documents"
                )
                for way in (SERVED, RAW):
                    yield _row(
                        f"  {way}",
                        [_value(metric, self.models[m].scores[way][at]) for m in shown],
                    )
                if not self.models[0].scores[SERVED][at].each:
                    continue
                yield _row(
                    "  served against raw",
                    [_told(metric, self.models[m].served_against_raw[at]) for m in shown],
                )
                if len(names) > 1:
                    against = [self.models[m].against_first for m in shown]
                    cells = [_told(metric, each[at]) if each else "" for each in against]
                    yield _row("  against first", cells)
        yield ""
        yield from wrapped(
            "[ ]: 95 % intervals over the same documents (score intervals for yes/no metrics, "
            "bootstrap intervals otherwise); a difference on fewer than six documents is "
            "inconclusive"
        )
        for name, model in zip(names, self.models, strict=True):
            for note in model.notes:
                yield from wrapped(f"{name}: {note}")

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the documents as plain values."""
        return {
            "tasks": list(self.tasks),
            "settings": self.settings,
            "models": [
                {
                    "name": model.name,
                    "metrics": [
                        {
                            **asdict(metric),
                            "documents": model.scores[SERVED][at].number,
                            "served": _plain(model.scores[SERVED][at]),
                            "raw": _plain(model.scores[RAW][at]),
                            "served_against_raw": asdict(model.served_against_raw[at]),
                            "against_first": asdict(model.against_first[at])
                            if model.against_first
                            else None,
                        }
                        for at, metric in enumerate(self.metrics)
                    ],
                    "notes": list(model.notes),
                    "findings": [finding.as_dict() for finding in model.findings],
                }
                for model in self.models
            ],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one dict per document, model and kind of prompt."""
        for model in self.models:
            for asked, tasks in model.samples.items():
                for task, samples in tasks.items():
                    for sample in samples:
                        plain = json.loads(json.dumps(sample, default=str))
                        yield {"model": model.name, "asked": asked, "task": task, **plain}


def require_tasks(
    models: Sequence[str], tasks: Sequence[str], shots: int | None, limit: int | None
) -> None:
    """Refuse what can be refused without torch.

    Raises:
        UsageError, InputError: the first thing that is not there.
    """
    usage = "truetune eval MODEL --tasks TASK,FILE.yaml"
    require_each_once(models, usage)
    if not tasks:
        raise UsageError("no task was given", fix=f"run {usage}", code="no-task")
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise UsageError(
                f"--{name} is {value}, but it must be at least {least}", code="evaluation-setting"
            )
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks needs lm-evaluation-harness, which is not installed",
            why="it belongs to the extra truetune[eval]",
            fix="pip install 'truetune[eval]', or pip install lm-eval",
            code="extra-missing",
        )
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise UsageError(
                f"no such task file: {task}",
                where="--tasks",
                fix="pass a task's YAML file, or the name of one of the harness's tasks",
                code="task-missing",
            )
    for name in models:
        if is_served(name):
            raise UsageError(
                "--tasks needs the weights, which a GGUF file or a server does not provide",
                where=name,
                why="most tasks compare the probabilities of given answers",
                fix="pass the model's folder, or evaluate it on rows: --data DATA",
                code="tasks-need-weights",
            )
        require_subject(name)


def evaluate_tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat_template: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    on_stage: Callable[[str], None] | None = None,
    on_progress: Progress | None = None,
) -> TaskEvaluation:
    """Ask models the tasks of lm-evaluation-harness, each as it is served and by the raw prompt.

    Args:
        models: runs, model or adapter folders, or Hub ids; the others are compared with the first.
        tasks: names the harness knows, or YAML files of one's own.
        shots: worked examples before each question; the task's own number where None.
        limit: the first so many documents of each task.
        seed: of the shots and of sampling.
        chat_template: for every model; its own where None.
        on_stage, on_progress: are called with what is being done, and how far it is.

    Raises:
        TruetuneError: a model or a task cannot be used.
    """
    require_tasks(models, tasks, shots, limit)
    require_device(device)
    if chat_template is not None:
        require_template(chat_template)
    stage = on_stage or (lambda _: None)
    stage("reading the tasks")
    loaded = _tasks(tasks, shots)
    found = []
    for name in models:
        stage(f"loading {name}")
        subject = Subject.open(name, chat_template, revision)
        found.append((subject, _asked(subject, loaded, limit, seed, device, stage, on_progress)))
    stage("comparing")
    metrics = _metrics([ways[SERVED][0] for _, ways in found])
    made = [
        (
            subject,
            {
                way: tuple(_score(m, result, seed) for m in metrics)
                for way, (result, _) in ways.items()
            },
            ways,
        )
        for subject, ways in found
    ]
    first = made[0][1][SERVED]
    return TaskEvaluation(
        tuple(tasks),
        {"shots": shots, "limit": limit, "seed": seed, "chat_template": chat_template},
        metrics,
        tuple(
            TaskModel(
                subject.name,
                scores,
                _differences(metrics, scores[SERVED], scores[RAW], seed),
                () if at == 0 else _differences(metrics, scores[SERVED], first, seed),
                {way: result["samples"] for way, (result, _) in ways.items()},
                tuple(
                    f"{way}: {cut:,} prompts were longer than the context; their beginning was cut"
                    for way, (_, cut) in ways.items()
                    if cut
                ),
                tuple(f for f in subject.findings if f.level != "note"),
            )
            for at, (subject, scores, ways) in enumerate(made)
        ),
    )


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) or "/" in task


def _tasks(tasks: Sequence[str], shots: int | None) -> Any:
    """The harness's tasks.

    Raises:
        UsageError: a name that it does not know.
        DataError: a file that is no task, or documents that cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    # Thousands of files are read for the names of the harness's own.
    manager = TaskManager(include_defaults=not all(map(_is_file, tasks)))
    for task in tasks:
        if not _is_file(task) and task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 3)
            raise UsageError(
                f"lm-evaluation-harness has no task {task!r}",
                where="--tasks",
                fix=f"use one of {', '.join(near)}"
                if near
                else "`lm-eval ls tasks` lists all tasks",
                code="task-missing",
            )
    try:
        with _unheard():
            loaded = manager.load([str(Path(t).resolve()) if _is_file(t) else t for t in tasks])
    except Exception as error:  # whatever a task's own functions and data sets raise
        raise _unusable(tasks, error) from error
    for task in loaded["tasks"].values():
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _unusable(tasks: Sequence[str], error: Exception) -> DataError:
    return DataError(
        f"the tasks cannot be run: {type(error).__name__}: {error}",
        where=f"--tasks {','.join(tasks)}",
        why="a task defines its dataset, and how questions and answers are made from it",
        fix="`lm-eval validate --tasks TASK` checks a task by itself; datasets that are not on "
        "this machine need the network",
        code="task-unusable",
    )


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Without the harness's own progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _asked(
    subject: Subject,
    loaded: Any,
    limit: int | None,
    seed: int,
    device: str,
    stage: Callable[[str], None],
    on_progress: Progress | None,
) -> dict[str, tuple[Any, int]]:
    """What the harness makes of a model under each way of asking, and how many prompts were cut;
    the weights are gone afterwards."""
    from lm_eval.evaluator import evaluate

    from truetune.evaluation.harness import ContractModel

    model = load_model(
        subject.folder,
        revision=subject.revision,
        device=device,
        purpose="inference",
        tokenizer=subject.tokenizer,
    )
    found = {}
    for way in (SERVED, RAW):
        stage(f"evaluating {subject.name}, {way}")
        asked = ContractModel(
            model,
            subject.contract,
            subject.context,
            served=way == SERVED,
            seed=seed,
            on_progress=on_progress,
        )
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=seed)
        try:
            with _unheard():
                result = evaluate(
                    asked,
                    loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    apply_chat_template=way == SERVED,
                    fewshot_as_multiturn=True,
                )
        except TruetuneError:
            raise
        except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
            raise _unusable(list(loaded["tasks"]), error) from error
        found[way] = (result, asked.cut)
    del model
    gc.collect()
    return found


# ------------------------------------------------------------------------------------ numbers


def _metrics(results: Sequence[Any]) -> tuple[TaskMetric, ...]:
    """What the harness measured of every model."""
    found = []
    for task, values in results[0]["results"].items():
        for name, value in values.items():
            metric, _, of = name.partition(",")
            if not of or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            more = results[0]["higher_is_better"].get(task, {}).get(metric)
            each = [x for result in results for x in _each(result, task, metric, of)]
            is_share = bool(each) and all(0 <= x <= 1 for x in each)
            found.append(TaskMetric(task, metric, of, -1 if more is False else 1, is_share))
    return tuple(found)


def _each(result: Any, task: str, metric: str, of: str) -> tuple[float, ...]:
    """A metric of each document; () if it is no number there, or the whole is not their mean."""
    kept = [s for s in result["samples"].get(task, []) if s["filter"] == of]
    values = [sample.get(metric) for sample in sorted(kept, key=lambda s: s["doc_id"])]
    numbers = tuple(float(v) for v in values if isinstance(v, int | float))
    whole = result["results"][task][f"{metric},{of}"]
    if not numbers or len(numbers) != len(values):
        return ()
    mean = sum(numbers) / len(numbers)
    return numbers if math.isclose(mean, float(whole), rel_tol=1e-6, abs_tol=1e-9) else ()


def _score(metric: TaskMetric, result: Any, seed: int) -> Score:
    values = result["results"][metric.task]
    name = f"{metric.metric},{metric.filter}"
    each = _each(result, metric.task, metric.metric, metric.filter)
    number = int(values.get("sample_len") or len(each))
    around = None
    if each and _yes_or_no(each):
        around = score(int(sum(each)), len(each))
    elif each:
        around = _resampled(each, seed)
    return Score(float(values[name]), around, each, number)


def _yes_or_no(each: Sequence[float]) -> bool:
    return all(x in (0.0, 1.0) for x in each)


def _resampled(each: Sequence[float], seed: int) -> Interval | None:
    import torch

    column_N1 = torch.tensor(each, dtype=torch.float64)[:, None]
    return interval(Bootstrap(len(each), seed).sums(column_N1)[:, 0] / len(each))


def _differences(
    metrics: Sequence[TaskMetric], ones: Sequence[Score], others: Sequence[Score], seed: int
) -> tuple[Difference, ...]:
    return tuple(
        _difference(metric, one, other, seed)
        for metric, one, other in zip(metrics, ones, others, strict=True)
    )


def _difference(metric: TaskMetric, one: Score, other: Score, seed: int) -> Difference:
    """One score less another, of the same documents."""
    if not one.each or len(one.each) != len(other.each):
        return Difference("not compared", one.value - other.value)
    pairs = list(zip(one.each, other.each, strict=True))
    if _yes_or_no(one.each) and _yes_or_no(other.each):
        counts = [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
        around: Interval | None = score_difference(*counts)
    else:
        around = _resampled([a - b for a, b in pairs], seed)
    measure = Measure(metric.metric, metric.label, metric.better, metric.percent)
    return difference(measure, one.value - other.value, around, sum(a != b for a, b in pairs))


def _plain(found: Score) -> dict[str, Any]:
    return {
        "value": found.value,
        "interval": None if found.interval is None else asdict(found.interval),
    }


def _row(label: str, cells: Sequence[str]) -> str:
    return "".join([f"{label:<{_LABEL}}", *(f"{cell:<{_CELL}}" for cell in cells)]).rstrip()


def _number(metric: TaskMetric, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if metric.percent else f"{value:{sign}.4g}"


def _around(metric: TaskMetric, found: Interval | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f" [{_number(metric, found.low, sign)}, {_number(metric, found.high, sign)}]"


def _value(metric: TaskMetric, found: Score) -> str:
    return _number(metric, found.value) + _around(metric, found.interval)


def _told(metric: TaskMetric, found: Difference) -> str:
    return found.word + _around(metric, found.interval, "+")
