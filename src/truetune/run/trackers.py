"""Experiment trackers, through accelerate's tracker classes. metrics.jsonl is always written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.errors import UsageError
from truetune.findings import visible
from truetune.reporting.facts import asked

NAMES = ("trackio", "tensorboard", "wandb", "mlflow")
# What accelerate's class of a tracker imports, if that is not the tracker's own name.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
LOGS = "trackers"


def require_trackers(names: Sequence[str]) -> None:
    """Raise if a tracker cannot be had; imports none of them.

    Raises:
        UsageError: an unknown tracker, or one whose package is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"unknown tracker {name!r}", fix="use one of " + ", ".join(NAMES), code="tracker"
            )
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES.get(name, (name,))):
            raise UsageError(
                f"--report-to {name} needs a package that is not installed",
                fix=f"pip install {name}",
                code="tracker-missing",
            )


# Columns of a table of samples, and the most characters of a cell.
_COLUMNS = ("where", "prompt", "reply", "ended", "expected")
_CELL = 2000


def _shown(sample: Mapping[str, Any], column: str) -> str:
    """A cell of the table of samples."""
    if column == "prompt":
        value: Any = asked(sample)
    elif column == "ended":
        value = "yes" if sample.get("stopped") else "no"
    else:
        value = sample.get({"reply": "answer"}.get(column, column))
    return visible(str(value or ""))[:_CELL]


def _to_tensorboard(
    tracker: Any, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    # TensorBoard renders Markdown: four blanks make text of it, whatever it holds.
    for row in rows:
        cells = dict(zip(columns, row, strict=True))
        lines = [f"    {name}: {line}" for name in columns for line in cells[name].splitlines()]
        tracker.writer.add_text(f"samples/{cells['where']}", "\n".join(lines), global_step=step)
    tracker.writer.flush()


def _to_wandb(
    tracker: Any, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    import wandb

    tracker.log({"samples": wandb.Table(columns=list(columns), data=list(rows))}, step=step)


def _to_mlflow(
    tracker: Any, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    import mlflow

    table = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    mlflow.log_table(table, artifact_file="samples.json")


def _to_trackio(
    tracker: Any, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    import pandas
    import trackio

    frame = pandas.DataFrame(list(rows), columns=list(columns))
    tracker.log({"samples": trackio.Table(dataframe=frame)}, step=step)


_TEXTS = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
}


class Trackers:
    """The trackers of a run; none is imported unless it was asked for.

    Args:
        names: of `NAMES`.
        folder: run directory; its name becomes the run's. A tracker that writes files writes them
            to trackers/ in it.

    Raises:
        UsageError: an unknown tracker, or one whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names, self._folder = list(names), folder
        self._trackers: list[Any] = []
        require_trackers(names)

    def start(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Open them and store the settings.

        Raises:
            UsageError: one cannot be opened, for example because nobody is logged in.
        """
        values = {name: str(row["value"]) for name, row in settings.items()}
        for name in self._names:
            try:
                self._trackers.append(self._opened(name))
                self._trackers[-1].store_init_configuration(values)
            except Exception as error:  # whatever a tracker's library raises
                raise UsageError(
                    f"the tracker {name} cannot be started: {error}",
                    why=f"{type(error).__name__} from its library",
                    fix="set it up (for example, log in), or leave it out of --report-to; "
                    "metrics.jsonl is written in any case",
                    code="tracker",
                ) from error

    def _opened(self, name: str) -> Any:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # Some of accelerate's classes ask for it, and others make it.
        PartialState()
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        logs = (
            {"logging_dir": self._folder / LOGS} if tracker_class.requires_logging_directory else {}
        )
        tracker = tracker_class(self._folder.absolute().name, **logs)
        tracker.start()
        return tracker

    def log(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log({k: v for k, v in numbers.items() if k not in ("step", "probe")}, step=step)

    def samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Replies to held-out prompts, where the tracker's library takes text."""
        if not samples:
            return
        rows = [[str(step), *(_shown(sample, part) for part in _COLUMNS)] for sample in samples]
        for tracker in self._trackers:
            if keep := _TEXTS.get(getattr(tracker, "name", "")):
                keep(tracker, ["step", *_COLUMNS], rows, step)

    def finish(self) -> None:
        """Close them; closing twice does nothing."""
        while self._trackers:
            self._trackers.pop().finish()
