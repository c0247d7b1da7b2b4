"""Show a checkup on a terminal: the verdict, at most a screenful of findings, and the lengths."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from truetune.checks.fit import duration
from truetune.checks.lengths import report_lines
from truetune.cli.screen import Screen, held_out
from truetune.findings import Finding, counted, gib, percent
from truetune.run.checkup import Checkup

_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"
# Lines of findings: with the summary about a screen.
_MOST_LINES = 28


class CheckScreen(Screen):
    """Show progress bars during the checks, and the findings at the end, in order."""

    def finding(self, finding: Finding) -> None:
        pass

    def stage(self, name: str) -> None:
        if self.console.is_terminal:  # in a pipe what was found is all there is
            super().stage(name)


def show_checkup(
    screen: Screen, found: Checkup, *, everything: bool = False, page: str | None = None
) -> None:
    """Show the result of a check."""
    shown = _first(found.findings, everything)
    for finding in shown:
        screen.show(finding)
    left = len(found.findings) - len(shown)
    if left:
        screen.line(f"and {left} more; show them with --all", "dim")
    if found.findings:
        screen.line()
    drawn = (
        ("model", _model_lines),
        ("verdict", _verdict_lines),
        ("run", partial(_run_lines, judged="verdict" in found.summary)),
        ("contract", _contract_lines),
        ("plan", _plan_lines),
        ("rehearsal", _smoke_test_lines),
        ("lengths", report_lines),
    )
    screen.pairs(
        [p for name, draw in drawn if name in found.summary for p in draw(found.summary[name])],
        folded=True,
    )
    if "lengths" in found.summary:
        _picture(screen, found.summary["lengths"])
    if page:
        screen.line(f"written: {page}", "dim")
    if found.ok and "plan" in found.summary:
        screen.line("to start the run, replace `check` with `train` and add -o RUN", "dim")
    # The last line is the verdict.
    screen.line(_verdict(found), "bold red" if not found.ok else "bold green")


def _first(findings: list[Finding], everything: bool) -> list[Finding]:
    """Return as many findings as fit on a screen, at least one."""
    if everything:
        return findings
    shown: list[Finding] = []
    lines = 0
    for finding in findings:
        lines += len(finding.lines())
        if shown and lines > _MOST_LINES:
            break
        shown.append(finding)
    return shown


def _verdict(found: Checkup) -> str:
    counts = found.counts()
    parts = [
        f"{number} {level}{'s' if number > 1 else ''}" for level, number in counts.items() if number
    ]
    text = ", ".join(parts) or "nothing found"
    return f"ok: {text}" if found.ok else f"not ok: {text}"


def _run_lines(run: dict[str, Any], *, judged: bool) -> list[tuple[str, str]]:
    """What is trained; whether from a base is shown here if no weights were judged."""
    start = f" ({run['start']})" if "start" in run and not judged else ""
    lines = [("model", f"{run['model']}{start}")]
    if "train" not in run:
        return [*lines, ("rows", str(run["data"]))]
    train, held = run["train"], run["held_out"]
    tokens = max(train["tokens"], 1)
    rows, most = run["batch_size"], run["tokens_per_step"]
    step = counted(rows, "example") if rows else f"up to {most:,} tokens"
    bad = run["refused"]
    refused = f", {bad:,} refused (--bad-rows drop would leave them out)" if bad else ""
    return [
        *lines,
        (
            "rows",
            f"{train['examples']:,} for training, {held_out(train, held)}, "
            f"{run['dropped']:,} dropped{refused}; schema {run['schema']}",
        ),
        (
            "tokens",
            f"{train['tokens']:,}, {train['supervised_tokens']:,} of them "
            f"({percent(train['supervised_tokens'] / tokens)}) supervised",
        ),
        (
            "run",
            f"{run['method']}, {counted(run['max_steps'], 'step')} of {step} at "
            f"{run['learning_rate']:g}",
        ),
    ]


def _model_lines(model: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("folder", str(model["folder"]))]
    if "architecture" not in model:
        return lines
    base = f" on {model['base']}" if model["base"] else ""
    ends = model["template_ends_with"]
    lines.append(
        ("model", f"{model['architecture']} {model['kind']}{base}, weights: {model['weights']}")
    )
    lines.append(
        (
            "tokens",
            f"{model['vocabulary']:,} in the tokenizer, {model['head_rows']:,} embeddings in the "
            f"model",
        )
    )
    stops = ", ".join(f"{s['token']!r} ({s['id']})" for s in model["stop"]) or "none"
    lines.append(("served stop", f"{stops}, from {model['stop_from']}"))
    if ends:
        lines.append(("template", f"ends answers with {ends['token']!r} ({ends['id']})"))
    return lines


def _verdict_lines(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    kind, taken = verdict["kind"], verdict.get("taken_for")
    if kind == "unknown":
        kind = "unknown" + (f", treated as {taken} because of its template" if taken else "")
    return [
        ("base/instruct", f"{kind}: {'; '.join(verdict['reasons'])}"),
        ("defaults", verdict["means"]),
    ]


def _contract_lines(contract: dict[str, Any]) -> list[tuple[str, str]]:
    stops = ", ".join(f"{s['token']!r} ({s['id']})" for s in contract["stop"]) or "none"
    arguments = contract["template_arguments"]
    return [
        ("template", contract["template"] + (f", with {arguments}" if arguments else "")),
        ("stop tokens", stops),
    ]


def _plan_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    parts = ", ".join(f"{name} {gib(n)}" for name, n in plan["parts"].items())
    free = plan["available"]
    unused = f", {gib(free)} free" if free is not None else ""
    lines = [
        (
            "memory",
            f"{gib(plan['low'])} to {gib(plan['high'])} on {plan['device']}{unused}: {parts}",
        )
    ]
    if plan["seconds"]:
        lines.append(
            (
                "time",
                f"about {duration(plan['seconds'])} for the steps, on an otherwise idle machine",
            )
        )
    return lines


def _smoke_test_lines(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    if "loss" not in numbers:
        return []
    text = f"{counted(numbers['rows'], 'row')}, loss {numbers['loss']:.3f}"
    if "loss_after_a_step" in numbers:
        text += f", after a step {numbers['loss_after_a_step']:.3f}"
    text += (
        f"; row by row, the loss differs by {max(numbers['loss_difference'], 1e-9):.0e} and "
        f"the gradient by {max(numbers['gradient_difference'], 1e-9):.0e}"
    )
    if "reload_difference" in numbers:
        text += f"; saved, reloaded: logits within {numbers['reload_difference']:.1e}"
    return [("smoke test", text)]


def _picture(screen: Screen, lengths: dict[str, Any]) -> None:
    """The histogram, a line a range, joined to at most twelve."""
    filled = itertools.dropwhile(lambda part: not part["rows"], lengths["histogram"])
    bins = _joined(list(filled), 12)
    most = max((b["rows"] for b in bins), default=0)
    labels = [f"{b['to']:,}" for b in bins]
    wide = max(map(len, labels), default=0)
    for label, part in zip(labels, bins, strict=True):
        eighths = round(8 * 40 * part["rows"] / max(most, 1))
        full, rest = divmod(max(eighths, 1) if part["rows"] else 0, 8)
        bar = _EIGHTHS[8] * full + (_EIGHTHS[rest] if rest else "")
        screen.line(f"  {label:>{wide}}  {bar} {part['rows']:,}")


def _joined(bins: list[dict[str, int]], most: int) -> list[dict[str, int]]:
    size = -(-len(bins) // most) or 1
    groups = [bins[i : i + size] for i in range(0, len(bins), size)]
    return [
        {"from": g[0]["from"], "to": g[-1]["to"], "rows": sum(b["rows"] for b in g)} for g in groups
    ]
