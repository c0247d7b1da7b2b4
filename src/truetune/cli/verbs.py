"""The verbs of the command line. Nothing else prints.

Heavy modules are imported inside the verbs, so that help is quick.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from truetune import __version__
from truetune.cli import lab_verbs
from truetune.cli.options import canonical, own_option, with_settings
from truetune.cli.verb import CONTEXT, Verb, open_screen
from truetune.errors import (
    CheckFailed,
    ToldElsewhere,
    TruetuneError,
    UsageError,
    is_out_of_memory,
)
from truetune.recipe.given import recipe_of
from truetune.recipe.sources import make_recipe
from truetune.run.early import ask_first
from truetune.system import signals

_ORIGIN = "command line"

app = typer.Typer(
    name="truetune",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
    help="Supervised fine-tuning where what is trained is what is served.",
)
app.add_typer(lab_verbs.lab, name="lab")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"truetune {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The verbs do the work."""


def train(source: str | None, rows: str | None, resume: str | None = None, **options: Any) -> None:
    """Fine-tune MODEL on DATA, or run a YAML recipe.

    \b
    truetune train Qwen/Qwen2.5-0.5B-Instruct rows.jsonl --lora -o runs/first
    truetune train recipe.yaml --learning-rate 5e-5
    truetune train --resume runs/first
    """
    recipe = recipe_of(source, rows, resume, options, _ORIGIN)
    ask_first(recipe)
    from truetune.run.pipeline import train as run

    screen = open_screen()
    try:
        result = run(recipe, screen, resume=resume)
    finally:
        screen.close()
    from truetune.cli.result_screen import show_result

    show_result(screen, result)


app.command("train", cls=Verb)(
    with_settings(
        train,
        own_option("resume", str | None, None, help="Continue an unfinished run.", metavar="RUN"),
    )
)


def check(
    source: str | None,
    rows: str | None,
    smoke_test: bool,
    show_all: bool,
    as_json: bool,
    html: str | None,
    **options: Any,
) -> None:
    """Check the run that `train` would start with the same arguments, without loading weights.

    Without DATA, check how a finished model or adapter from any tool would behave when it is
    served.

    \b
    truetune check Qwen/Qwen2.5-0.5B-Instruct rows.jsonl --lora
    truetune check recipe.yaml --html check.html
    truetune check path/to/checkpoint
    """
    recipe = recipe_of(source, rows, None, options, _ORIGIN)
    from truetune.cli.check_screen import CheckScreen, show_checkup
    from truetune.listener import Listener
    from truetune.run.checkup import check as checked

    screen = CheckScreen()
    listener = Listener() if as_json else screen
    try:
        found = checked(recipe, listener, smoke_test=smoke_test)
    finally:
        screen.close()
    if html:
        from truetune.cli.check_page import page
        from truetune.reporting.html import write_document

        write_document(Path(html), page(found.as_dict()))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=True))
    else:
        show_checkup(screen, found, everything=show_all, page=html)
    if not found.ok:
        raise typer.Exit(1)


app.command("check", cls=Verb, short_help="Check a planned run or a finished model.")(
    with_settings(
        check,
        own_option(
            "smoke_test",
            bool,
            False,
            "--smoke-test",
            "--rehearse",
            help="Load the model too: one real step, a dry save and reload.",
        ),
        own_option("show_all", bool, False, "--all", help="Show every finding."),
        own_option("as_json", bool, False, "--json", help="Print JSON."),
        own_option("html", str | None, None, "--html", help="Write an HTML page.", metavar="FILE"),
    )
)

