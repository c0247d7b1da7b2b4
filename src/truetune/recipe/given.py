"""Build a recipe from the arguments of a verb, given on the command line or in Python."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.errors import UsageError
from truetune.recipe.settings import Recipe
from truetune.recipe.sources import make_recipe, read_recipe, recorded_recipe

Pathlike = str | os.PathLike[str]
# What may be decided anew when a run is resumed: it changes no number of the steps to come.
_WHEN_RESUMED = {"on_collapse"}


def recipe_of(
    source: Pathlike | None,
    rows: Pathlike | None,
    resume: Pathlike | None,
    options: Mapping[str, Any],
    origin: str,
) -> Recipe:
    """A recipe file, then what was given beside it; a resumed run's own recipe.

    Args:
        source: a model, or a recipe.yaml.
        rows: the data.
        resume: a run to continue.
        options: settings by name; None and an empty list were not given.
        origin: what the run will say of where they came from.

    Raises:
        UsageError, InputError: what is given contradicts itself, or is not there.
    """
    # An option that may be repeated comes as a list; a recipe tells it by being a tuple.
    given = {
        name: tuple(value) if isinstance(value, list) and origin == "command line" else value
        for name, value in options.items()
        if value is not None and value != []
    }
    given = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in given.items()}
    first, second = (None if v is None else path_of(v) for v in (source, rows))
    if resume is not None:
        has_more = bool(first or second or given.keys() - _WHEN_RESUMED)
        return _resumed_recipe(str(resume), has_more, (origin, given))
    file = first if first and first.lower().endswith((".yaml", ".yml")) else None
    if file and second:
        raise UsageError(
            f"there are two arguments, but the first is a recipe: {file}",
            fix=f"run truetune train {shlex.quote(file)} --data {shlex.quote(second)}",
            code="recipe-with-data",
        )
    for name, value in (("model", None if file else first), ("data", second)):
        if value and name in given:
            raise UsageError(
                f"the {name} is given twice: {value} and --{name} {given[name]}",
                fix="omit one of them",
                code="given-twice",
            )
        given |= {name: value} if value else {}
    if file is None:
        return make_recipe((origin, given))
    if not Path(file).is_file():
        raise UsageError(
            f"there is no recipe {file}", where=file, fix="check the path", code="no-recipe"
        )
    return make_recipe((file, read_recipe(Path(file))), (origin, given))


def path_of(value: Any, name: str = "the model and the data") -> str:
    if not isinstance(value, str | os.PathLike):
        raise UsageError(
            f"{name} must be a path or a name, not a {type(value).__name__}",
            fix="save rows as a .jsonl file and a model as a folder, and pass their paths",
            code="not-a-path",
        )
    return os.fspath(value)


def _resumed_recipe(
    resume: str, has_settings: bool, given: tuple[str, Mapping[str, Any]]
) -> Recipe:
    from truetune.run_dir import RECIPE, RunDir

    if has_settings:
        raise UsageError(
            "--resume can be combined only with --on-collapse",
            why="a resumed run continues with its original settings",
            fix=f"run truetune train --resume {shlex.quote(resume)}",
            code="resume-with-settings",
        )
    return recorded_recipe(RunDir.open(resume).file(RECIPE), given)
