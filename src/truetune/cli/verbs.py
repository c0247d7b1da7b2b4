"""The verbs of the command line. Nothing else prints.

Heavy modules are imported inside the verbs, so that help is quick.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from truetune import __version__
from truetune.cli import eval_verb, lab_verbs, serving_verbs
from truetune.cli.arguments import Base, Device, Json
from truetune.cli.options import canonical, own_option, with_settings
from truetune.cli.verb import CONTEXT, Verb, open_screen
from truetune.errors import (
    CheckFailed,
    ToldElsewhere,
    TruetuneError,
    UsageError,
    is_out_of_memory,
    of_the_system,
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
    """Parse the options that come before a verb."""


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

    with closing(open_screen()) as screen:
        result = run(recipe, screen, resume=resume)
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
    with closing(screen):
        found = checked(recipe, listener, smoke_test=smoke_test)
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
            help="Also load the model, take two real steps, and test saving and reloading.",
        ),
        own_option("show_all", bool, False, "--all", help="Show every finding."),
        own_option("as_json", bool, False, "--json", help="Print JSON."),
        own_option("html", str | None, None, "--html", help="Write an HTML page.", metavar="FILE"),
    )
)


@app.command(cls=Verb, short_help="Chat with a run or a model.")
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a model folder, or a Hub id.")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Send one prompt, print the reply and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Compare with the replies of another run or model; `base` is the model that the "
            "run started from."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file or built-in name. (default: the model's own)")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of a reply, in tokens.")
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
    device: Device = "auto",
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
    """Show rows on the terminal, or write them as a page."""
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
    "inspect", cls=Verb, short_help="Show a model's properties, or rows as used in training."
)
def inspect_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a model folder, or a Hub id.")
    ],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file or built-in name. (default: the model's own)")
    ] = None,
    as_json: Json = False,
    data: Annotated[
        str | None, typer.Option(help="Show these rows as used in training.", rich_help_panel=_ROWS)
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Column names, e.g. prompt=question,completion=answer.", rich_help_panel=_ROWS
        ),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(help="Schema of the rows. (default: auto)", rich_help_panel=_ROWS),
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(
            metavar="N|LOCATION",
            help="Number of the row, or its location as shown in findings. (default: 1)",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    ids: Annotated[
        bool, typer.Option("--ids", help="Show token ids next to the text.", rich_help_panel=_ROWS)
    ] = False,
    page: Annotated[
        str | None,
        typer.Option(
            "--html",
            help="Write an HTML page with the first 50 rows, or with only the row given by --row.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting of `train` that affects the rows, e.g. loss_on=last; may be "
            "repeated.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
) -> None:
    """Show a model's template, stop tokens, vocabulary, head and LoRA targets.

    With --data, show rows as used in training: served prompt, supervised tokens, stop tokens.

    \b
    truetune inspect MODEL
    truetune inspect MODEL --data rows.jsonl --row 17
    truetune inspect MODEL --data rows.jsonl --html rows.html
    """
    if data is not None:
        own = {"model": model, "revision": revision, "chat_template": chat_template, "data": data}
        own |= {"columns": columns, "schema": schema}
        _inspect_rows(own, setting or [], row, page, with_ids=ids)
        return
    if row is not None or page or ids or setting or columns or schema:
        raise UsageError(
            "--columns, --schema, --row, --ids, --html and --set need --data",
            fix=f"truetune inspect {shlex.quote(model)} --data DATA",
            code="rows-without-data",
        )
    from truetune.cli.model_screen import model_facts, show_model

    facts = model_facts(model, revision=revision, chat_template=chat_template)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=True))
    else:
        show_model(open_screen(), facts)


app.command("eval", cls=Verb, short_help="Compare models on rows, side by side.")(
    eval_verb.evaluate_models
)


app.command(
    "export", cls=Verb, short_help="Write a model for servers: merged, GGUF, MLX and others."
)(serving_verbs.export_run)


app.command(
    "diagnose",
    cls=Verb,
    short_help="Find the first stage that changes a model on its way to a server.",
)(serving_verbs.diagnose_model)


@app.command("verify", cls=Verb, short_help="Check that what was saved is what was trained.")
def verify_run(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model or adapter folder.")
    ],
    base: Base = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Load what was saved in a fresh process, and compare it with what was trained.

    For a run, compare the hashes of its files, its base, template and stop tokens, the ids of its
    rows, and the probabilities that the trained model gave before it was saved. For any other
    folder, check that it loads and gives finite probabilities.

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


@app.command("report", cls=Verb, short_help="Write the report of a run.")
def report_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, finished or not.")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="File to write. (default: RUN/report.html)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the report of a run: whether it was trained as served, whether it was saved as trained,
    and whether it behaves well; replies of the base and the tuned model; curves, rows, recipe and
    findings. The report is one HTML file without scripts and needs no network.

    `train` writes the report when it ends. It can also be written for a run that is still active or
    was stopped.

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


@app.command("watch", cls=Verb, short_help="Show the report of a run live in a browser.")
def watch_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, finished or not.")],
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = 8421,
) -> None:
    """Serve the report of a run until Ctrl-C. The page is rebuilt for each request.

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


app.command("serve", cls=Verb, short_help="Start a chat server on this machine.")(
    serving_verbs.serve_model
)


app.command("push", cls=Verb, short_help="Push a verified model to the Hub.")(
    serving_verbs.push_model
)


@app.command(cls=Verb, short_help="Fine-tune the embedded base in a minute.")
def quickstart(
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder of the run.")
    ] = "runs/quickstart",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed for the order of the rows.")] = 42,
) -> None:
    """Fine-tune the embedded base in a minute, and show what changed.

    A 5-million-parameter model knows a small invented world but cannot answer questions. From
    hand-written examples, it learns to answer and to stop.
    """
    from truetune.lab.quickstart import quickstart as start

    screen = open_screen()

    def tell(text: str) -> None:
        screen.close()
        screen.line(text, "dim")

    with closing(screen):
        result, comparison = start(
            output,
            seed=seed,
            overwrite=overwrite,
            listener=screen,
            on_stage=tell,
        )
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
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A terminal or pipe of ASCII gets escapes for what it cannot show.
                stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["train"], ["check"]):
        words = canonical(words)
    try:
        with signals.raised():
            code = app(args=words, prog_name="truetune", standalone_mode=False)
            sys.stdout.flush()
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
    # A library in Rust panics with an exception that is no Exception.
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            sys.stderr.write(f"error[disk-full]: {error.strerror}\n")
            with contextlib.suppress(OSError):
                # What is left in the buffer cannot be written at exit either.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        refused = of_the_system(error)
        if refused is not None:
            open_screen().error(refused)
            sys.exit(refused.exit_code)
        if not is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0][:300]
        # Its frames hold what was computed.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        _tell_no_memory(said)
        sys.exit(1)


def _tell_no_memory(said: str) -> None:
    out_of_memory = TruetuneError(
        "this machine, or this process, ran out of memory",
        why=said,
        fix="free some memory and repeat the command; continue an interrupted run with `truetune "
        "train --resume RUN`",
        code="out-of-memory",
    )
    try:
        open_screen().error(out_of_memory)
    except Exception:
        # Not even enough to open the screen.
        sys.stderr.write(f"error[{out_of_memory.code}]: {out_of_memory}\n")


if __name__ == "__main__":
    main()