# Arguments and options that several verbs have.
_Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL|FILE.gguf", help="A run, a model or adapter folder, or a GGUF file."
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(help="Where the base is now, if it has moved. (default: as recorded)"),
]
_Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(cls=Verb, short_help="Chat with a run or a model.")
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a model folder, or a Hub id.")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Ask one question, print the answer and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Also ask another run or model; `base` is the model that the run started from."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file or built-in name. (default: the model's own)")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer, in tokens.")
    ] = 256,
    temperature: Annotated[float, typer.Option(help="0 means greedy decoding.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the smallest set of tokens with this total probability."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from the k most likely tokens; 0 means all.")
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Values above 1 penalise repetition.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    device: _Device = "auto",
) -> None:
    """Chat with a run or a model, using the prompt format that it was trained on.

    \b
    truetune chat runs/first
    truetune chat runs/first --prompt "What is a river?" --compare base
    """
    from truetune.cli.chat_screen import Talk
    from truetune.generate import Sampling

    screen = open_screen()
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    talk = Talk.open(
        screen,
        model,
        compare=compare,
        chat_template=chat_template,
        revision=revision,
        device=device,
        system=system,
        sampling=sampling,
    )
    if prompt is not None:
        talk.ask(prompt)
    else:
        talk.loop()


_ROWS = "Rows"


def _inspect_rows(
    own: dict[str, Any],
    settings: Sequence[str],
    row: str | None,
    page: str | None,
    *,
    with_ids: bool,
) -> None:
    """Rows on the terminal or as a page."""
    from truetune.cli.rows_screen import rows_page, show_rows, view_rows
    from truetune.reporting.html import write_document

    pairs = [text.partition("=") for text in settings]
    for text, (_, equals, _) in zip(settings, pairs, strict=True):
        if not equals:
            raise UsageError(
                f"--set {text!r} is not of the form NAME=VALUE",
                fix="for example --set loss_on=last",
            )
    given = [("command line", {name: value}) for name, _, value in pairs]
    recipe = make_recipe(*given, ("command line", {k: v for k, v in own.items() if v is not None}))
    contract, views, total = view_rows(recipe, row, most=50 if page else 1)
    screen = open_screen()
    if page is None:
        show_rows(screen, contract, views, total, with_ids=with_ids)
        return
    title = f"{own['data']} for {own['model']}"
    write_document(Path(page), rows_page(contract, views, total, title))
    screen.line(f"{len(views):,} of {total:,} rows: {page}")


@app.command(
    "inspect", cls=Verb, short_help="Show the facts of a model, or rows as they are trained."
)
def inspect_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a model folder, or a Hub id.")
    ],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file or built-in name. (default: the model's own)")
    ] = None,
    as_json: _Json = False,
    data: Annotated[
        str | None, typer.Option(help="Show these rows as they are trained.", rich_help_panel=_ROWS)
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(
            metavar="N|PLACE",
            help="Number of the row, or its place as shown in findings. (default: 1)",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    ids: Annotated[
        bool, typer.Option("--ids", help="Show token ids next to the text.", rich_help_panel=_ROWS)
    ] = False,
    page: Annotated[
        str | None,
        typer.Option(
            "--html", help="Write an HTML page with 50 rows, or with --row.", rich_help_panel=_ROWS
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting of `train`, e.g. loss_on=last; may be repeated.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
) -> None:
    """Show a model's template, stop tokens, vocabulary, head and LoRA targets.

    With --data, show rows as they are trained: served prompt, supervised tokens, stop tokens.

    \b
    truetune inspect MODEL
    truetune inspect MODEL --data rows.jsonl --row 17
    truetune inspect MODEL --data rows.jsonl --html rows.html
    """
    if data is not None:
        own = {"model": model, "revision": revision, "chat_template": chat_template, "data": data}
        _inspect_rows(own, setting or [], row, page, with_ids=ids)
        return
    if row is not None or page or ids or setting:
        raise UsageError(
            "--row, --ids, --html and --set need --data",
            fix=f"truetune inspect {shlex.quote(model)} --data DATA",
            code="rows-without-data",
        )
    from truetune.cli.model_screen import model_facts, show_model

    facts = model_facts(model, revision=revision, chat_template=chat_template)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=True))
    else:
        show_model(open_screen(), facts)


_READING, _SAMPLING = "Rows", "Replies"


@app.command("eval", cls=Verb, short_help="Compare models on rows, side by side.")
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
        int, typer.Option(help="Print this many rows on which the last model is worst.", min=0)
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
        typer.Option(help="prompt=question,completion=answer.", rich_help_panel=_READING),
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
    device: _Device = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,FILE.yaml",
            help="Tasks of lm-evaluation-harness, in place of --data.",
            rich_help_panel=_READING,
        ),
    ] = None,
) -> None:
    """Ask models the questions in DATA, each with its served prompt, and compare the replies.

    A row's prompt is its messages up to the last assistant turn, and that turn is the expected
    answer. The other models are compared with the first. --match defines when a reply that ended is
    correct:

    \b
    exact     the same text, except for whitespace
    contains  the reply contains the row's answer as whole words
    number    the last numbers are equal
    regex     the row's answer, or --pattern, is found; its first group, if any,
              must match the same text as in the row's answer
    json      equal values
    none      nothing is compared; rows still need an answer, for the loss

    \b
    truetune eval runs/first --data held_out.jsonl
    truetune eval Qwen/Qwen2.5-0.5B-Instruct runs/first --data rows.jsonl --match number --show 5
    truetune eval Qwen/Qwen2.5-0.5B-Instruct runs/first --tasks arc_easy,mine.yaml --limit 200
    """
    from truetune.cli.eval_screen import require_writable, show_evaluation, write_rows

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
    if output is not None:
        require_writable(Path(output), data or "", overwrite=overwrite)
    screen = open_screen()
    # In a pipe the table is all there is.
    moves = screen.console.is_terminal and not as_json
    try:
        found = evaluate(
            models,
            data or "",
            settings,
            on_stage=screen.stage if moves else None,
            on_progress=screen.progress if moves else None,
        )
    finally:
        screen.close()
    if output is not None:
        write_rows(Path(output), found)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show_evaluation(screen, found, show)


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
    from truetune.cli.eval_screen import require_writable, show_tasks, write_rows
    from truetune.evaluation.tasks import evaluate_tasks

    given = {name for name in context.params if _was_given(context, name)}
    if idle := sorted(given.difference(_OF_TASKS)):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UsageError(
            f"{named} and --tasks cannot be used together",
            why="a task names its data, and says itself how models are asked and judged",
            fix="leave one of them out",
            code="evaluation-setting",
        )
    if output is not None:
        require_writable(Path(output), "", overwrite=overwrite)
    screen = open_screen()
    moves = screen.console.is_terminal and not as_json
    try:
        found = evaluate_tasks(
            models,
            [name.strip() for name in tasks.split(",") if name.strip()],
            shots=shots if "shots" in given else None,
            on_stage=screen.stage if moves else None,
            on_progress=screen.progress if moves else None,
            **settings,
        )
    finally:
        screen.close()
    if output is not None:
        write_rows(Path(output), found)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show_tasks(screen, found)


