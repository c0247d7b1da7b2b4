"""What `truetune export` does and shows."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import typer

from truetune.cli.screen import Screen
from truetune.findings import gib

if TYPE_CHECKING:
    from truetune.exporting.gguf import WrittenGGUF
    from truetune.exporting.gguf_proof import Apart
    from truetune.run.export_whole import WholeExport


def export_merged(screen: Screen, run: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Merge, and tell what was made."""
    from truetune.run.export_whole import WholeExport, export_plain

    try:
        result = export_plain(run, output, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if isinstance(result, WholeExport):
        _on_whole(screen, result, as_json=as_json)
        return
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
    _on_folder(screen, output)


def _on_folder(screen: Screen, output: str) -> None:
    folder = shlex.quote(output)
    load = f"AutoModelForCausalLM.from_pretrained({json.dumps(output, ensure_ascii=False)})"
    screen.pairs(
        [("load", load), ("chat", f"truetune chat {folder}"), ("serve", f"vllm serve {folder}")]
    )


def _on_whole(screen: Screen, made: WholeExport, *, as_json: bool) -> None:
    """Tell that a model was whole already."""
    if as_json:
        facts = made.verdict.as_dict() if made.verdict else {"passed": None, "checks": []}
        typer.echo(json.dumps({**facts, "artifact": str(made.folder)}, indent=2))
        return
    how = f"saved in {made.dtype}" if made.dtype else f"{made.files} files copied and read back"
    screen.line(f"a complete model, copied without merging: {how}")
    if made.verdict:
        from truetune.cli.result_screen import show_checks

        show_checks(screen, made.verdict)
    _on_folder(screen, str(made.folder))


def export_served(
    screen: Screen, run: str, output: str, *, server: str, as_json: bool, **options: Any
) -> None:
    """Write what a server loads, and tell the line that serves it."""
    from truetune.run.export_served import export_served as exported

    try:
        made = exported(run, output, server, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if as_json:
        verdict = made.merged.verdict if made.merged else None
        facts = {
            "artifact": output,
            "merged": made.merged is not None,
            "whole": made.whole is not None,
            "why": list(made.reasons),
            "passed": verdict.passed if verdict else None,
            "serve": made.line,
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    if made.whole is not None:
        screen.line(f"a complete model, copied without merging: {output}")
    elif made.merged is None:
        screen.line(f"the unchanged adapter: {output}")
    else:
        screen.line(f"merged, because {'; '.join(made.reasons)}: {output}")
        from truetune.cli.result_screen import show_checks

        show_checks(screen, made.merged.verdict)
    screen.pairs(
        [("serve", made.line), ("hold", f"truetune diagnose {shlex.quote(run)} --url URL")]
    )


def export_quantised(
    screen: Screen, run: str, output: str, *, as_json: bool, **options: Any
) -> None:
    """Write a folder with quantised weights, and tell how it was proved."""
    from truetune.run.export_quantised import export_quantised as exported

    try:
        made = exported(run, output, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if as_json:
        typer.echo(json.dumps({"folder": output, **made.as_dict(), "serve": made.line}, indent=2))
        return
    written, numbers = made.written, made.stage.numbers
    screen.line(f"{output} ({made.quant}), loaded by transformers and compared with the model:")
    rows = [
        (
            "weights",
            f"{written.matrices} matrices quantised, {gib(written.num_bytes)} instead of "
            f"{gib(written.plain_bytes)}",
        ),
        ("prompts", f"equal on {made.prompts} conversations, as text and as ids"),
        ("numbers", _numbers(made.apart)),
        ("replies", f"{100 * numbers['same_replies']:.0f} % of {numbers['replies']} are the same"),
    ]
    if made.calibration:
        held = made.calibration
        rows.insert(
            1, ("calibrated", f"on {len(held.rows)} of {held.available} rows: {held.source}")
        )
    folder = shlex.quote(output)
    screen.pairs([*rows, ("chat", f"truetune chat {folder}"), ("serve", made.line)])


def export_mlx(screen: Screen, run: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Write a folder for MLX, and tell how it was proved."""
    from truetune.run.export_mlx import export_mlx as exported

    try:
        made = exported(run, output, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if as_json:
        typer.echo(json.dumps({"folder": output, **made.as_dict()}, indent=2))
        return
    folder = shlex.quote(output)
    screen.line(f"{output} ({made.quant}), verified with mlx_lm on the CPU:")
    screen.pairs(
        [
            ("prompts", f"equal on {made.prompts} conversations, as ids"),
            ("stops", f"replies end on all {len(made.stops)} stop tokens"),
            ("numbers", _numbers(made.apart)),
            ("chat", f"mlx_lm.chat --model {folder}"),
            ("serve", f"mlx_lm.server --model {folder}"),
        ]
    )


def _numbers(apart: Apart) -> str:
    return (
        f"{apart.mean:.2g} nats per token from transformers in float32; {100 * apart.greedy:.1f} % "
        f"of the likeliest tokens are equal at {apart.positions} positions"
    )


def export_gguf(
    screen: Screen, run: str, output: str, *, what: str, as_json: bool, **options: Any
) -> None:
    """Write a GGUF file, and tell how it was proved.

    Args:
        what: gguf, adapter or ollama.
    """
    from truetune.run import export_gguf as room

    if what == "ollama":
        options["ollama"] = True
    write = room.export_adapter if what == "adapter" else room.export_gguf
    try:
        made = write(run, output, listener=None if as_json else screen, **options)
    finally:
        screen.close()
    if as_json:
        facts = {"file": str(made.path), "quant": made.quant, "bytes": made.num_bytes}
        typer.echo(json.dumps({**facts, **made.proof.as_dict()}, indent=2))
        return
    proof = made.proof
    screen.line(f"{made.path} ({made.quant}, {gib(made.num_bytes)}), verified with llama.cpp:")
    apart = proof.apart
    rows = [
        ("ids", f"equal on {proof.texts.texts} texts in twenty scripts, digits, code, spaces"),
        ("prompts", f"equal on {proof.prompts} conversations, as text and as ids"),
        ("stops", f"replies end on all {len(proof.stops)} stop tokens"),
    ]
    if apart:
        rows.append(("numbers", _numbers(apart)))
    screen.pairs(rows)
    if what == "ollama":
        _on_modelfile(screen, made, go_template=options["go_template"])
        return
    path = shlex.quote(str(made.path))
    line = f"llama-server -m {path} --jinja"
    if what == "adapter":
        template = shlex.quote(str(made.path.with_name(room.TEMPLATE)))
        line = f"llama-server -m BASE.gguf --lora {path} --jinja --chat-template-file {template}"
    if proof.template_kwargs:
        line += f" --chat-template-kwargs {shlex.quote(json.dumps(proof.template_kwargs))}"
    screen.pairs([("serve", line)])


def _on_modelfile(screen: Screen, made: WrittenGGUF, *, go_template: bool) -> None:
    from truetune.exporting.ollama import MODELFILE

    file = made.path.with_name(MODELFILE)
    template = (
        "as a Go template in the Modelfile, rendered by Go and tokenized by llama.cpp: the "
        "prompts are those of training"
        if go_template
        else "the file's own, which Ollama 0.30 or newer renders as llama.cpp does; it differs so "
        "much from the templates that Ollama knows that none of them replaces it"
    )
    name = shlex.quote(made.path.parent.name.lower())
    screen.pairs([("template", template), ("Modelfile", str(file))])
    screen.pairs(
        [
            ("create", f"ollama create {name} -f {shlex.quote(str(file))}"),
            ("look", f"ollama show {name} --template"),
            ("chat", f"ollama run {name}"),
        ]
    )
