"""A run, a model or an adapter as one plain model folder: merged where it is an adapter, else
copied, and compared with what its run saved.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.errors import CheckFailed, SaveError
from truetune.findings import Finding, phrase
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.model.merge import Onto
from truetune.model.save import save_model
from truetune.model.source import locate
from truetune.run.pipeline import ExportResult, export
from truetune.run_dir import named_at_last, opened, sha256
from truetune.verification.artifact import check_saved, run_of
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
    with named_at_last(Path(output)) as unnamed:
        verdict = require_saved(source, listener) if check else None
        if dtype is not None:
            listener.stage(f"casting the weights to {dtype}")
            loaded = load_model(folder, dtype="float32", device=device, purpose="inference")
            save_model(loaded, PromptContract.load(loaded.tokenizer), unnamed, dtype=dtype)
        else:
            listener.stage("copying")
            for finding in _copy(files.folder, unnamed):
                listener.finding(finding)
        number = sum(path.is_file() for path in unnamed.rglob("*"))
    return WholeExport(Path(output), dtype or "", number, verdict)


def require_saved(source: str, listener: Listener) -> Verdict | None:
    """The files of a run's model or adapter as the run saved them; None without a run.

    Raises:
        CheckFailed: they are not.
    """
    if run_of(source) is None:
        return None
    listener.stage("comparing the files with those that the run saved")
    verdict = check_saved(source)
    if verdict and not verdict.passed:
        raise CheckFailed("the model is not what its run saved", verdict.findings())
    return verdict


# Programs run these; a folder to serve needs none.
_CODE = (".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".cmd", ".exe")
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")


def _left_out(path: Path) -> str:
    """Why a file is not copied; "" if it is."""
    if not path.is_file():
        return "a pipe, a device or a link to one is not a file of a model"
    suffix = path.suffix.lower()
    if suffix in _CODE:
        return "truetune does not run code that comes with weights, and does not pass it on"
    if suffix in _PICKLE:
        return _RUNS
    if suffix in (".safetensors", ".gguf"):
        return ""
    with path.open("rb") as file:
        start = file.read(4)
    # A pickle of protocol 2 or newer, and the archive that torch writes.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return _RUNS if pickled or start == b"PK\3\4" else ""


_RUNS = "a pickle can run code when it is loaded"


def _copy(source: Path, folder: Path) -> list[Finding]:
    """Copy a model's files, and read them back; what is not copied is named."""
    left: dict[str, list[str]] = {}

    def ignored(place: str, names: list[str]) -> set[str]:
        skipped = set()
        for name in names:
            path = Path(place) / name
            if name.startswith("."):
                skipped.add(name)
            elif not path.is_dir() and (why := _left_out(path)):
                skipped.add(name)
                left.setdefault(why, []).append(path.relative_to(source).as_posix())
        return skipped

    try:
        # A Hub cache holds links.
        shutil.copytree(source, folder, ignore=ignored)
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
    return [
        Finding(
            "export-left-out",
            # Trainers leave a training_args.bin beside most models.
            "note" if why == _RUNS else "warning",
            f"not copied into the export: {phrase(sorted(names), 4)}",
            str(source),
            len(names),
            why=why,
            fix="nothing to do: servers need only the weights in safetensors, the config and the "
            "tokenizer",
        )
        for why, names in left.items()
    ]
