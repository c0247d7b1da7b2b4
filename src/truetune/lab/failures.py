"""The course's table of failures, each from a real run: cause, what the loss shows, what the probe
shows, the repair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# An experiment, an arm of it, and a measure.
Cell = tuple[str, str, str]


@dataclass(frozen=True)
class Failure:
    """One failure.

    Attributes:
        sound, broken: the runs whose losses are compared.
        probe: the measure that shows it, of the run before, and of the broken one.
        repair: in words, and what the probe shows with it.
    """

    name: str
    cause: str
    sound: Cell
    broken: Cell
    before: Cell
    probe: Cell
    repair: str
    after: Cell


_LOSS = "training loss"
FAILURES = (
    Failure(
        "format collapse",
        "a high rate on rows of one format: prose turns into answers",
        ("format-forgetting", "1e-4", _LOSS),
        ("format-forgetting", "3e-4", _LOSS),
        ("format-forgetting", "base", "ends prose"),
        ("format-forgetting", "3e-4", "ends prose"),
        "as many tokens of pretraining text among the rows",
        ("format-forgetting", "3e-4, half prose", "ends prose"),
    ),
    Failure(
        "role leak",
        "loss on the user's turns, and no end in the text of the answer",
        ("role-leak", "two turns, loss on all", _LOSS),
        ("role-leak", "two turns, loss on all, end absent", _LOSS),
        ("role-leak", "two turns, loss on all", "role leak"),
        ("role-leak", "two turns, loss on all, end absent", "role leak"),
        "loss on the answer and its end alone",
        ("role-leak", "two turns, sound", "role leak"),
    ),
    Failure(
        "forgetting of facts",
        "a learning rate above that of pretraining",
        ("learning-rate", "all weights 1e-4", _LOSS),
        ("learning-rate", "all weights 3e-3", _LOSS),
        ("learning-rate", "base", "recall in prose"),
        ("learning-rate", "all weights 3e-3", "recall in prose"),
        "a twentieth of the pretraining rate",
        ("learning-rate", "all weights 1e-4", "recall in prose"),
    ),
    Failure(
        "forgetting of prose",
        "too high a rate, or too many steps",
        ("format-forgetting", "1e-4", _LOSS),
        ("format-forgetting", "1e-3", _LOSS),
        ("format-forgetting", "base", "prose"),
        ("format-forgetting", "1e-3", "prose"),
        "a lower rate, and pretraining text among the rows",
        ("format-forgetting", "3e-4, half prose", "prose"),
    ),
    Failure(
        "repetition",
        "the end marker is in the ids and in no label",
        ("role-leak", "two turns, sound", _LOSS),
        ("role-leak", "one turn, end masked", _LOSS),
        ("role-leak", "two turns, sound", "repeats"),
        ("role-leak", "one turn, end masked", "repeats"),
        "the end marker as a target (a repetition penalty hides the circle alone)",
        ("end-marker", "trained", "repeats"),
    ),
    Failure(
        "hallucination",
        "questions about what the base never saw, and no row that says so",
        ("end-marker", "trained", _LOSS),
        ("knowledge", "tuned", _LOSS),
        ("knowledge", "base", "invents"),
        ("knowledge", "tuned", "invents"),
        "rows about unknown places that are answered with *I do not know*",
        ("knowledge", "tuned, 40 refusals", "invents"),
    ),
)


def table(results: Sequence[Mapping[str, Any]], number: Any) -> Iterator[str]:
    """Lines of Markdown; failures whose runs are not among the results are left out.

    Args:
        number: writes a value with its unit.
    """
    known = {
        (result["name"], arm["name"], name): number(found["value"], found["unit"])
        for result in results
        for arm in result["arms"]
        for name, found in arm["measures"].items()
    }
    shown = [
        f
        for f in FAILURES
        if all(cell in known for cell in (f.sound, f.broken, f.before, f.probe, f.after))
    ]
    if not shown:
        return
    yield "## What goes wrong, and what shows it"
    yield ""
    yield "The course's table of failures, each line from the runs below. The loss of a broken run"
    yield "is about that of a sound one, or lower: only a probe shows what went wrong."
    yield ""
    yield "| failure | cause | training loss: sound, broken | probe: before, broken | repair |"
    yield "|---|---|---|---|---|"
    for f in shown:
        yield (
            f"| {f.name} | {f.cause} ({f.probe[0]}: *{f.probe[1]}*) "
            f"| {known[f.sound]}, {known[f.broken]} "
            f"| {f.probe[2]}: {known[f.before]}, {known[f.probe]} | {f.repair}: {known[f.after]} |"
        )
    yield ""
