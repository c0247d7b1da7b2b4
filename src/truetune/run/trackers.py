"""Experiment trackers, through accelerate's tracker classes. metrics.jsonl is always written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.errors import UsageError

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
# Those that are an extra of this package.
# What accelerate's class of a tracker imports, where that is not the tracker's own name.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
LOGS = "trackers"


def require_trackers(names: Sequence[str]) -> None:
    """Raise where a tracker cannot be had; imports none of them.

    Raises:
        UsageError: an unknown tracker, or one whose package is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"unknown tracker {name!r}", fix="one of " + ", ".join(NAMES), code="tracker"
            )
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES.get(name, (name,))):
            raise UsageError(
                f"--report-to {name} needs a package that is not installed",
                fix=f"pip install {name}",
                code="tracker-missing",
            )


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
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        logs = (
            {"logging_dir": self._folder / LOGS} if tracker_class.requires_logging_directory else {}
        )
        tracker = tracker_class(self._folder.absolute().name, **logs)
        tracker.start()
        return tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log({k: v for k, v in values.items() if k != "step"}, step=step)

    def finish(self) -> None:
        """Close them; closing twice does nothing."""
        while self._trackers:
            self._trackers.pop().finish()
