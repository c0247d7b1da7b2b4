"""Build a recipe from YAML, command-line options, or the record of a run.

input   mappings of settings, each with the place it came from; the later wins
does    accepts Hugging Face spellings, checks names, types and contradictions, all at once
output  `Recipe`, or one error that lists all that is wrong
"""

from __future__ import annotations

import datetime
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from truetune.errors import InputError, RecipeError
from truetune.findings import near
from truetune.recipe.foreign import translated
from truetune.recipe.settings import Origin, Recipe, setting_types, settings


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; of a run's recipe.yaml, what was set and not what was derived.

    Raises:
        InputError: it cannot be read or is not a mapping.
    """
    return {name: value for name, value, _ in _set_values(path)}


def recorded_recipe(path: Path, *more: tuple[Origin, Mapping[str, Any]]) -> Recipe:
    """The recipe of a run, every value with the origin it had when the run was started.

    Args:
        more: what a resumed run is given in place of that.

    Raises:
        InputError, RecipeError: it was damaged or edited.
    """
    return make_recipe(
        *((origin or str(path), {name: value}) for name, value, origin in _set_values(path)),
        *more,
    )


def _set_values(path: Path) -> Iterator[tuple[str, Any, Origin]]:
    """(name, value, origin) of what was set; the origin is "" if the file has none."""
    for name, value in read_yaml(path).items():
        if isinstance(value, dict) and set(value) == {"value", "origin"}:
            if not str(value["origin"]).startswith("default"):
                yield str(name), value["value"], str(value["origin"])
        else:
            yield str(name), value, ""


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping of a YAML file, as it stands there.

    Raises:
        InputError: it cannot be read or is not a mapping.
    """
    import yaml

    example = "write one setting per line, for example `learning_rate: 1e-4`"
    try:
        loaded = _loaded(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"cannot read the recipe: {reason}", where=str(path), fix="pass a YAML file"
        ) from error
    except RecursionError as error:
        raise InputError("the recipe is nested too deeply", where=str(path), fix=example) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"the recipe is not valid YAML: {getattr(error, 'problem', error)}",
            where=f"{path}{line}",
            fix=f"correct that line; {example}",
        ) from error
    if not isinstance(loaded, dict):
        raise InputError("the recipe is not a list of settings", where=str(path), fix=example)
    if found := translated(loaded):
        raise RecipeError(
            f"the recipe was written for {found.tool}",
            where=str(path),
            why=f"key by key:\n{found.table()}",
            fix="save these lines as a recipe, review them, and train with it:\n" + found.recipe(),
            code="foreign-recipe",
        )
    return loaded


