"""Experiment trackers, through accelerate's tracker classes. metrics.jsonl is always written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.errors import UsageError

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


class Trackers:
    """The trackers of a run; none is imported unless it was asked for.

    Args:
        names: of `NAMES`.
        folder: run directory; its name becomes the run's, TensorBoard writes beside it.

    Raises:
        UsageError: an unknown tracker, or one whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names, self._folder = list(names), folder
        self._trackers: list[Any] = []
        unknown = sorted(set(names) - set(NAMES))
        if unknown:
            raise UsageError(
                f"unknown tracker {unknown[0]!r}", fix="one of " + ", ".join(NAMES), code="tracker"
            )
        for name in names:
            self._require(name)

    def _require(self, name: str) -> None:
        from accelerate.tracking import get_available_trackers

        if name not in {str(getattr(t, "value", t)) for t in get_available_trackers()}:
            raise UsageError(
                f"--report-to {name} needs a package that is not installed",
                fix=f"pip install {name}",
                code="tracker-missing",
            )

    def start(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Open them and store the settings."""
        if not self._names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        values = {name: str(row["value"]) for name, row in settings.items()}
        for name in self._names:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            # Beside the run: its own folder holds what a manifest lists, and nothing else.
            logs = (
                {"logging_dir": self._folder.parent}
                if tracker_class.requires_logging_directory
                else {}
            )
            tracker = tracker_class(self._folder.name, **logs)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(values)
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log({k: v for k, v in values.items() if k != "step"}, step=step)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
