"""The screen of a finished run: where it is, how to serve it, whether it was verified, and what
changed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from truetune.cli.screen import Screen, side_by_side
from truetune.model.served_adapter import stored_dtype
from truetune.reporting.serving import load_line, serve_line
from truetune.run.outcome import summary
from truetune.run_dir import REPORT

if TYPE_CHECKING:
    from truetune.behaviour.replies import Said
    from truetune.lab.quickstart import Comparison
    from truetune.run.pipeline import RunResult
    from truetune.verification.verdict import Verdict


def show_result(screen: Screen, result: RunResult, more: Sequence[tuple[str, str]] = ()) -> None:
    """Show the saved artifact, and the commands that load, chat with and serve it."""
    run = shlex.quote(str(result.run.path))
    merged = shlex.quote(f"{result.run.path}-merged")
    merge = [("merge", f"truetune export {run} --merge -o {merged}")]
    held = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    screen.line()
    screen.line(f"saved and reloaded: {result.artifact}  (loss {result.train_loss:.4f}{held})")
    if asked := summary(result.answers):
        screen.line(f"replies to served prompts: {asked}")
    if result.verdict:
        passed = sum(check.state == "passed" for check in result.verdict.checks)
        screen.line(f"verified by a fresh process: {passed} checks passed (verify.json)")
    settings = vars(result.plan)
    load = load_line(str(result.artifact), settings, is_adapter=result.base is not None)
    stops = set(result.contract.stop_ids) - set(result.base_stop_ids)
    serve = serve_line(
        str(result.artifact),
        settings,
        run=str(result.run.path),
        base=result.base,
        base_revision=result.base_revision,
        stops=result.contract.stop_ids if stops else (),
        dtype=stored_dtype(result.artifact),
    )
    verify = ("verify", f"truetune verify {run}")
    shown_pairs = [("load", load), ("chat", f"truetune chat {run}"), ("serve", serve), verify]
    if result.run.file(REPORT).is_file():
        shown_pairs.append(("report", str(result.run.file(REPORT))))
    screen.pairs([*shown_pairs, *(merge if result.base else []), *more])


def show_checks(screen: Screen, verdict: Verdict | None) -> None:
    """One line per check; failures are reported once, by the errors that follow."""
    from truetune.verification.verdict import shown

    for check in verdict.checks if verdict else ():
        text = "" if check.state == "failed" else shown(check)
        screen.line(f"  {check.state:<11}  {check.name:<8}  {text}".rstrip())


def _shortened(reply: Said, most: int = 64) -> str:
    """Shorten an answer so that it fits the table, and mark one that did not end."""
    text = reply.text if len(reply.text) <= most else reply.text[: most - 1].rstrip() + "\u2026"
    return text if reply.stopped else f"{text} (not ended)"


def show_comparison(screen: Screen, found: Comparison) -> None:
    screen.line()
    shown = [
        [question.text, *(_shortened(reply) for reply in (base, tuned))]
        for question, base, tuned in zip(
            found.questions[:6], found.base.replies, found.tuned.replies, strict=False
        )
    ]
    side_by_side(screen, ["unseen question", "base", "tuned"], shown)
    total = len(found.questions)
    screen.line()
    side_by_side(
        screen,
        [f"on {total} questions", "base", "tuned"],
        [
            [
                "answers that end on the stop token",
                f"{100 * found.base.finished / total:.0f} %",
                f"{100 * found.tuned.finished / total:.0f} %",
            ],
            [
                "answers that contain the fact",
                f"{100 * found.base.correct / total:.0f} %",
                f"{100 * found.tuned.correct / total:.0f} %",
            ],
            [
                "loss on prose (nats per token)",
                f"{found.base.prose_loss:.3f}",
                f"{found.tuned.prose_loss:.3f}",
            ],
        ],
    )
