"""Write the pages of a run: report.html, and the model card in the artifact; neither can make a run
fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from truetune.errors import Interrupted, TruetuneError
from truetune.findings import Finding
from truetune.reporting.card import write_card
from truetune.reporting.facts import RunFacts, State
from truetune.reporting.page import page
from truetune.run_dir import REPORT, UNVERIFIED, RunDir, write_text


def write_pages(run: RunDir) -> list[Finding]:
    """Page and model card of a run that is done, before its manifest lists them.

    Returns:
        A warning for each that could not be written.
    """
    artifact = run.artifact()
    card = [(lambda: write_card(run, artifact))] if artifact else []
    return _tried(run, [*card, lambda: _write_report(run, "finished", ())])


def write_ending(run: RunDir, error: BaseException) -> list[Finding]:
    """Write the page of a run that ended early, and record what ended it.

    Returns:
        A warning where the page could not be written.
    """
    if isinstance(error, TruetuneError) and error.code == "lock-lost":
        return []  # the run is another process's now, and so is its page
    if isinstance(error, Interrupted) or not isinstance(error, TruetuneError):
        return _tried(run, [lambda: _write_report(run, "unfinished", ())])
    # A trained artifact only waits for its verification: a resumed run keeps what was found.
    if not run.file(UNVERIFIED).is_file() and not _is_recorded(run, error):
        with contextlib.suppress(TruetuneError):
            run.append("findings.jsonl", error.finding.as_dict())
    return _tried(run, [lambda: _write_report(run, "failed", [error.finding])])


def _is_recorded(run: RunDir, error: TruetuneError) -> bool:
    with contextlib.suppress(ValueError, OSError):
        lines = run.lines("findings.jsonl")
        return any((f.get("code"), f.get("what")) == (error.code, error.what) for f in lines)
    return True


def _write_report(run: RunDir, state: State, also: Sequence[Finding]) -> None:
    write_text(run.file(REPORT), page(RunFacts.read(run, state=state, also=also)))


def _tried(run: RunDir, writes: Sequence[Callable[[], None]]) -> list[Finding]:
    found = []
    for write in writes:
        try:
            write()
        except Exception as error:  # a page is no reason to lose a run
            known = error if isinstance(error, TruetuneError) else None
            found.append(
                Finding(
                    "report-not-written",
                    "warning",
                    known.what if known else f"a page of the run could not be written: {error}",
                    known.where if known else str(run.path),
                    why=known.why if known else type(error).__name__,
                    fix="the run is not affected; write the page again with `truetune report`",
                )
            )
    return found
