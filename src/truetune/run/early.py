"""Refuse what can be refused in the first second of a run, before torch is imported."""

from __future__ import annotations

from truetune.data.conversation import text_of
from truetune.data.sources import resolve
from truetune.errors import DataError, RecipeError, UsageError
from truetune.model.inspect import require_weights
from truetune.model.placement import require_device
from truetune.model.quantise import require_bitsandbytes
from truetune.model.source import locate, locate_here
from truetune.recipe.settings import Recipe, setting_names
from truetune.run.trackers import require_trackers


def ask_early(recipe: Recipe, *, with_weights: bool = False) -> None:
    """Refuse settings that are invalid whatever the model and the rows are.

    Args:
        with_weights: also a model folder without weights, as training would.

    Raises:
        UsageError, InputError: the first thing that is not there.
    """
    require_settings(recipe)
    ask_first(recipe)
    assert recipe.model
    locate(recipe.model, recipe.revision, weights=False)
    if with_weights:
        require_weights(recipe.model, recipe.revision)


def ask_first(recipe: Recipe) -> None:
    """Refuse what this machine's own files and libraries show; imports nothing large.

    Raises:
        UsageError, InputError: the first thing that is not there.
    """
    for needed, what in (
        (recipe.qlora, "--qlora"),
        (recipe.load_in_8bit, "--load-in-8bit"),
        (recipe.optim in ("adamw_8bit", "paged_adamw_8bit"), f"--optim {recipe.optim}"),
    ):
        if needed:
            require_bitsandbytes(what)
    require_trackers(recipe.report_to or [])
    require_device(recipe.device)
    if recipe.chat_template not in (None, "auto"):
        from truetune.contract.source import require_template

        require_template(recipe.chat_template)
    if recipe.data:
        resolve(recipe.data, recipe.split)
    if recipe.eval_data:
        resolve(recipe.eval_data, recipe.eval_split)
    if recipe.keep_text:
        _require_text(recipe.keep_text)
    # Of the Hub, the model is asked for when all of this is there.
    if recipe.model:
        locate_here(recipe.model)


def _require_text(source: str) -> None:
    """Refuse a file of --keep-text that holds no text; one of the Hub is read when its turn comes.

    Raises:
        InputError: it is not there, cannot be read, or is empty.
    """
    if not resolve(source, None).files:
        return
    from truetune.data.load import load

    if not any(map(text_of, load(source).conversations)):
        raise DataError(
            "--keep-text contains no text",
            where=source,
            why="without text, forgetting cannot be measured",
            fix="pass a text file, or rows in any supported format, or omit --keep-text",
            code="keep-text-unreadable",
        )


# What is asked of a finished model, which has no rows.
_OF_A_MODEL = ("model", "revision", "chat_template")


def ask_first_of_check(recipe: Recipe, smoke_test: bool) -> None:
    """What `check` can refuse at once: without data nothing is trained, and whatever says how
    would be ignored.

    Raises:
        UsageError, InputError: the first thing that is not there, or has no use.
    """
    if not recipe.model:
        raise RecipeError(
            "no model was given", fix="run truetune check MODEL, or truetune check MODEL DATA"
        )
    if not recipe.data:
        idle = [n for n in setting_names() if recipe.given(n) and n not in _OF_A_MODEL]
        options = [f"--{name.replace('_', '-')}" for name in idle]
        options += ["--smoke-test"] if smoke_test else []
        if options:
            raise UsageError(
                f"no data was given, so {', '.join(options)} would be ignored",
                why="without data, `check` examines a finished model and does not plan a run",
                fix="pass the data: truetune check MODEL DATA, or omit the options",
                code="check-without-data",
            )
    ask_first(recipe)


def require_settings(recipe: Recipe, *others: str) -> None:
    """Raise if something that has no default was not given.

    Raises:
        RecipeError: naming all that is missing.
    """
    missing = [name for name in ("model", "data", *others) if not getattr(recipe, name)]
    if missing:
        raise RecipeError(
            f"missing: {', '.join(missing)}",
            fix="run truetune train MODEL DATA -o RUN, or set it in a recipe",
        )
