"""What `truetune export` shows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from truetune.cli.screen import Screen
from truetune.findings import counted, gib
from truetune.model.served_adapter import model_line, stored_dtype

if TYPE_CHECKING:
    from truetune.exporting.gguf import WrittenGGUF
    from truetune.exporting.gguf_proof import Apart
    from truetune.exporting.mlx import WrittenMLX
    from truetune.run.export_kind import Export
    from truetune.run.export_quantised import QuantisedExport
    from truetune.run.export_served import ServedExport
    from truetune.run.export_whole import WholeExport
    from truetune.run.pipeline import ExportResult


def show_export(
    screen: Screen,
    made: Export,
    run: str,
    output: str,
    *,
    adapter: bool,
    ollama: bool,
    go_template: bool,
    as_json: bool,
) -> None:
    """Show what was exported.

    Args:
        adapter, ollama, go_template: how a GGUF file was asked for.
    """
    from truetune.exporting.gguf import WrittenGGUF
    from truetune.exporting.mlx import WrittenMLX
    from truetune.run.export_quantised import QuantisedExport
    from truetune.run.export_served import ServedExport
    from truetune.run.export_whole import WholeExport

    if isinstance(made, WrittenGGUF):
        asked = {"adapter": adapter, "ollama": ollama, "go_template": go_template}
        _on_gguf(screen, made, as_json=as_json, **asked)
    elif isinstance(made, WrittenMLX):
        _on_mlx(screen, made, output, as_json=as_json)
    elif isinstance(made, QuantisedExport):
        _on_quantised(screen, made, output, as_json=as_json)
    elif isinstance(made, ServedExport):
        _on_served(screen, made, run, output, as_json=as_json)
    elif isinstance(made, WholeExport):
        _on_whole(screen, made, as_json=as_json)
    else:
        _on_merged(screen, made, output, as_json=as_json)


def _on_merged(screen: Screen, made: ExportResult, output: str, *, as_json: bool) -> None:
    if as_json:
        facts = made.verdict.as_dict() if made.verdict else {"passed": None, "checks": []}
        typer.echo(json.dumps({**facts, "artifact": output, "onto": made.exported.onto}, indent=2))
        return
    report = made.exported.report
    screen.line(f"merged onto {made.exported.onto}, in float32; saved in {report.dtype}")
    from truetune.cli.result_screen import show_checks

    show_checks(screen, made.verdict)
    _on_folder(screen, output)


def _on_folder(screen: Screen, output: str) -> None:
    folder = shlex.quote(output)
    load = f"AutoModelForCausalLM.from_pretrained({json.dumps(output, ensure_ascii=False)})"
    serve = model_line("vllm", output, stored_dtype(Path(output)))
    screen.pairs([("load", load), ("chat", f"truetune chat {folder}"), ("serve", serve)])


def _on_whole(screen: Screen, made: WholeExport, *, as_json: bool) -> None:
    if as_json:
        facts = made.verdict.as_dict() if made.verdict else {"passed": None, "checks": []}
        typer.echo(json.dumps({**facts, "artifact": str(made.folder)}, indent=2))
        return
    how = (
        f"saved in {made.dtype}"
        if made.dtype
        else f"{counted(made.files, 'file')} copied and read back"
    )
    screen.line(f"a complete model, copied without merging: {how}")
    if made.verdict:
        from truetune.cli.result_screen import show_checks

        show_checks(screen, made.verdict)
    _on_folder(screen, str(made.folder))


def _on_served(screen: Screen, made: ServedExport, run: str, output: str, *, as_json: bool) -> None:
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


def _on_quantised(screen: Screen, made: QuantisedExport, output: str, *, as_json: bool) -> None:
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


def _on_mlx(screen: Screen, made: WrittenMLX, output: str, *, as_json: bool) -> None:
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


def _on_gguf(
    screen: Screen,
    made: WrittenGGUF,
    *,
    adapter: bool,
    ollama: bool,
    go_template: bool,
    as_json: bool,
) -> None:
    from truetune.run.export_gguf import TEMPLATE

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
    if ollama:
        _on_modelfile(screen, made, go_template=go_template)
        return
    path = shlex.quote(str(made.path))
    line = f"llama-server -m {path} --jinja"
    if adapter:
        template = shlex.quote(str(made.path.with_name(TEMPLATE)))
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
        else "the file's own, which Ollama 0.30 or newer renders as llama.cpp does; it differs "
        "so much from every template known to Ollama that Ollama does not replace it"
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
