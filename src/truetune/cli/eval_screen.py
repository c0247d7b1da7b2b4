"""What `truetune eval` shows and writes: the table, the worst rows, a line for each row."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from truetune.cli.screen import Screen
from truetune.errors import OutputExists, UsageError
from truetune.evaluation.result import Judgement
from truetune.evaluation.table import Evaluation, lines, short_names
from truetune.evaluation.tasks import TaskEvaluation
from truetune.run_dir import write_text

# Characters of a prompt, an answer or a reply that are shown; the file of -o has all of them.
_MOST = 1200


def require_writable(path: Path, data: str, *, overwrite: bool) -> None:
    """Refuse an output file that could not be written at the end, or that is the data file.

    Raises:
        UsageError: its folder is not there, or something is in the way.
    """
    if data and path.exists() and Path(data).exists() and path.samefile(data):
        raise OutputExists(
            f"{path} is the data file, which the results would overwrite",
            fix="choose another file with -o",
            code="output-is-input",
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputExists(
            f"{path} {'is a folder' if path.is_dir() else 'already exists'}",
            fix="choose another file with -o" + ("" if path.is_dir() else ", or add --overwrite"),
            code="output-exists",
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"no such folder: {path.parent}",
            where=f"-o {path}",
            fix=f"create it: mkdir -p {shlex.quote(str(path.parent))}",
            code="output-not-writable",
        )


def write_rows(path: Path, found: Evaluation | TaskEvaluation) -> None:
    """Write one line per row and model; if that fails, the file is unchanged."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in found.rows()))


def show_tasks(screen: Screen, found: TaskEvaluation) -> None:
    """Warnings, and the table."""
    for model in found.models:
        for finding in model.findings:
            screen.finding(finding)
    for line in found.lines():
        screen.line(line)


def show_evaluation(screen: Screen, found: Evaluation, worst: int) -> None:
    """Warnings, the table, and the worst rows of the last model."""
    for model in found.models:
        for finding in model.findings:
            screen.finding(finding)
    for line in lines(found):
        screen.line(line)
    names = short_names([model.name for model in found.models])
    for row in found.worst(worst):
        results = [model.rows[row] for model in found.models]
        last = results[-1]
        screen.line()
        screen.line(last.where, "bold")
        width = max(map(len, ["expected", *names]))
        pairs = [("prompt", _ending(last.prompt)), ("expected", _beginning(last.expected))]
        for name, result in zip(names, results, strict=True):
            pairs += [(name, _told(reply)) for reply in result.replies]
        # A reply must not look like a line of this table.
        indent = "\n" + " " * (width + 4)
        screen.pairs([(name, text.replace("\n", indent)) for name, text in pairs], folded=True)


def _told(reply: Judgement) -> str:
    marks = [] if reply.ended else ["not ended"]
    marks += ["as expected"] if reply.right else []
    return _beginning(reply.text) + (f"  ({', '.join(marks)})" if marks else "")


def _beginning(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[:_MOST]}\u2026"


def _ending(text: str) -> str:
    """The end of a prompt is the question."""
    return text if len(text) <= _MOST else f"\u2026{text[-_MOST:]}"
