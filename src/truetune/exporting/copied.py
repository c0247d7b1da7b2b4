"""Files of a model as they are, in another folder: no code, no pickle, nothing from outside.

input   the files of a whole model or an adapter; a folder
does    copies regular files and reads them back; removes references to code from the copies
output  notes that name what was not copied
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from truetune.errors import SaveError
from truetune.findings import Finding, phrase
from truetune.model.save import forget_code
from truetune.model.source import ModelFiles, first_line, leads_out
from truetune.model.weights import INDEX, WEIGHTS, weight_files
from truetune.run_dir import sha256

# Programs run these; a folder to serve needs none.
_CODE = (".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".cmd", ".exe")
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_RUNS = "a pickle can run code when it is loaded"


def copy_files(files: ModelFiles, folder: Path, patterns: Sequence[str] = ("*",)) -> list[Finding]:
    """Copy a model's files into a folder, and read them back.

    Hidden files stay behind without a word. References to code (auto_map) are removed from the
    copies, since the code that they name stays behind.

    Args:
        folder: made where it is not there.
        patterns: of the paths in the model's folder that are copied; `*` matches a slash.

    Returns:
        What was not copied, by reason, and which references were removed.

    Raises:
        ModelError: there are no weights.
        SaveError: the disk is full, or does not return what was written.
    """
    source = files.folder
    weights = set(weight_files(files))
    if source / WEIGHTS not in weights:
        weights.add(source / INDEX)
    left: dict[str, list[str]] = {}
    for path in _inside(source):
        name = path.relative_to(source).as_posix()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        # Of weights that lie elsewhere a note was given when they were opened.
        if why := _left_out(path, source, is_weights=path in weights):
            left.setdefault(why, []).append(name)
        else:
            _copy(path, folder / name)
    return [*(_finding(source, why, names) for why, names in left.items()), *forget_code(folder)]


def _inside(source: Path) -> Iterator[Path]:
    """All that is no folder, a link to one included."""
    for place, folders, names in os.walk(source):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in links)
        for name in sorted([*names, *links]):
            if not name.startswith("."):
                yield Path(place) / name


def _left_out(path: Path, source: Path, *, is_weights: bool) -> str:
    """Why a file is not copied; "" where it is."""
    if path.is_symlink() and not is_weights and leads_out(path, source):
        return "it is a link that leads out of the model's folder"
    if path.is_dir():
        return "it is a link to a folder"
    if not path.is_file():
        return "a pipe, a device or a link to one is not a file of a model"
    suffixes = {path.suffix.lower(), Path(os.path.realpath(path)).suffix.lower()}
    if suffixes & set(_CODE):
        return "truetune does not run code that comes with weights, and does not pass it on"
    if suffixes & set(_PICKLE):
        return _RUNS
    if path.suffix.lower() in (".safetensors", ".gguf"):
        return ""
    with path.open("rb") as file:
        start = file.read(4)
    # A pickle of protocol 2 or newer, and the archive that torch writes.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return _RUNS if pickled or start == b"PK\3\4" else ""


def _copy(path: Path, to: Path) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
        same = sha256(to) == sha256(path)
    except OSError as error:
        raise SaveError(
            f"{path.name} cannot be copied: {error.strerror or first_line(error)}",
            where=str(to),
            fix="free some space, or choose another folder with --output",
        ) from error
    if not same:
        raise SaveError(
            f"{path.name} does not read back as it was written",
            where=str(to),
            fix="check the disk, or choose another folder with --output",
        )


def _finding(source: Path, why: str, names: list[str]) -> Finding:
    return Finding(
        "export-left-out",
        # Trainers leave a training_args.bin beside most models.
        "note" if why == _RUNS else "warning",
        f"not copied into the export: {phrase(sorted(names), 4)}",
        str(source),
        len(names),
        why=why,
        fix="put a copy in its place if it belongs to the model"
        if "link" in why
        else "nothing to do: servers need only the weights in safetensors, the config and the "
        "tokenizer",
    )
