"""Create one command-line option per setting of the recipe, which is the only list of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from truetune.recipe.settings import setting_types, settings

# The options that most runs set, shown first and in this order.
MOST_USED = "Most used"
_MOST_USED = (
    "output",
    "lora",
    "qlora",
    "learning_rate",
    "epochs",
    "batch_size",
    "max_length",
    "eval_data",
    "bad_rows",
    "overwrite",
)


def with_settings(verb: Callable[..., None], *extra: inspect.Parameter) -> Callable[..., None]:
    """Add one option per recipe setting to a verb.

    Args:
        verb: takes `source` and `rows`, and the rest by name.
        extra: options of the verb's own.
    """
    arguments = (
        ("source", "MODEL", "A local folder, a Hub id, `embedded`, or a recipe.yaml."),
        ("rows", "DATA", "A file, a folder, or a Hub dataset."),
    )
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[str | None, typer.Argument(metavar=metavar, help=text)],
        )
        for name, metavar, text in arguments
    ]
    types = setting_types()
    first = {name: place for place, name in enumerate(_MOST_USED)}
    ordered = sorted(settings(), key=lambda field: first.get(field.name, len(first)))
    parameters = [*own, *(_parameter(field, types[field.name]) for field in ordered), *extra]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


def own_option(name: str, kind: Any, default: Any, *flags: str, **option: Any) -> inspect.Parameter:
    """Create an option that is not a setting of a recipe; other arguments are those of typer."""
    annotation = Annotated[kind, typer.Option(*flags, rich_help_panel="Run", **option)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _parameter(field: Any, declared: Any) -> inspect.Parameter:
    """A setting as an option: a switch, or a text that the recipe judges."""
    meta = field.metadata
    flags = ["--" + field.name.replace("_", "-")]
    if field.name == "output":
        flags.insert(0, "-o")
    if declared is bool and not field.name.startswith("no_"):
        flags[-1] += "/--no-" + flags[-1].removeprefix("--")
    option = typer.Option(
        *flags,
        help=_help(field, declared),
        rich_help_panel=MOST_USED if field.name in _MOST_USED else meta["group"],
        show_default=False,
        metavar=None if declared is bool else _metavar(declared),
    )
    several = any(get_origin(kind) in (list, dict) for kind in get_args(declared))
    python_type: Any = bool if declared is bool else list[str] if several else str
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[python_type | None, option],
    )


def _help(field: Any, declared: Any) -> str:
    """Text of a setting's help, with its choices and its default."""
    choices = get_args(declared) if get_origin(declared) is Literal else ()
    default = field.metadata["shown"] or _written(field.default)
    details = [" | ".join(choices)] if choices else []
    details += [f"default: {default}"] if default else []
    return field.metadata["help"] + (f" ({'; '.join(details)})" if details else "")


def _metavar(declared: Any) -> str:
    if get_origin(declared) is Literal:
        return "NAME"
    kinds = [kind for kind in get_args(declared) or (declared,) if kind is not type(None)]
    return {int: "INT", float: "FLOAT"}.get(kinds[0], "TEXT")


def _written(value: Any) -> str:
    if value is None or value is False or value == "":
        return ""
    if value is True:
        return "yes"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def canonical(arguments: Sequence[str]) -> list[str]:
    """Translate Hugging Face spellings of settings into ours: `--lr`, `--num_train_epochs`."""
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
