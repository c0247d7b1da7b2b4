"""The verbs of the command line. Nothing else prints.

Heavy modules are imported inside the verbs, so that help comes at once.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from truetune import __version__
from truetune.errors import TruetuneError
from truetune.recipe import Recipe, make_recipe, read_recipe, settings

if TYPE_CHECKING:
    from truetune.lab.quickstart import Comparison
    from truetune.pipeline import RunResult
    from truetune.screen import Screen

_CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="truetune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
    help="Supervised fine-tuning where what is trained is what is served.",
)
lab = typer.Typer(
    no_args_is_help=True,
    context_settings=_CONTEXT,
    rich_markup_mode="rich",
    help="The micro world and the embedded base model.",
)
app.add_typer(lab, name="lab")


def _screen() -> Screen:
    from truetune.screen import Screen

    return Screen()


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
    """Nothing to do: the verbs do it."""


def train(model: str | None, data: str | None, resume: str | None = None, **options: Any) -> None:
    """Fine-tune MODEL on DATA, or as a YAML recipe says.

    \b
    truetune train Qwen/Qwen2.5-0.5B-Instruct rows.jsonl --lora -o runs/first
    truetune train recipe.yaml --learning-rate 5e-5
    truetune train --resume runs/first
    """
    from truetune.pipeline import train as run

    screen = _screen()
    try:
        recipe = _recipe(model, data, resume, options)
        result = run(recipe, screen, resume=resume)
    finally:
        screen.close()
    _show_result(screen, result)


def _recipe(
    model: str | None, data: str | None, resume: str | None, options: dict[str, Any]
) -> Recipe:
    """Recipe file, then command line; a resumed run's own recipe."""
    from truetune.errors import UsageError
    from truetune.run import RECIPE, RunDir

    given = {name: value for name, value in options.items() if value is not None}
    if resume:
        if model or data or given:
            raise UsageError(
                "--resume takes no other setting",
                why="a resumed run goes on with the settings it was started with",
                fix=f"truetune train --resume {resume}",
                code="resume-with-settings",
            )
        run = RunDir.open(resume)
        return make_recipe((str(run.file(RECIPE)), read_recipe(run.file(RECIPE))))
    line = {**given, **{k: v for k, v in (("model", model), ("data", data)) if v}}
    if model and model.lower().endswith((".yaml", ".yml")):
        line.pop("model")
        if data:
            line.pop("data")
            raise UsageError(
                f"two arguments, and the first is a recipe: {model}",
                fix=f"set data in the recipe: truetune train {model}",
                code="recipe-with-data",
            )
        path = Path(model)
        if not path.is_file():
            raise UsageError(f"there is no recipe {model}", fix="check the path", code="no-recipe")
        return make_recipe((model, read_recipe(path)), ("command line", line))
    return make_recipe(("command line", line))


def _show_result(screen: Screen, result: RunResult) -> None:
    run, artifact = result.run.path, result.artifact
    held = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    screen.line()
    screen.line(f"trained and read back: {artifact}  (loss {result.train_loss:.4f}{held})")
    stops = list(result.contract.stop_ids)
    if result.base is None:
        load = f'AutoModelForCausalLM.from_pretrained("{artifact}")'
        serve = f"vllm serve {artifact}"
    else:
        load = f'AutoPeftModelForCausalLM.from_pretrained("{artifact}")'
        serve = (
            f"vllm serve {result.base} --enable-lora --lora-modules tuned={artifact} "
            f"--chat-template {artifact}/chat_template.jinja"
        )
        if any(f.code == "adapter-stop-unread" for f in result.findings):
            serve += f"\n         (requests need stop_token_ids={stops})"
    screen.pairs([("load", load), ("chat", f"truetune chat {run}"), ("serve", serve)])


