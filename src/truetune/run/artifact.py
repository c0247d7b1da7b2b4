"""The artifact of a run: saved, read back, and recorded for the fresh process that verifies it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from truetune.errors import SaveError
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.model.new_tokens import RowsBefore, rows_now, rows_report
from truetune.model.readback import round_as_saved
from truetune.model.save import SaveReport, save_model
from truetune.run.prepare import Prepared
from truetune.run_dir import RunDir, flush_folder, write_json
from truetune.verification.new_tokens import written_findings, written_tokens
from truetune.verification.record import measure_rows, take_record, write_rows


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
    # All weights go back to the type that the model came in, so that it serves as before; the
    # rounding is measured and reported. An adapter stays float32.
    dtype = None if loaded.is_adapter else prepared.model.dtype
    fresh = folder.with_name(f".{name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    rows = prepared.verify_rows
    before = None if dtype is None else measure_rows(loaded, rows)
    report = save_model(loaded, prepared.contract, fresh, dtype=dtype)
    rounded = report.cast_error is not None
    if rounded:
        round_as_saved(loaded, report.dtype)
    record = take_record(
        loaded,
        prepared.contract,
        rows,
        run,
        report.folder,
        name,
        files={file.name: file.sha256 for file in report.files},
        dtype=report.dtype,
        before_rounding=before if rounded else None,
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