_GGUF = "GGUF and MLX"


@app.command(
    "export", cls=Verb, short_help="Write a model for servers: merged, GGUF, MLX and others."
)
def export_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a model or adapter folder.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="NAME", help="merged, gguf, ollama, mlx, vllm or sglang: see above."
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="The same as --to merged.")] = False,
    base: _Base = None,
    onto: Annotated[
        str,
        typer.Option(
            help="original: the unquantised weights. dequantised: rounded as in training. "
            "(default: auto, those that the adapter was trained on)",
            show_default=False,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float16 or float32. (default: auto, the base's)", show_default=False
        ),
    ] = "auto",
    quant: Annotated[
        str | None,
        typer.Option(
            help="GGUF: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, "
            "q4_1, q4_0. MLX: f32, f16, bf16, 8bit, 6bit, 5bit, 4bit. (default: f16; bf16 for MLX)",
            rich_help_panel=_GGUF,
            show_default=False,
        ),
    ] = None,
    go_template: Annotated[
        bool,
        typer.Option(
            "--go-template",
            help="ollama: write the template as Go text, for Ollama before 0.30.",
            rich_help_panel=_GGUF,
        ),
    ] = False,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help="gguf: write the adapter alone, for a GGUF file of its base.",
            rich_help_panel=_GGUF,
        ),
    ] = False,
    device: _Device = "cpu",
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Do not compare the merged model with the adapter in a fresh process.",
        ),
    ] = False,
    as_json: _Json = False,
) -> None:
    """Write a model in a form that servers load.

    merged: one folder that can be loaded without peft. The weights are added in float32, on
    unquantised weights, and cast to the base's own dtype. A fresh process then compares the result
    with the adapter on the run's held-out prompts. A model that is whole already is copied.

    gguf: one file for llama.cpp and programs built on it, from an adapter or a whole model.
    llama.cpp then serves the file, and its prompts, ids, stop tokens and predictions are compared
    with the model's. This needs the extra `gguf`.

    ollama: the GGUF file with a Modelfile. Ollama renders the file's own template; the Modelfile
    prevents it from choosing another one.

    mlx: a folder for MLX, written by mlx_lm and compared with the model. This needs the extra
    `mlx`.

    vllm, sglang: the adapter if the server can load it on its base, else the merged model, and the
    command that serves it. DoRA, new tokens, whole layers, quantised bases and stop tokens that the
    base does not have need the merged model.

    If anything differs, nothing is written to the output folder.

    \b
    truetune export runs/first --to merged -o merged
    truetune export runs/first --to gguf --quant q8_0 -o first-gguf
    truetune export runs/first --to ollama --quant q4_k_m -o first-ollama
    """
    from truetune.cli.export_screen import (
        export_gguf,
        export_merged,
        export_mlx,
        export_served,
    )
    from truetune.run.export_kind import require_export

    what, held = require_export(
        to,
        merge=merge,
        onto=onto,
        no_verify=no_verify,
        dtype=dtype,
        go_template=go_template,
        adapter=adapter,
        quant=quant,
        source=run,
        output=output,
    )
    screen = open_screen()
    if what in ("gguf", "ollama"):
        more: dict[str, Any] = {} if adapter else {"onto": onto, "go_template": go_template}
        export_gguf(
            screen,
            run,
            output,
            what="adapter" if adapter else what,
            quant=held,
            base=base,
            device=device,
            as_json=as_json,
            **more,
        )
        return
    if what == "mlx":
        export_mlx(
            screen, run, output, quant=held, base=base, onto=onto, device=device, as_json=as_json
        )
        return
    merging: dict[str, Any] = {
        "base": base,
        "onto": onto,
        "dtype": None if dtype == "auto" else dtype,
        "device": device,
        "check": not no_verify,
        "as_json": as_json,
    }
    if what == "merged":
        export_merged(screen, run, output, **merging)
    else:
        export_served(screen, run, output, server=what, **merging)


