"""docs/notebooks/NAME.py, cells in the percent form, to the text of NAME.ipynb."""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
_CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)


def cells(source: str) -> list[tuple[str, str]]:
    """(markdown or code, text) of each cell, in order."""
    _, *parts = _CELL.split(source)
    found = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        body = text.strip("\n")
        if kind:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        found.append((kind or "code", body))
    return found


def notebook(source: str) -> str:
    """The notebook, without outputs."""
    made = []
    for number, (kind, text) in enumerate(cells(source)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append({**cell, "source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[str, str]:
    """Every notebook by its path."""
    return {
        f"docs/notebooks/{path.stem}.ipynb": notebook(path.read_text(encoding="utf-8"))
        for path in sorted(FOLDER.glob("*.py"))
    }
