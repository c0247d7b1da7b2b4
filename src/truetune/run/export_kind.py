"""What can be exported, and which options have an effect on it: asked before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from truetune.errors import OutputExists, UsageError
from truetune.exporting.quantised import QUANTS, require_quantiser
from truetune.findings import near
from truetune.model.served_adapter import SERVERS
from truetune.servers.llama_cpp import require_llama_cpp

_KINDS = ("merged", "gguf", "ollama", "mlx", *SERVERS)
# Kinds that hold weights in a type of --quant, and the one they take by themselves; "" for plain
# weights.
QUANT = {"gguf": "f16", "ollama": "f16", "mlx": "bf16", "merged": "", **dict.fromkeys(SERVERS, "")}
# Kinds whose quantised weights transformers opens.
_FOLDERS = ("merged", *SERVERS)
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
    quant: str | None,
    source: str,
    output: str,
    data: str | None = None,
) -> tuple[str, str]:
    """The kind of export that was asked for, and the type of its weights where it has one.

    Args:
        source, output: of the export; `output` must not exist.

    Raises:
        UsageError: two kinds, an option that has no effect on it, or a GGUF file as source.
        OutputExists: the output is there already.
    """
    what = to or "merged"
    # llama.cpp writes its types in capitals.
    quant = quant.lower() if quant is not None else None
    if not output:
        raise UsageError(
            "the output folder has no name", where="--output", fix="-o DIR", code="export-folder"
        )
    if what not in _KINDS or (merge and what != "merged"):
        meant = near(what, _KINDS)
        raise UsageError(
            f"--to {what!r} is not an export format"
            if what not in _KINDS
            else "--merge and --to contradict each other",
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
    for option, given, kinds in (
        ("--no-verify", no_verify, ("merged", *SERVERS)),
        ("--dtype", dtype != "auto", ("merged", *SERVERS)),
        ("--data", data is not None, _FOLDERS),
        ("--go-template", go_template, ("ollama",)),
        ("--adapter", adapter, ("gguf",)),
    ):
        if given and what not in kinds:
            raise UsageError(
                f"{option} has no effect with --to {what}",
                why=_NO_EFFECT.get(option, ""),
                fix=f"omit it, or use {' or '.join(f'--to {kind}' for kind in kinds)}",
                code="export-what",
            )
    quantised = what in _FOLDERS and quant is not None
    if quantised and no_verify:
        raise UsageError(
            "--no-verify has no effect with --quant",
            why=_NO_EFFECT["--no-verify"],
            fix="omit it",
            code="export-what",
        )
    if data is not None and not (quant in QUANTS and QUANTS[quant].calibrated):
        fits = " or ".join(name for name, one in QUANTS.items() if one.calibrated)
        raise UsageError(
            "--data has no effect without a type that is calibrated on rows",
            fix=f"omit it, or use --quant {fits}",
            code="export-what",
        )
    if Path(source).is_file() and source.lower().endswith(".gguf"):
        raise UsageError(
            f"{source} is a GGUF file, which cannot be exported again",
            why="it is an export already: weights that its type rounded cannot be restored",
            fix="export the run or the model that it was made from; truetune serve and truetune "
            "diagnose take the file",
            code="export-source",
        )
    if os.path.lexists(output):
        raise OutputExists(
            f"{output} exists already",
            fix="choose another folder with --output",
            code="output-exists",
        )
    if what in ("gguf", "ollama"):
        require_llama_cpp(f"--to {what}")
    if quantised and quant is not None:
        require_quantiser(quant)
    return what, quant or QUANT[what]


_NO_EFFECT = {
    "--no-verify": "it is always compared with the model",
    "--dtype": "--quant sets the type of its weights",
}
