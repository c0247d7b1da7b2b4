"""Choose the export format, and refuse invalid requests before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.errors import ModelError, OutputExists, UsageError
from truetune.exporting.quantised import QUANTS, require_quantiser
from truetune.findings import near
from truetune.listener import Listener
from truetune.model.served_adapter import SERVERS
from truetune.model.source import ModelFiles, locate, read_json
from truetune.run_dir import opened
from truetune.servers.llama_cpp import require_llama_cpp

if TYPE_CHECKING:
    from truetune.exporting.gguf import WrittenGGUF
    from truetune.exporting.mlx import WrittenMLX
    from truetune.run.export_quantised import QuantisedExport
    from truetune.run.export_served import ServedExport
    from truetune.run.export_whole import WholeExport
    from truetune.run.pipeline import ExportResult

    Export = ExportResult | WholeExport | WrittenGGUF | WrittenMLX | ServedExport | QuantisedExport

_KINDS = ("merged", "gguf", "ollama", "mlx", *SERVERS)
# Kinds that hold weights in a type of --quant, and the one they take by themselves; "" for plain
# weights.
QUANT = {"gguf": "f16", "ollama": "f16", "mlx": "bf16", "merged": "", **dict.fromkeys(SERVERS, "")}
# Kinds whose quantised weights transformers opens.
_FOLDERS = ("merged", *SERVERS)
# What is asked for by another name.
_INSTEAD = {
    "tgi": "use --to merged, and then text-generation-launcher --model-id DIR",
    "lmstudio": "use --to gguf: LM Studio loads the file",
    "llama.cpp": "use --to gguf",
    "transformers": "use --to merged, and then transformers serve DIR",
}


def export_as(
    to: str | None,
    *,
    source: str,
    output: str,
    merge: bool = False,
    quant: str | None,
    adapter: bool,
    go_template: bool,
    base: str | None,
    onto: str,
    dtype: str,
    device: str,
    verify: bool,
    data: str | None,
    listener: Listener | None,
) -> Export:
    """Write the requested export.

    Args:
        merge: another word for `to` merged.
        verify: compare a merged model with its adapter in a fresh process.

    Raises:
        TruetuneError: as `require_export`; or it cannot be written, or differs from the model.
            Nothing is left behind.
    """
    what, held = require_export(
        to,
        merge=merge,
        onto=onto,
        no_verify=not verify,
        dtype=dtype,
        go_template=go_template,
        adapter=adapter,
        quant=quant,
        source=source,
        output=output,
        data=data,
    )
    from truetune.contract.frame import Frame
    from truetune.model.whole import require_whole_folder

    listener = listener or Listener()
    listener.stage("opening the model's files")
    folder = opened(source)
    if held:
        _refuse_quantised(locate(folder, weights=False))
    # A whole model, or an adapter that is small: their weights are needed in any case.
    files = locate(folder, weights=True)
    whole = require_whole_folder(folder, base=base)
    if whole is not None:
        for finding in whole.findings:
            listener.finding(finding)
        # A template that cannot be rendered would end or hang whatever serves the model.
        broken = Frame.probe(whole.tokenizer).broken
        if broken is not None:
            raise broken
    # A model that is copied is compared where it is copied.
    if verify and (files.is_adapter or held or what not in _FOLDERS):
        from truetune.run.export_whole import require_saved

        require_saved(source, listener)
    shared: dict[str, Any] = {"base": base, "device": device, "listener": listener}
    if what in ("gguf", "ollama"):
        from truetune.run.export_gguf import export_adapter, export_gguf

        if adapter:
            return export_adapter(source, output, quant=held, **shared)
        shared |= {"onto": onto, "ollama": what == "ollama", "go_template": go_template}
        return export_gguf(source, output, quant=held, **shared)
    shared["onto"] = onto
    if what == "mlx":
        from truetune.run.export_mlx import export_mlx

        return export_mlx(source, output, quant=held, **shared)
    shared["dtype"] = None if dtype == "auto" else dtype
    if held:
        from truetune.run.export_quantised import export_quantised

        server = "vllm" if what == "merged" else what
        return export_quantised(source, output, quant=held, server=server, data=data, **shared)
    shared["check"] = verify
    if what == "merged":
        from truetune.run.export_whole import export_plain

        return export_plain(source, output, **shared)
    from truetune.run.export_served import export_served

    return export_served(source, output, server=what, **shared)


def _refuse_quantised(files: ModelFiles) -> None:
    """Raise where weights that are rounded already would be written in another type.

    Raises:
        ModelError: naming the method they have.
    """
    config = files.folder / "config.json"
    if files.is_adapter or not config.is_file():
        return
    stored = read_json(config).get("quantization_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        raise ModelError(
            f"the weights are quantised already{f' ({method})' if method else ''}",
            where=str(config),
            why="weights that were rounded cannot be restored, and rounding them again harms them "
            "more",
            fix="export the run, or the unquantised model, that the folder was made from",
            code="model-quantised",
        )


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
    """The kind of export that was asked for, and the type of its weights if it has one.

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
            "the output folder has no name",
            where="--output",
            fix="choose a folder with -o DIR",
            code="export-folder",
        )
    if what not in _KINDS or (merge and what != "merged"):
        meant = near(what, _KINDS)
        raise UsageError(
            f"{what!r} is not an export format"
            if what not in _KINDS
            else "--merge and --to contradict each other",
            where="--to",
            why=f"did you mean {meant[0]}?" if meant and what not in _KINDS else "",
            fix=_INSTEAD.get(what, f"use one of {', '.join(_KINDS)}"),
            code="export-what",
        )
    if onto not in ("auto", "original", "dequantised"):
        raise UsageError(
            f"unknown weights {onto!r}",
            fix="use --onto auto, original or dequantised",
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
            "--data has no effect without a type that needs calibration rows",
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
            f"{output} already exists",
            fix="choose another folder with --output",
            code="output-exists",
        )
    if what in ("gguf", "ollama"):
        require_llama_cpp(f"--to {what}")
    if quantised and quant is not None:
        require_quantiser(quant)
    held = quant or QUANT[what]
    if go_template:
        from truetune.exporting.ollama import require_go

        require_go()
    if what == "mlx":
        from truetune.exporting.mlx import require_mlx

        require_mlx(held)
    return what, held


_NO_EFFECT = {
    "--no-verify": "the export is always compared with the model",
    "--dtype": "--quant sets the type of its weights",
}
