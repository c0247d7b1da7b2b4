"""The verb that compares models on rows or tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truetune.cli.arguments import Device
from truetune.cli.verb import open_screen
from truetune.errors import UsageError

if TYPE_CHECKING:
    from truetune.evaluation.table import Evaluation
    from truetune.evaluation.tasks import TaskEvaluation

_READING, _SAMPLING = "Rows", "Replies"


def evaluate_models(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Runs, model or adapter folders, Hub ids, GGUF files, or addresses of servers.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="A file, a folder, or a Hub dataset.")
    ] = None,
    match: Annotated[
        str,
        typer.Option(metavar="NAME", help="exact, contains, number, regex, json or none."),
    ] = "exact",
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Pattern for --match regex. (default: each row's answer)"
        ),
    ] = None,
    show: Annotated[
        int, typer.Option(help="Print this many rows on which the last model does worst.", min=0)
    ] = 0,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE.jsonl", help="Write one line per row and model."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only the first rows of DATA.", rich_help_panel=_READING),
    ] = None,
    shots: Annotated[
        int,
        typer.Option(
            help="Number of other rows to show before each question.", rich_help_panel=_READING
        ),
    ] = 0,
    split: Annotated[
        str | None, typer.Option(help="Split of a folder or a dataset.", rich_help_panel=_READING)
    ] = None,
    schema: Annotated[
        str, typer.Option(help="Schema of the rows, as for `train`.", rich_help_panel=_READING)
    ] = "auto",
    columns: Annotated[
        str | None,
        typer.Option(
            help="Column names, e.g. prompt=question,completion=answer.", rich_help_panel=_READING
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of a reply, in tokens.", rich_help_panel=_SAMPLING)
    ] = 256,
    samples: Annotated[
        int, typer.Option(help="Replies per row, for pass@1 and maj@K.", rich_help_panel=_SAMPLING)
    ] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 means greedy decoding. (default: 0; 1 with several samples)",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the smallest set of tokens with this total probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            help="Sample from the k most likely tokens; 0 means all.", rich_help_panel=_SAMPLING
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Random seed for shots, sampling and intervals.")] = 0,
    chat_template: Annotated[
        str | None, typer.Option(help="Template for all models. (default: each model's own)")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    device: Device = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,FILE.yaml",
            help="Tasks of lm-evaluation-harness, in place of --data.",
            rich_help_panel=_READING,
        ),
    ] = None,
) -> None:
    """Send the questions in DATA to each model, in the prompt format that it is served with, and
    compare the replies.

    A row's prompt is its messages up to the last assistant turn, and that turn is the expected
    answer. The other models are compared with the first. --match defines when a reply that ended is
    correct:

    \b
    exact     the same text, except for whitespace
    contains  the reply contains the row's answer as whole words
    number    the last numbers are equal
    regex     the row's answer, or --pattern, is found as a pattern; what its
              first group, if any, captures last is what it captures in the
              row's answer
    json      equal values
    none      replies are not compared; rows still need an answer, for the loss

    \b
    truetune eval runs/first --data held_out.jsonl
    truetune eval Qwen/Qwen2.5-0.5B-Instruct runs/first --data rows.jsonl --match number --show 5
    truetune eval Qwen/Qwen2.5-0.5B-Instruct runs/first --tasks arc_easy,mine.yaml --limit 200
    """
    from truetune.cli.eval_screen import show_evaluation

    if tasks is not None:
        _evaluate_tasks(
            context,
            models,
            tasks,
            output=output,
            overwrite=overwrite,
            as_json=as_json,
            shots=shots,
            limit=limit,
            seed=seed,
            chat_template=chat_template,
            revision=revision,
            device=device,
        )
        return
    from truetune.evaluation.evaluate import Settings, evaluate

    settings = Settings.of(
        match=match,
        pattern=pattern,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        samples=samples,
        seed=seed,
        shots=shots,
        limit=limit,
        split=split,
        schema=schema,
        columns=columns,
        chat_template=chat_template,
        revision=revision,
        device=device,
    )
    _ask(
        partial(evaluate, models, data or "", settings),
        partial(show_evaluation, worst=show),
        data or "",
        output,
        overwrite=overwrite,
        as_json=as_json,
    )


# Options of `eval` that hold for tasks too; a task says the others itself.
_OF_TASKS = {
    *("models", "tasks", "output", "overwrite", "as_json", "shots", "limit"),
    *("seed", "chat_template", "revision", "device"),
}


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _evaluate_tasks(
    context: typer.Context,
    models: list[str],
    tasks: str,
    *,
    output: str | None,
    overwrite: bool,
    as_json: bool,
    shots: int,
    **settings: Any,
) -> None:
    from truetune.cli.eval_screen import show_tasks
    from truetune.evaluation.tasks import evaluate_tasks

    given = {name for name in context.params if _was_given(context, name)}
    if idle := sorted(given.difference(_OF_TASKS)):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UsageError(
            f"{named} and --tasks cannot be used together",
            why="a task defines its own data, prompts and scoring",
            fix="omit one of them",
            code="evaluation-setting",
        )
    _ask(
        partial(
            evaluate_tasks,
            models,
            [name.strip() for name in tasks.split(",") if name.strip()],
            shots=shots if "shots" in given else None,
            **settings,
        ),
        show_tasks,
        "",
        output,
        overwrite=overwrite,
        as_json=as_json,
    )


def _ask(
    evaluated: Callable[..., Evaluation | TaskEvaluation],
    shown: Callable[..., None],
    data: str,
    output: str | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Ask, and write and print what was found.

    Args:
        evaluated: evaluates the models; takes callbacks for stages and progress.
        shown: prints the table.
        data: which `output` must not replace.
    """
    from truetune.cli.eval_screen import require_writable, write_rows

    if output is not None:
        require_writable(Path(output), data, overwrite=overwrite)
    screen = open_screen()
    # In a pipe the table is all there is.
    moves = screen.console.is_terminal and not as_json
    with closing(screen):
        found = evaluated(
            on_stage=screen.stage if moves else None,
            on_progress=screen.progress if moves else None,
        )
    if output is not None:
        write_rows(Path(output), found)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        shown(screen, found)