def _with_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one option per recipe setting; the recipe is the only list of them."""
    own = [
        inspect.Parameter(
            "model",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[
                str | None, typer.Argument(help="A local folder, a Hub id, or a recipe.yaml.")
            ],
        ),
        inspect.Parameter(
            "data",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[
                str | None, typer.Argument(help="A file, a folder, or a Hub dataset.")
            ],
        ),
    ]
    options = [_parameter(field) for field in settings() if field.name not in ("model", "data")]
    resume = inspect.Parameter(
        "resume",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None,
            typer.Option(help="Continue an unfinished run.", metavar="RUN"),
        ],
    )
    verb.__signature__ = inspect.Signature([*own, *options, resume])  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in [*own, *options, resume]}
    return verb


def _parameter(field: Any) -> inspect.Parameter:
    meta = field.metadata
    kind = Recipe.__annotations__[field.name]
    declared = (
        eval(kind, {**vars(sys.modules[Recipe.__module__])}) if isinstance(kind, str) else kind
    )
    default = meta["shown"] or _written(field.default)
    text = f"{meta['help']} (default: {default})" if default else meta["help"]
    flags = ["--" + field.name.replace("_", "-")]
    if field.name == "output":
        flags.insert(0, "-o")
    python_type, extra = _parsed_as(declared)
    if python_type is bool and not field.name.startswith("no_"):
        flags[-1] += "/--no-" + flags[-1].removeprefix("--")
    option = typer.Option(
        *flags, help=text, rich_help_panel=meta["group"], show_default=False, **extra
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[python_type | None, option],
    )


def _parsed_as(declared: Any) -> tuple[Any, dict[str, Any]]:
    """The type an option is parsed as; lists and mappings stay texts until the recipe."""
    variants = [a for a in (get_args(declared) or (declared,)) if a is not type(None)]
    if get_origin(declared) is Literal:
        return declared, {}
    if variants[0] in (int, float, bool):
        if variants[0] is not bool and type(None) in get_args(declared):
            # "auto" is a value of every derived number.
            return str, {"metavar": "INT" if variants[0] is int else "FLOAT"}
        return variants[0], {}
    return str, {"metavar": "TEXT"}


def _written(value: Any) -> str:
    if value is None or value is False or value == "":
        return ""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


app.command("train")(_with_settings(train))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run, a model folder, or a Hub id.")],
    prompt: Annotated[str | None, typer.Option(help="One question; the answer, and out.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Ask another run or model too; `base` is what the run started from."),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file or built-in name. (default: the model's own)")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Smallest set of tokens with this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the likeliest k tokens; 0 all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repeats.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")] = "auto",
) -> None:
    """Talk to a run or a model, through the prompt it was trained on.

    \b
    truetune chat runs/first
    truetune chat runs/first --prompt "What is a river?" --compare base
    """
    from truetune.chat_screen import Talk
    from truetune.generate import Sampling

    screen = _screen()
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


@app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="A run, a model folder, or a Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file or built-in name. (default: the model's own)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same facts for programs.")] = False,
) -> None:
    """Show what a model brings: template, stop set, vocabulary, head, LoRA targets."""
    from truetune.model_screen import model_facts, show_model

    facts = model_facts(model, revision=revision, chat_template=chat_template)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=True))
    else:
        show_model(_screen(), facts)


@app.command()
def quickstart(
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder of the run.")
    ] = "runs/quickstart",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")] = False,
    seed: Annotated[int, typer.Option(help="Of row order.")] = 42,
) -> None:
    """Fine-tune the embedded base in a minute, and see what changed.

    A 5-million-parameter model that knows a small invented world, but answers no question, learns
    to answer and to stop from hand-written examples.
    """
    from truetune.lab.quickstart import quickstart as start

    screen = _screen()

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
    _show_comparison(screen, comparison)
    _show_result(screen, result)
    run = result.run.path
    screen.pairs(
        [
            ("compare", f"truetune chat {run} --compare base"),
            ("next", "truetune train MODEL DATA --lora -o runs/mine"),
        ]
    )


def _show_comparison(screen: Screen, found: Comparison) -> None:
    from truetune.screen import side_by_side

    screen.line()
    shown = [
        [question.text, base.text, tuned.text]
        for question, base, tuned in zip(
            found.questions[:6], found.base.replies, found.tuned.replies, strict=False
        )
    ]
    side_by_side(screen, ["question about a place never asked about", "base", "tuned"], shown)
    total = len(found.questions)
    screen.line()
    side_by_side(
        screen,
        [f"of {total} questions", "base", "tuned"],
        [
            [
                "answers that end on the stop token",
                f"{100 * found.base.finished / total:.0f} %",
                f"{100 * found.tuned.finished / total:.0f} %",
            ],
            [
                "exact facts",
                f"{100 * found.base.correct / total:.0f} %",
                f"{100 * found.tuned.correct / total:.0f} %",
            ],
            [
                "loss on prose (nats per token)",
                f"{found.base.prose_loss:.3f}",
                f"{found.tuned.prose_loss:.3f}",
            ],
        ],
    )


@lab.command()
def pretrain(
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the model.")],
    seed: Annotated[int, typer.Option(help="Of world, corpus and weights.")] = 7,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the corpus. (default: as the shipped base)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compile: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile; needs a C++ compiler.")
    ] = False,
) -> None:
    """Build corpus, tokenizer and weights of the embedded base from a seed (about an hour)."""
    from truetune.lab.pretrain import pretrain as build

    screen = _screen()

    def show(line: dict[str, float]) -> None:
        screen.line(
            f"step {line['step']:>5}  {line['tokens'] / 1e6:5.2f} M tokens  "
            f"loss {line['loss']:.4f}  {line['elapsed']:,.0f} s"
        )

    overrides: dict[str, Any] = {"seed": seed, "device": device, "compile": compile}
    if tokens is not None:
        overrides["tokens"] = tokens
    folder = build(output, save_every=400, on_progress=show, **overrides)
    screen.line(f"written and measured: {folder} (its README.md has the numbers)")


def _canonical(arguments: Sequence[str]) -> list[str]:
    """Hugging Face spellings of settings as ours: `--lr`, `--num_train_epochs`."""
    ours = {alias: f.name for f in settings() for alias in f.metadata["aliases"]}
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            flag = "--" + ours.get(name, name).replace("_", "-")
            word = flag + equals + value
        words.append(word)
    return words


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as in `truetune.errors`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        words = _canonical(words)
    try:
        code = app(args=words, standalone_mode=False)
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
    except TruetuneError as error:
        _screen().error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
