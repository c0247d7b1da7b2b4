"""Find experiments by name: each module of `experiments/` declares one. Write the page of their
results."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path

from truetune.errors import UsageError
from truetune.findings import near
from truetune.lab import experiments
from truetune.lab.experiment import Experiment
from truetune.lab.page import files
from truetune.lab.results import read
from truetune.run_dir import write_text


@cache
def every() -> tuple[Experiment, ...]:
    """All experiments, in the order of their claims."""
    names = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
    found = [import_module(f"{experiments.__name__}.{name}").EXPERIMENT for name in names]
    return tuple(sorted(found, key=lambda experiment: experiment.number))


def find(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        UsageError: there is none.
    """
    names = [experiment.name for experiment in every()]
    if name not in names:
        alike = near(name, names) or [e.name for e in every() if str(e.number) == name]
        raise UsageError(
            f"there is no experiment {name!r}",
            fix=f"did you mean {alike[0]}?" if alike else "truetune lab list shows all of them",
            code="no-such-experiment",
        )
    return every()[names.index(name)]


def write_page(folder: Path | str) -> Path:
    """Write lab.md, with its pictures, from the results of a folder."""
    folder = Path(folder)
    for name, text in files(read(folder, every()), every(), ".").items():
        write_text(folder / name, text)
    return folder / "lab.md"
