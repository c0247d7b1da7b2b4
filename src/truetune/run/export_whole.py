"""A run, a model or an adapter as one plain model folder: merged where it is an adapter, else
copied, and compared with what its run saved.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.errors import CheckFailed, SaveError
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.model.merge import Onto
from truetune.model.save import save_model
from truetune.model.source import locate
from truetune.run.pipeline import ExportResult, export
from truetune.run_dir import named_at_last, opened, sha256
from truetune.verification.artifact import run_of
from truetune.verification.files import check_files
from truetune.verification.verdict import Verdict


@dataclass(frozen=True)
class WholeExport:
    """A whole model under another name.

    Attributes:
        folder: the exported model.
        dtype: that the weights were cast to; "" if every file is a copy.
        files: that were written.
        verdict: whether the files are those that the run saved; None without a run, or unasked.
    """

    folder: Path
    dtype: str
    files: int
    verdict: Verdict | None


def export_plain(
    source: str,
    output: Path | str,
    *,
    base: str | None = None,
    onto: Onto = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    check: bool = True,
    listener: Listener | None = None,
) -> ExportResult | WholeExport:
    """Write one plain model folder.

    Args:
        source: a run, or a model or adapter folder.
        output: must not exist.
        base, onto, device: of an adapter; see `pipeline.export`.
        dtype: of the written weights; None keeps the model's own.
        check: compare.

    Raises:
        TruetuneError: it cannot be written, or is not what was trained; nothing is left behind.
    """
    listener = listener or Listener()
    folder = opened(source)
    files = locate(folder, weights=True)
    if files.is_adapter:
        return export(
            source,
            output,
            base=base,
            onto=onto,
            dtype=dtype,
            device=device,
            check=check,
            listener=listener,
        )
    run = run_of(source) if check else None
    with named_at_last(Path(output)) as unnamed:
        verdict = None
        if run is not None:
            listener.stage("comparing the files with those that the run saved")
            verdict = Verdict(folder, (check_files(run, folder),))
            if not verdict.passed:
                raise CheckFailed("the model is not what its run saved", verdict.findings())
        if dtype is not None:
            listener.stage(f"casting the weights to {dtype}")
            loaded = load_model(folder, dtype="float32", device=device, purpose="inference")
            save_model(loaded, PromptContract.load(loaded.tokenizer), unnamed, dtype=dtype)
        else:
            listener.stage("copying")
            _copy(files.folder, unnamed)
        number = sum(path.is_file() for path in unnamed.rglob("*"))
    return WholeExport(Path(output), dtype or "", number, verdict)


def _copy(source: Path, folder: Path) -> None:
    """Copy a model's files, and read them back."""
    try:
        # A Hub cache holds links.
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*"))
        copied = [path for path in folder.rglob("*") if path.is_file()]
    except (OSError, shutil.Error) as error:
        raise SaveError(
            f"the model cannot be copied: {error}",
            where=str(folder),
            fix="free some space, or choose another folder with --output",
        ) from error
    for path in copied:
        if sha256(path) != sha256(source / path.relative_to(folder)):
            raise SaveError(
                f"{path.name} does not read back as it was written",
                where=str(folder),
                fix="check the disk, or choose another folder with --output",
            )
