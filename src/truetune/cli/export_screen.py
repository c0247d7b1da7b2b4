"""What `truetune export` does and shows."""

from __future__ import annotations

import json
import shlex
from typing import Any

import typer

from truetune.cli.screen import Screen
from truetune.errors import UsageError
from truetune.findings import gib, near
from truetune.servers.llama_cpp import require_llama_cpp

_KINDS = ("merged", "gguf")


def require_export(to: str | None, *, merge: bool, onto: str, no_verify: bool, dtype: str) -> str:
    """The kind of export that was asked for.

    Raises:
        UsageError: none, two, or an option that has no effect on it.
    """
    if to is None and not merge:
        raise UsageError(
            "no export was requested",
            fix="truetune export RUN --merge -o DIR, or --to gguf -o DIR",
            code="export-what",
        )
    what = to or "merged"
    if what not in _KINDS or (merge and what != "merged"):
        meant = near(what, _KINDS)
        raise UsageError(
            f"--to {what!r} is not a known export"
            if what not in _KINDS
            else "--merge and --to contradict each other",
            where="--to",
            why=f"did you mean {meant[0]}?" if meant and what not in _KINDS else "",
            fix=f"one of {', '.join(_KINDS)}",
            code="export-what",
        )
    if onto not in ("auto", "original", "dequantised"):
        raise UsageError(
            f"unknown weights {onto!r}",
            fix="--onto auto, original or dequantised",
            code="export-onto",
        )
    if what == "gguf":
        if no_verify or dtype != "auto":
            raise UsageError(
                ("--no-verify" if no_verify else "--dtype") + " has no effect on a GGUF file",
                why="it is always compared with the model"
                if no_verify
                else "--quant sets the type of its weights",
                fix="leave it out",
                code="export-what",
            )
        require_llama_cpp("--to gguf")
    return what


def export_merged(screen: Screen, run: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Merge, and tell what was made."""
    from truetune.run.pipeline import export

    try:
        result = export(run, output, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if as_json:
        facts = result.verdict.as_dict() if result.verdict else {"passed": None, "checks": []}
        typer.echo(
            json.dumps({**facts, "artifact": output, "onto": result.exported.onto}, indent=2)
        )
        return
    report = result.exported.report
    screen.line(f"merged onto {result.exported.onto}, in float32; saved in {report.dtype}")
    from truetune.cli.result_screen import show_checks

    show_checks(screen, result.verdict)
    folder = shlex.quote(str(result.folder))
    load = f"AutoModelForCausalLM.from_pretrained({json.dumps(output, ensure_ascii=False)})"
    screen.pairs(
        [("load", load), ("chat", f"truetune chat {folder}"), ("serve", f"vllm serve {folder}")]
    )


def export_gguf(screen: Screen, run: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Write a GGUF file, and tell how it was proved."""
    from truetune.run.export_gguf import export_gguf as exported

    try:
        made = exported(run, output, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if as_json:
        facts = {"file": str(made.path), "quant": made.quant, "bytes": made.num_bytes}
        typer.echo(json.dumps({**facts, **made.proof.as_dict()}, indent=2))
        return
    proof = made.proof
    screen.line(f"{made.path} ({made.quant}, {gib(made.num_bytes)}), proved with llama.cpp:")
    apart = proof.apart
    rows = [
        ("ids", f"equal on {proof.texts.texts} texts in twenty scripts, digits, code, spaces"),
        ("prompts", f"equal on {proof.prompts} conversations, as text and as ids"),
        ("stops", f"replies end on all {len(proof.stops)} stop tokens"),
    ]
    if apart:
        rows.append(
            (
                "numbers",
                f"{apart.mean:.2g} nats per token from transformers in float32, "
                f"{100 * apart.greedy:.1f} % of the most likely tokens equal at "
                f"{apart.positions} positions",
            )
        )
    screen.pairs(rows)
    path = shlex.quote(str(made.path))
    line = f"llama-server -m {path} --jinja"
    if proof.template_kwargs:
        line += f" --chat-template-kwargs {shlex.quote(json.dumps(proof.template_kwargs))}"
    screen.pairs([("serve", line)])