@app.command("diagnose", cls=Verb, short_help="Find the first stage at which a model breaks.")
def diagnose_model(
    source: _Source,
    merged: Annotated[str | None, typer.Option(help="The folder of the merged model.")] = None,
    quantised: Annotated[
        str | None,
        typer.Option("--quantised", "--quantized", help="The folder of a quantised model."),
    ] = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="FILE", help="A GGUF file made from it; needs llama.cpp.")
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A server that serves it.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Stages to examine: base,adapter,model,merged,quantised,gguf,url. (default: all)",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rows to ask. (default: rows of the run)")
    ] = None,
    base: _Base = None,
    as_json: _Json = False,
) -> None:
    """Run the same rows through every stage between training and serving, and name the first stage
    that changes the model's behaviour, with its likely cause.

    The trained model is compared with the record of its run. Merged folders, GGUF files (through
    llama.cpp) and running servers are compared with the trained model: prompts as text and as ids,
    predictions, greedy replies, and whether they end. The exit code is 1 if a stage differs.

    \b
    truetune diagnose runs/first
    truetune diagnose runs/first --merged merged --gguf first-gguf/model-q8_0.gguf
    truetune diagnose runs/first --url http://127.0.0.1:8080
    truetune diagnose model-q4_0.gguf
    """
    from truetune.cli.diagnose_screen import show_diagnosis
    from truetune.diagnosis.diagnose import diagnose

    screen = open_screen()
    try:
        found = diagnose(
            source,
            stages=[name.strip() for name in stages.split(",")] if stages else (),
            base=base,
            merged=merged,
            quantised=quantised,
            gguf=gguf,
            url=url,
            data=data,
            on_stage=None if as_json else screen.stage,
        )
    finally:
        screen.close()
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show_diagnosis(screen, found)
    if found.first is not None:
        raise typer.Exit(1)


