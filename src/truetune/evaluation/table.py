"""An evaluation of several models, which prints as a table of 80 columns."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Protocol, TypeVar

from truetune.evaluation.interval import Interval
from truetune.evaluation.questions import LeftOut
from truetune.evaluation.result import Difference, Measure, ModelResult, Value
from truetune.findings import counted

_WIDTH = 80
_LABEL, _VALUE, _DIFFERENCE = 17, 21, 31


@dataclass(frozen=True)
class Evaluation:
    """Models on the same rows.

    Attributes:
        data: where the rows came from.
        num_rows: number of rows on which all models were evaluated.
        left_out: rows that were left out for all models, by reason.
        settings: how replies were generated and compared.
        models: the results, in the order given; the others are compared with the first.
    """

    data: str
    num_rows: int
    left_out: tuple[LeftOut, ...]
    settings: dict[str, Any]
    models: tuple[ModelResult, ...]
    measures: tuple[Measure, ...] = field(repr=False)

    def __getitem__(self, model: str) -> ModelResult:
        """A model's results, by its name."""
        return of_model(self.models, model)

    def __repr__(self) -> str:
        return "\n".join(lines(self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the rows as plain values."""
        return {
            "data": self.data,
            "rows": self.num_rows,
            "left_out": [asdict(out) for out in self.left_out],
            "settings": self.settings,
            "models": [
                {
                    "name": model.name,
                    "measures": {name: asdict(value) for name, value in model.values.items()},
                    "against_first": {n: asdict(d) for n, d in model.against_first.items()},
                    "without_loss": [asdict(out) for out in model.no_loss],
                    "notes": list(model.notes),
                    "findings": [finding.as_dict() for finding in model.findings],
                }
                for model in self.models
            ],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one dict per row and model, in the order of the rows."""
        for row in range(self.num_rows):
            for model in self.models:
                yield model.rows[row].as_dict(model.name)

    def worst(self, number: int) -> list[int]:
        """Rows on which the last model does worst: the least right, then the highest loss."""
        rows = self.models[-1].rows
        return sorted(
            range(self.num_rows),
            key=lambda i: (rows[i].share_right, -(rows[i].loss or 0.0), i),
        )[:number]


class Named(Protocol):
    """What has the name of a model."""

    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=Named)


def of_model(models: Sequence[NamedT], name: str) -> NamedT:
    """The results of a model, by its name."""
    for found in models:
        if found.name == name:
            return found
    raise KeyError(f"{name!r} was not evaluated: {', '.join(found.name for found in models)}")


def lines(found: Evaluation) -> Iterator[str]:
    """The whole: how the models were asked, what was left out, measures, differences, notes."""
    names = short_names([model.name for model in found.models])
    yield from wrapped(f"{counted(found.num_rows, 'row')} of {found.data}; {_asked(found)}")
    if found.settings["match"] != "none":
        yield from wrapped(f"match: {found.settings['compared_by']}")
    for out in found.left_out:
        by = f" ({out.model})" if out.model else ""
        yield from wrapped(f"left out: {out.count:,}: {out.reason}{by}, first {out.where}")
    for name, model in zip(names, found.models, strict=True):
        if name != model.name:
            yield from wrapped(f"{name} is {model.name}")
    for first in range(0, len(names), 3):
        yield ""
        shown = range(first, min(first + 3, len(names)))
        yield _row("", [names[at] for at in shown], _VALUE)
        for measure in found.measures:
            values = [found.models[at].values.get(measure.name) for at in shown]
            yield _row(measure.label, [_value(measure, value) for value in values], _VALUE)
    others = range(1, len(names))
    for first in range(0, len(others), 2):
        yield ""
        shown = others[first : first + 2]
        yield _row("against first", [names[at] for at in shown], _DIFFERENCE)
        for measure in found.measures:
            found_differences = [found.models[at].against_first.get(measure.name) for at in shown]
            yield _row(
                measure.label, [_difference(measure, d) for d in found_differences], _DIFFERENCE
            )
    yield ""
    yield from wrapped(
        "[ ]: 95 % intervals, on the same rows for all models (score intervals for shares, "
        "bootstrap intervals otherwise); a difference on fewer than six rows is inconclusive"
    )
    for name, model in zip(names, found.models, strict=True):
        for out in model.no_loss:
            yield from wrapped(
                f"{name}: no loss on {out.count:,} rows: {out.reason} (first {out.where})"
            )
        for note in model.notes:
            yield from wrapped(f"{name}: {note}")


def _asked(found: Evaluation) -> str:
    asked = found.settings
    parts = ["prompts as served"]
    if asked["shots"]:
        parts.append(f"{asked['shots']} shots")
    if asked["temperature"] == 0:
        parts.append("greedy")
    else:
        parts.append(f"temperature {asked['temperature']:g}")
    if asked["samples"] > 1:
        parts.append(f"{asked['samples']} samples")
    parts.append(f"at most {asked['max_new_tokens']:,} new tokens")
    return ", ".join(parts)


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _row(label: str, cells: Sequence[str], width: int) -> str:
    return "".join([f"{label:<{_LABEL}}", *(f"{cell:<{width}}" for cell in cells)]).rstrip()


def _number(measure: Measure, value: float, *, sign: bool = False) -> str:
    if measure.percent:
        return f"{100 * value:{'+' if sign else ''}.1f}"
    digits = ".0f" if measure.name != "loss" else ".3f" if abs(value) < 10 else ".2f"
    return f"{value:{'+' if sign else ''}{digits}}"


def _interval(measure: Measure, found: Interval | None, *, sign: bool = False) -> str:
    if found is None:
        return ""
    low = _number(measure, found.low, sign=sign)
    return f" [{low}, {_number(measure, found.high, sign=sign)}]"


def _value(measure: Measure, value: Value | None) -> str:
    if value is None:
        return "-"
    return _number(measure, value.value) + _interval(measure, value.interval)


def _difference(measure: Measure, difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return difference.word + _interval(measure, difference.interval, sign=True)


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit their columns: the last parts of paths, as many as tell them apart."""
    most = _VALUE - 2
    for parts in range(1, 5):
        made = ["/".join(PurePath(name).parts[-parts:]) or name for name in names]
        if len(set(made)) == len(made):
            if all(len(name) <= most for name in made):
                return made
            break
    return [f"model {number}" for number in range(1, len(names) + 1)]
