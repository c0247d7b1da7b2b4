"""The artifact of a run: saved, read back, and recorded for the fresh process that verifies it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from truetune.compare import Agreement, at_clear_leads
from truetune.errors import SaveError, is_out_of_memory
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.model.new_tokens import RowsBefore, rows_now, rows_report
from truetune.model.placement import parse_dtype
from truetune.model.readback import round_as_saved
from truetune.model.save import SaveReport, save_model
from truetune.run.prepare import Prepared
from truetune.run_dir import RunDir, flush_folder, write_json
from truetune.system.lazy import torch
from truetune.verification.new_tokens import written_findings, written_tokens
from truetune.verification.record import measure_rows, take_record, write_rows
from truetune.verification.verdict import judge_rounding


def save_artifact(
    run: RunDir,
    prepared: Prepared,
    loaded: LoadedModel,
    rows_before: RowsBefore | None,
    tell: Callable[[Finding], None],
) -> SaveReport:
    """Write adapter/ or model/, and the record with which a fresh process will compare it.

    Args:
        rows_before: the rows of new tokens at the start, if there are some.
        tell: is called with each finding.

    Raises:
        SaveError: it cannot be written, or rows of other tokens were trained.
    """
    name = "adapter" if loaded.is_adapter else "model"
    folder = run.file(name)
    if rows_before is not None:
        _prove_rows(run, prepared, loaded, rows_before, tell)
    fresh = folder.with_name(f".{name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    rows = prepared.verify_rows
    report, rounding = _saved(prepared, loaded, fresh, tell)
    record = take_record(
        loaded,
        prepared.contract,
        rows,
        run,
        report.folder,
        name,
        files={file.name: file.sha256 for file in report.files},
        dtype=report.dtype,
        rounding=rounding,
        context=prepared.model.context_length,
    )
    write_rows(run, rows, record)
    _replace_folder(folder, fresh)
    if report.cast_error:
        tell(
            Finding(
                "weights-rounded",
                "note",
                f"the weights were trained in float32 and saved in {report.dtype}, their original "
                f"dtype: the largest rounding error is {report.cast_error:.2g}",
            )
        )
    for finding in report.findings:
        tell(finding)
    return replace(report, folder=folder)


def _saved(
    prepared: Prepared, loaded: LoadedModel, folder: Path, tell: Callable[[Finding], None]
) -> tuple[SaveReport, Agreement | None]:
    """Save, and leave the weights in memory as they were saved.

    All weights go back to the type that the model came in, so that it is served as before; the
    rounding is measured and reported. Where it would undo part of the training, they are saved as
    they were trained. An adapter stays float32.

    Returns:
        the report, and what the rounding changed; None if nothing was rounded.
    """
    dtype = None if loaded.is_adapter else prepared.model.dtype
    rows = prepared.verify_rows
    before = None if dtype is None else measure_rows(loaded, rows)
    report = save_model(loaded, prepared.contract, folder, dtype=dtype)
    if before is None or report.cast_error is None:
        return report, None
    trained = _trained_weights(loaded, report.dtype)
    round_as_saved(loaded, report.dtype)
    rounding = at_clear_leads(before, measure_rows(loaded, rows))
    check = judge_rounding(rounding, report.dtype)
    if check.state == "passed" or trained is None:
        return report, rounding
    state = loaded.model.state_dict()
    with torch.no_grad():
        for name, value in trained.items():
            state[name].copy_(value)
    del trained
    shutil.rmtree(folder)
    whole = save_model(loaded, prepared.contract, folder)
    tell(
        Finding(
            "saved-unrounded",
            "warning",
            f"the weights are saved in {whole.dtype}, in which they were trained, and not in the "
            f"model's {report.dtype}, in which the loss on the rows would go from "
            f"{rounding.reference_loss:.4f} to {rounding.loss:.4f}",
            why=check.numbers["why"],
            fix=f"serve it in {whole.dtype}, because a server that rounds the weights undoes it as "
            "well; or train more steps, or with a higher learning rate",
        )
    )
    return whole, None


def _trained_weights(loaded: LoadedModel, dtype: str) -> dict[str, torch.Tensor] | None:
    """Copies of the weights that are about to be rounded, where the gradients were; None if there
    is no room for them."""
    cast = parse_dtype(dtype)
    # A tied matrix has two names.
    each = {value.data_ptr(): (name, value) for name, value in loaded.model.state_dict().items()}
    try:
        return {
            name: value.clone()
            for name, value in each.values()
            if value.is_floating_point() and value.dtype != cast
        }
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def rows_of_new_tokens(
    prepared: Prepared, loaded: LoadedModel, *, at_start: bool = False
) -> RowsBefore:
    """The rows of new tokens, and what all others hash to."""
    tokens = prepared.new_tokens
    return rows_now(loaded.model, tokens, is_adapter=loaded.is_adapter, at_start=at_start)


def _prove_rows(
    run: RunDir,
    prepared: Prepared,
    loaded: LoadedModel,
    before: RowsBefore,
    tell: Callable[[Finding], None],
) -> None:
    """What training did to the rows of new tokens and to all others, and whether the model writes
    the tokens."""
    tokens = prepared.new_tokens
    report, findings = rows_report(before, rows_of_new_tokens(prepared, loaded), tokens)
    counts = written_tokens(loaded, prepared.contract, prepared.verify_rows, tokens)
    findings += written_findings(counts)
    report["written"] = [vars(count) for count in counts]
    write_json(run.file("new_tokens.json"), report)
    for finding in findings:
        tell(finding)
    if any(finding.level == "error" for finding in findings):
        raise SaveError(
            "embeddings of other tokens were trained; the artifact was not written",
            where=str(run.file("new_tokens.json")),
            fix="please report this: it is a bug in truetune",
            code="other-rows-moved",
        )


def _replace_folder(folder: Path, fresh: Path) -> None:
    """Give a folder's name to another one; what had it (of a run that died before its manifest)
    goes last."""
    old = folder.with_name(f".{folder.name}.partial-1")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