@app.command("verify", cls=Verb, short_help="Check that what was saved is what was trained.")
def verify_run(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, or a model or adapter folder.")
    ],
    base: _Base = None,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Load what was saved in a fresh process, and compare it with what was trained.

    For a run, compare the hashes of its files, its base, template and stop tokens, the ids of its
    rows, and the probabilities that the trained model gave before it was saved. For any other
    folder, check that it loads and computes.

    \b
    truetune verify runs/first
    """
    from truetune.verification.artifact import verify

    verdict = verify(model, base=base, device=device)
    if as_json:
        typer.echo(json.dumps(verdict.as_dict(), indent=2))
        raise typer.Exit(0 if verdict.passed else 1)
    screen = open_screen()
    from truetune.cli.result_screen import show_checks

    show_checks(screen, verdict)
    if not verdict.passed:
        raise CheckFailed("what was saved is not what was trained", verdict.findings())


@app.command("report", cls=Verb, short_help="Write the page of a run.")
def report_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, finished or not.")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="(default: RUN/report.html)", show_default=False
        ),
    ] = None,
) -> None:
    """Write the page of a run: whether it was trained as served, saved as trained and behaves well;
    replies of the base and the tuned model; curves, rows, recipe and findings. The page is one file
    without scripts and needs no network.

    `train` writes the page when it ends. The page of a run that is still active, or was stopped,
    can be written too.

    \b
    truetune report runs/first
    truetune report runs/first -o report.html
    """
    from truetune.reporting.page import write_report
    from truetune.run_dir import REPORT, RunDir

    opened = RunDir.open(run)
    written = write_report(opened, Path(output) if output else opened.file(REPORT))
    screen = open_screen()
    for answer in written.answers:
        screen.line(f"{answer.question}: {answer.word}. {answer.why}")
    screen.line(f"written: {written.path}")


@app.command("watch", cls=Verb, short_help="Serve the page of a run, live.")
def watch_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, finished or not.")],
    port: Annotated[int, typer.Option(help="0 picks a free port.", min=0, max=65535)] = 8421,
) -> None:
    """Serve the page of a run on this machine until Ctrl-C, rebuilt for each request.

    Only browsers on this machine can reach it, at http://127.0.0.1:PORT. Nothing is written, and no
    other file is served.

    \b
    truetune watch runs/first
    """
    from truetune.reporting.live import serving
    from truetune.run_dir import RunDir

    with serving(RunDir.open(run), port) as server:
        open_screen().line(f"{server.address}  (press Ctrl-C to stop)")
        server.run()


@app.command("serve", cls=Verb, short_help="Start a chat server on this machine.")
def serve_model(
    source: _Source,
    port: Annotated[int, typer.Option(help="0 picks a free port.", min=0, max=65535)] = 8420,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="For GGUF files: llama.cpp's own settings, faster but less exact."
        ),
    ] = False,
    device: _Device = "auto",
) -> None:
    """Serve a model to programs on this machine through an OpenAI-compatible API, until Ctrl-C.

    Runs, models and adapters are served by transformers, GGUF files by llama.cpp. Prompts are
    rendered as in training. Only this machine can reach the server, at http://127.0.0.1:PORT/v1; it
    needs no key and answers one request at a time.

    \b
    truetune serve runs/first
    truetune serve first-gguf/model-q8_0.gguf --port 8080
    """
    from truetune.cli.serve_screen import serve

    serve(open_screen(), source, port, fast=fast, device=device)


@app.command("push", cls=Verb, short_help="Push a verified model to the Hub.")
def push_model(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model or adapter folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public. (default: private)")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Push even if no verification has passed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete other files of the repository.")
    ] = False,
) -> None:
    """Push a run's model, or a merged model, to the Hub in one commit, with its model card.

    Only files that were verified and have not changed since are pushed. The token comes from `hf
    auth login` or HF_TOKEN.

    \b
    truetune push runs/first me/first
    truetune push merged me/first-merged --public
    """
    from truetune.run.push import push

    screen = open_screen()
    try:
        pushed = push(
            source,
            repo,
            public=public,
            unverified=unverified,
            overwrite=overwrite,
            listener=screen,
        )
    finally:
        screen.close()
    who = "private" if pushed.private else "public"
    screen.line(f"pushed {len(pushed.files)} files: {pushed.url} ({who})")


@app.command(cls=Verb, short_help="Fine-tune the embedded base in a minute.")
def quickstart(
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder of the run.")
    ] = "runs/quickstart",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed for the order of the rows.")] = 42,
) -> None:
    """Fine-tune the embedded base in a minute, and show what changed.

    A 5-million-parameter model that knows a small invented world but cannot answer questions
    learns to answer and to stop from hand-written examples.
    """
    from truetune.lab.quickstart import quickstart as start

    screen = open_screen()

    def tell(text: str) -> None:
        screen.close()
        screen.line(text, "dim")

    try:
        result, comparison = start(
            output,
            seed=seed,
            overwrite=overwrite,
            listener=screen,
            on_stage=tell,
        )
    finally:
        screen.close()
    from truetune.cli.result_screen import show_comparison, show_result

    show_comparison(screen, comparison)
    run = shlex.quote(str(result.run.path))
    more = [
        ("compare", f"truetune chat {run} --compare base"),
        ("inspect", f"truetune inspect {run}"),
        ("your own", "truetune train MODEL DATA --lora -o runs/mine"),
    ]
    show_result(screen, result, more)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as in `truetune.errors`."""
    if arguments is None:
        # Whatever Python processes a library starts, none takes modules from the working folder.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["train"], ["check"]):
        words = canonical(words)
    try:
        with signals.raised():
            code = app(args=words, prog_name="truetune", standalone_mode=False)
        if code == 128 + signal.SIGINT:
            # What typer makes of Ctrl-C.
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Abort:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except typer.TyperException as error:
        if hasattr(error, "show"):
            error.show()
        else:
            sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except ToldElsewhere as error:
        sys.exit(error.exit_code)
    except TruetuneError as error:
        open_screen().error(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, signals.Stopped) as error:
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signals.number_of(error))
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0][:300]
        # Its frames hold what was computed.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        _tell_no_memory(said)
        sys.exit(1)


def _tell_no_memory(said: str) -> None:
    told = TruetuneError(
        "this machine, or this process, ran out of memory",
        why=said,
        fix="free some memory and repeat the command; continue a run that had begun with "
        "`truetune train --resume RUN`",
        code="out-of-memory",
    )
    try:
        open_screen().error(told)
    except Exception:
        # Not even enough to open the screen.
        sys.stderr.write(f"error[{told.code}]: {told}\n")


if __name__ == "__main__":
    main()