def _loaded(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is none, names a key twice, or grows without end by its own references.
    """
    import yaml
    from yaml.constructor import ConstructorError

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        sizes: dict[int, int] = {}

        def size(node: Any) -> int:
            """How many values a node stands for, with what its references repeat."""
            if id(node) not in sizes:
                sizes[id(node)] = 1  # a reference to itself ends here; the constructor refuses it
                inside = node.value if isinstance(node.value, list) else []
                flat = (part for one in inside for part in (one if type(one) is tuple else (one,)))
                sizes[id(node)] += sum(map(size, flat))
                if isinstance(node, yaml.MappingNode):
                    _require_keys_once(node)
            return sizes[id(node)]

        if root is not None and size(root) > _MOST_VALUES:
            raise ConstructorError(None, None, "it holds too many values", root.start_mark)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _require_keys_once(node: Any) -> None:
    from yaml.constructor import ConstructorError

    seen = set()
    for key, _ in node.value:
        if not isinstance(key.value, str):
            continue  # the constructor refuses it
        if key.value in seen:
            raise ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
        seen.add(key.value)


def make_recipe(*sources: tuple[Origin, Mapping[str, Any]]) -> Recipe:
    """A recipe from (origin, settings) pairs; later ones win.

    Raises:
        RecipeError: unknown names, wrong types, contradictions; all of them in one error.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    names = _spellings()
    for origin, given in sources:
        known = _named(origin, given, names, problems)
        for name in known:
            for other in _INSTEAD.get(name, ()):
                if other not in known:
                    values.pop(other, None)
        values |= known
        origins |= dict.fromkeys(known, origin)
    # "auto" leaves a value to be derived, as if nobody had set it.
    values = {name: value for name, value in values.items() if value != "auto" or name in _AUTO}
    origins = {name: origins[name] for name in values}
    _imply(values, origins)
    problems += _contradictions(values)
    recipe = _validated(values, origins, problems)
    if problems:
        raise RecipeError(
            problems[0] if len(problems) == 1 else f"{len(problems)} settings are wrong",
            where=", ".join(dict.fromkeys(origin for origin, given in sources if given)),
            why="" if len(problems) == 1 else "\n".join(problems),
            fix="`truetune train --help` lists every setting",
        )
    return recipe


# Settings for which "auto" is a value of its own.
# Values of a recipe, with what its references repeat; real ones have some dozens.
_MOST_VALUES = 10_000
_AUTO = ("device", "dtype", "schema", "reasoning")
# A source that sets one of these replaces what an earlier source said by the other.
_INSTEAD = {
    "epochs": ("max_steps",),
    "max_steps": ("epochs",),
    "batch_size": ("tokens_per_step",),
    "tokens_per_step": ("batch_size", "gradient_accumulation_steps"),
    "warmup_ratio": ("warmup_steps",),
    "warmup_steps": ("warmup_ratio",),
}
# Kinds of LoRA: setting one sets lora.
_KINDS_OF_LORA = ("rslora", "dora", "qlora", "load_in_8bit")
# Lists whose items may be separated by commas.
_LISTS = ("stop", "target_modules", "report_to", "think_markers")


def _named(
    origin: Origin, given: Mapping[str, Any], names: Mapping[str, str], problems: list[str]
) -> dict[str, Any]:
    """One source's settings under our names; adds what is wrong with them to `problems`."""
    known: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in given.items():
        name = names.get(spelling.lstrip("-").replace("-", "_"))
        if name is None:
            problems.append(_unknown(spelling, origin, names))
        elif value is not None:
            if name in known:
                problems.append(f"{spelled[name]} and {spelling} in {origin} are the same setting")
            spelled[name] = spelling
            known[name] = _plain(name, value)
    return known


def _spellings() -> dict[str, str]:
    names = {field.name: field.name for field in settings()}
    names |= {alias: f.name for f in settings() for alias in f.metadata["aliases"]}
    return names


def _unknown(spelling: str, origin: str, names: Mapping[str, str]) -> str:
    close = near(spelling, names)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"unknown setting {spelling!r} in {origin}{hint}"


# transformers' names of optimizers that ours are.
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_bnb_8bit": "adamw_8bit"}


def _plain(name: str, value: Any) -> Any:
    """Texts of the command line as the lists and mappings that they stand for."""
    # An option of the command line that was given several times.
    if isinstance(value, tuple):
        value = ",".join(value) if name in (*_LISTS, "columns") else list(value)
    if name == "template_arg" and isinstance(value, str | list):
        return _arguments([value] if isinstance(value, str) else value)
    if name == "columns" and isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        if not pairs or not all(equals for _, equals, _ in pairs):
            return value
        return {key.strip(): column.strip() for key, _, column in pairs}
    if name == "add_token" and isinstance(value, str):
        return [value]
    if name in _LISTS and isinstance(value, str):
        if value in ("auto", "all-linear", "none"):
            return "auto"
        return [item.strip() for item in value.split(",") if item.strip()]
    if name == "date" and isinstance(value, datetime.date):
        return value.isoformat()  # YAML reads a date as one
    if name == "optim" and isinstance(value, str):
        return _OPTIMIZERS.get(value, value)
    return value


def _kinds_of_lora(values: Mapping[str, Any]) -> list[str]:
    return [name for name in _KINDS_OF_LORA if str(values.get(name)).lower() == "true"]


def _imply(values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Fill in what another setting says."""
    kinds = _kinds_of_lora(values)
    if kinds and "lora" not in values:
        values["lora"], origins["lora"] = True, f"by {kinds[0]} ({origins[kinds[0]]})"


def _arguments(texts: Sequence[str]) -> Any:
    """name=value pairs; a value that is JSON is what it says, others are text."""
    found = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not equals or not name.strip():
            return text  # no mapping: `_validated` says what one looks like
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Settings that cannot hold together. `_validated` judges each on its own."""
    problems = []
    batch, micro, accumulation = (
        _whole(values.get(name))
        for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    )
    if batch and micro and accumulation and batch != micro * accumulation:
        problems.append(
            f"batch_size {batch} is not micro_batch_size {micro} x gradient_accumulation_steps "
            f"{accumulation} = {micro * accumulation}: omit one of them"
        )
    elif batch and micro and micro > batch:
        problems.append(f"micro_batch_size {micro} is more than batch_size {batch}")
    elif batch and accumulation and not micro and batch % accumulation:
        problems.append(
            f"batch_size {batch} cannot be divided into {accumulation} equal forward passes "
            "(gradient_accumulation_steps)"
        )
    tokens, at_once = (_whole(values.get(n)) for n in ("tokens_per_step", "micro_batch_tokens"))
    for other in ("batch_size", "gradient_accumulation_steps"):
        if tokens and other in values:
            problems.append(
                f"tokens_per_step and {other} both set the size of a step: omit one of them"
            )
    if tokens and at_once and at_once > tokens:
        problems.append(f"micro_batch_tokens {at_once} is more than tokens_per_step {tokens}")
    for one, other in (("epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
        if one in values and other in values:
            problems.append(f"{one} and {other} contradict each other: omit one of them")
    problems += _beyond_any_rate(values)
    kinds = _kinds_of_lora(values)
    if kinds and str(values.get("lora")).lower() == "false":
        problems.append(f"{kinds[0]} is a kind of LoRA, but lora is false: omit one of them")
    if {"qlora", "load_in_8bit"} <= set(kinds):
        problems.append("qlora uses 4 bits and load_in_8bit uses 8: omit one of them")
    if values.get("optim") == "adamw_bf16":
        if kinds or str(values.get("lora")).lower() == "true":
            problems.append(
                "adamw_bf16 trains all weights, but LoRA weights are float32: omit one of them"
            )
        if values.get("dtype") == "float32":
            problems.append(
                "adamw_bf16 computes in bfloat16, but dtype is float32: omit one of them"
            )
    markers = values.get("think_markers")
    if markers is not None and (not isinstance(markers, list) or len(markers) != 2):
        problems.append(
            "think_markers needs two markers, opening and closing, e.g. <think>,</think>"
        )
    if (date := values.get("date")) is not None and not _is_date(date):
        problems.append(f"date must be YYYY-MM-DD, not {date!r}")
    return problems


# Nobody has trained anything with more: Adam moves every weight by about its learning rate in each
# step, and weights are of the order of 0.02.
_MOST_RATE, _MOST_RATE_SGD = 0.1, 10.0


def _beyond_any_rate(values: Mapping[str, Any]) -> list[str]:
    """A learning rate that is surely a slip, unless somebody says that it is not."""
    try:
        rate = float(values.get("learning_rate") or 0)
    except (TypeError, ValueError):
        return []
    most = _MOST_RATE_SGD if values.get("optim") == "sgd" else _MOST_RATE
    if not rate > most or str(values.get("any_learning_rate")).lower() == "true":
        return []
    return [
        f"learning_rate {rate:g} is above {most:g}, higher than any rate that trains a language "
        "model (usually 1e-5 to 1e-3); if it is intended, add --any-learning-rate"
    ]


def _is_date(value: Any) -> bool:
    try:
        datetime.date.fromisoformat(str(value))
    except ValueError:
        return False
    return True


def _whole(value: Any) -> int | None:
    """A count as the command line or YAML gives it; None if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _validated(
    values: Mapping[str, Any], origins: Mapping[str, Origin], problems: list[str]
) -> Recipe:
    """The recipe, types and ranges checked; adds what is wrong to `problems`."""
    import pydantic

    right: dict[str, Any] = {}
    for name, declared in setting_types().items():
        if name not in values:
            continue
        value = values[name]
        try:
            # pydantic would take `yes` of YAML for the number 1.
            if isinstance(value, bool) and declared is not bool:
                raise ValueError
            right[name] = pydantic.TypeAdapter(declared).validate_python(value)
        except ValueError:
            problems.append(f"{name} must be {_described(declared)}, not {value!r}")
    for field in settings():
        problems += _out_of_range(field.name, right.get(field.name), field.metadata)
    return Recipe(**right, origins=dict(origins)) if not problems else Recipe()


def _described(declared: Any) -> str:
    """A type in words."""
    kinds = [kind for kind in typing.get_args(declared) or (declared,) if kind is not type(None)]
    if typing.get_origin(declared) is Literal:
        return f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of strings",
        dict[str, str]: "pairs such as prompt=question",
        dict[str, Any]: "pairs such as enable_thinking=false",
    }
    return words[kinds[0]]


def _out_of_range(name: str, value: Any, meta: Mapping[str, Any]) -> list[str]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return []
    if not math.isfinite(value):
        return [f"{name} must be a finite number, not {value}"]
    limits = (
        (meta["minimum"], "at least", lambda least: value >= least),
        (meta["maximum"], "at most", lambda most: value <= most),
        (meta["above"], "above", lambda limit: value > limit),
        (meta["below"], "below", lambda limit: value < limit),
    )
    return [
        f"{name} must be {words} {limit:,}, not {value:,}"
        for limit, words, holds in limits
        if limit is not None and not holds(limit)
    ]
