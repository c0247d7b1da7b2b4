"""Rows, and the command line as a function: arguments in, exit code and screen out."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.cli.verbs import main


@dataclass(frozen=True)
class Shown:
    """What a command left on the screen."""

    code: int
    out: str
    err: str


def command(*words: Any) -> Shown:
    """Run a command line in this process, where no output is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = "did not exit"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code
    return Shown(code, out.getvalue(), err.getvalue())


def write_rows(path: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    """One row a line; a text stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Rows of question and answer, all different."""
    return [{"prompt": f"{i}+1?", "completion": f"{i + 1}."} for i in range(count)]


def lines(path: Path) -> list[dict[str, Any]]:
    """The values of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
