"""What `truetune export` does and shows."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import typer

from truetune.cli.screen import Screen
from truetune.errors import UsageError
from truetune.findings import gib, near
from truetune.model.served_adapter import SERVERS
from truetune.servers.llama_cpp import require_llama_cpp

if TYPE_CHECKING:
    from truetune.exporting.gguf import WrittenGGUF

_KINDS = ("merged", "gguf", "ollama", *SERVERS)
# What is asked for by another name.
_INSTEAD = {
    "tgi": "--to merged, and then text-generation-launcher --model-id DIR",
    "lmstudio": "--to gguf: LM Studio loads the file",
    "llama.cpp": "--to gguf",
    "transformers": "--to merged, and then transformers serve DIR",
}


def require_export(
    to: str | None,
    *,
    merge: bool,
    onto: str,
    no_verify: bool,
    dtype: str,
    go_template: bool,
    adapter: bool,
) -> str:
    """The kind of export that was asked for.

    Raises:
        UsageError: none, two, or an option that has no effect on it.
    """
    if to is None and not merge:
        raise UsageError(
            "nothing was asked for",
            fix="truetune export RUN --merge -o DIR, or --to gguf -o DIR",
            code="export-what",
        )
    what = to or "merged"
    if what not in _KINDS or (merge and what != "merged"):
        meant = near(what, _KINDS)
        raise UsageError(
            f"--to {what!r} is no export" if what not in _KINDS else "--merge and --to contradict",
            where="--to",
            why=f"did you mean {meant[0]}?" if meant and what not in _KINDS else "",
            fix=_INSTEAD.get(what, f"one of {', '.join(_KINDS)}"),
            code="export-what",
        )
    if onto not in ("auto", "original", "dequantised"):
        raise UsageError(
            f"unknown weights {onto!r}",
            fix="--onto auto, original or dequantised",
            code="export-onto",
        )
    if what in ("gguf", "ollama") and (no_verify or dtype != "auto"):
        raise UsageError(
            ("--no-verify" if no_verify else "--dtype") + " has no effect on a GGUF file",
            why="it is always compared with the model"
            if no_verify
            else "--quant says how its weights are held",
            fix="leave it out",
            code="export-what",
        )
    if go_template and what != "ollama":
        raise UsageError(
            "--go-template has no effect without --to ollama", fix="leave it out",
            code="export-what",
        )  # fmt: skip
    if what in ("gguf", "ollama"):
        require_llama_cpp(f"--to {what}")
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
            "why": list(made.reasons),
            "passed": verdict.passed if verdict else None,
            "serve": made.line,
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    if made.merged is None:
        screen.line(f"the adapter as it is: {output}")
    else:
        screen.line(f"merged, because {'; '.join(made.reasons)}: {output}")
        from truetune.cli.result_screen import show_checks

        show_checks(screen, made.merged.verdict)
    screen.pairs(
        [("serve", made.line), ("hold", f"truetune diagnose {shlex.quote(run)} --url URL")]
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
    screen.line(f"{made.path} ({made.quant}, {gib(made.num_bytes)}), proved with llama.cpp:")
    apart = proof.apart
    rows = [
        ("ids", f"equal on {proof.texts.texts} texts in twenty scripts, digits, code, spaces"),
        ("prompts", f"equal on {proof.prompts} conversations, as text and as ids"),
        ("stops", f"it ends replies on all {len(proof.stops)} stop tokens"),
    ]
    if apart:
        rows.append(
            (
                "numbers",
                f"{apart.mean:.2g} nats a token from transformers in float32, "
                f"{100 * apart.greedy:.1f} % of the likeliest tokens equal at "
                f"{apart.positions} positions",
            )
        )
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
        "as Go text in the Modelfile, rendered by Go and tokenized by llama.cpp: the prompts are "
        "those of training"
        if go_template
        else "the file's own, which Ollama 0.30 or newer renders as llama.cpp does; it is too far "
        "from those that Ollama knows for one of them to take its place"
    )
    name = shlex.quote(made.path.parent.name.lower())
    screen.pairs([("template", template), ("Modelfile", str(file))])
    folder = shlex.quote(str(made.path.parent))
    screen.pairs(
        [
            ("create", f"ollama create {name} -f {folder}/{MODELFILE}"),
            ("look", f"ollama show {name} --template"),
            ("chat", f"ollama run {name}"),
        ]
    )
