"""The run directory: the only interface between training and everything after it.

    RUN/  recipe.yaml  contract.json  data.json  env.json
          metrics.jsonl  findings.jsonl  samples.jsonl  checkpoints/  adapter/ or model/
          verify_rows.jsonl  verify.json  new_tokens.json (where tokens were added)
          keep_text.json (ids whose loss is watched)  rewound.json (where the run went back)
          unverified.json (while a finished artifact waits for its verification)
          report.html     (made from the others, at the end and whenever it is asked for)
          manifest.json   (written last: its absence means unfinished)
          run.lock        (while a process writes; no part of the run)

Every file is written to a temporary name and renamed; the .jsonl files are appended line by line
and cut back to the checkpoint when a run resumes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from truetune.errors import OutputExists, SaveError, UsageError
from truetune.system.lock import Busy, Owner, hold, require_free, require_held

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
CONTRACT = "contract.json"
DATA = "data.json"
VERDICT = "verify.json"
REPORT = "report.html"
UNVERIFIED = "unverified.json"
KEEP_TEXT = "keep_text.json"
REWOUND = "rewound.json"
CHECKPOINTS = "checkpoints"
STEP = "step-"
LOCK = "run.lock"
# What a run may contain besides what a manifest lists; a file of another name is a stranger's.
_OWN = frozenset(
    """recipe.yaml contract.json data.json env.json metrics.jsonl findings.jsonl samples.jsonl
    checkpoints adapter model trackers manifest.json non_finite_batch.json new_tokens.json
    verify_rows.jsonl verify.json unverified.json keep_text.json rewound.json report.html
    """.split()  # noqa: SIM905
)
# What a killed process leaves: a file or folder that never got its name.
_UNNAMED = re.compile(r"\.(.+?)(\.partial)?\.(tmp|partial(-\d+)?)")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename.

    Raises:
        SaveError: the disk is full or the folder cannot be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(
            f"cannot write {path.name}: {error.strerror}",
            where=str(path),
            fix="free some space, or choose another folder with --output",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, with JSON that a person can read."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def parsed(text: str) -> Any:
    """A value of JSON in a file of a run, which a stranger may have written.

    Raises:
        ValueError: it is no JSON, is nested without end, or holds a number beyond the range of a
            float, with which no page and no check can compute. NaN and Infinity, which Python
            writes, are read: a loss may be either.
    """
    try:
        return json.loads(text, parse_int=_whole, parse_float=_fraction)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(text: str) -> int:
    # Transformers writes a tokenizer without a limit as 10 ** 30: 64 bits are not enough.
    if len(text) > 300:
        raise ValueError(f"the number {text[:20]}... is beyond the range of a float")
    return int(text)


def _fraction(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:20]} is beyond the range of a float")
    return value


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """As `write_json`, with a sha256 of the facts among them."""
    write_json(path, {**facts, "sha256": _digest(facts)})


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """The facts of a sealed file, and whether they are as they were written.

    Raises:
        OSError, ValueError, KeyError, AttributeError, TypeError: it holds no such thing.
    """
    facts = parsed(path.read_text(encoding="utf-8"))
    own = facts.pop("sha256")
    return facts, own == _digest(facts)


def _digest(facts: Mapping[str, Any]) -> str:
    # As it will be read: a tuple comes back as a list.
    text = json.dumps(json.loads(json.dumps(facts, default=str)), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> str:
    """Force a file that a library wrote to the disk, with the mode of any other new file
    (safetensors lets nobody else read what it writes).

    Returns:
        Its sha256.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def flush_folder(folder: Path) -> None:
    """Force a folder's names to the disk: until then a rename may come undone."""
    # Windows cannot open folders; there a rename is durable by itself.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunDir:
    """A run directory on disk.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def writing(self, require: Callable[[], None]) -> Iterator[Owner | None]:
        """Lock the run for writing by this process; other processes may still read it.

        Args:
            require: refuses a folder that may not be written; asked before anything is changed,
                and again when nobody else can change it any more.

        Yields:
            The process that was killed while it wrote the run, if there was one.

        Raises:
            Busy: another process writes it; nothing was changed.
            UsageError: what `require` raises, or the folder cannot be written.
        """
        require_free(self.path / LOCK)
        require()
        with _alone_in(self.path, LOCK) as dead:
            require()
            yield dead

    def require_empty(self) -> None:
        """Refuse a folder that holds anything.

        Raises:
            OutputExists: it is a file, or not empty.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputExists(f"{self.path} is a file", fix="choose a folder with --output")
        if there := self._entries():
            raise OutputExists(
                "the output folder is not empty: " + ", ".join(path.name for path in there[:5]),
                where=str(self.path),
                fix="choose an empty or new folder with --output",
                code="output-exists",
            )

    def require_room(self, *, overwrite: bool = False) -> None:
        """Refuse a folder in which something would be lost; nothing is written or removed yet.

        Raises:
            OutputExists: it holds a finished run, an unfinished one or a stranger's files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputExists(f"{self.path} is a file", fix="choose a folder with --output")
        if self._entries() and not self._never_started():
            self._refuse(overwrite)

    def require_unfinished(self) -> None:
        """Refuse a run that is finished.

        Raises:
            UsageError: it is finished.
        """
        if self.finished:
            raise UsageError(
                "the run is finished: there is nothing to resume",
                where=str(self.path),
                fix=f"use the model with truetune chat {shlex.quote(str(self.path))}",
                code="run-finished",
            )

    def make(self, *, overwrite: bool = False) -> None:
        """Make the folder, empty.

        Raises:
            OutputExists: as `require_room`.
            SaveError: it cannot be made.
        """
        self.require_room(overwrite=overwrite)
        if self.path.is_dir():
            self._remove_own()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(
                f"cannot create the output folder: {error}", where=str(self.path)
            ) from error

    def discard(self) -> None:
        """Remove a run that never started."""
        self._remove_own()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run directory.

        Raises:
            UsageError: there is none.
        """
        run = cls(path)
        if not run.looks_like_one():
            raise UsageError(
                f"{path} is not a run directory",
                why="a run contains recipe.yaml and contract.json",
                fix="pass the folder that `truetune train -o` wrote",
                code="no-run",
            )
        return run

    def looks_like_one(self) -> bool:
        return (self.path / RECIPE).is_file() and (self.path / CONTRACT).is_file()

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def file(self, name: str) -> Path:
        return self.path / name

    def artifact(self) -> Path | None:
        """adapter/ or model/, None while there is none."""
        for name in ("adapter", "model"):
            if (self.path / name).is_dir():
                return self.path / name
        return None

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folder = self.path / CHECKPOINTS
        return sorted(folder.glob(f"{STEP}*")) if folder.is_dir() else []

    def checkpoint_path(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{STEP}{step:08d}"

    def require_mine(self) -> None:
        """Stop this process if it no longer holds the run's lock because somebody moved the lock
        file and another process took over the run.

        Raises:
            SaveError: `lock-lost`.
        """
        require_held(self.path / LOCK)

    def append(self, name: str, value: Mapping[str, Any]) -> None:
        """Add one line to a .jsonl file.

        Raises:
            SaveError: the disk is full, or another process has taken over the run.
        """
        self.require_mine()
        line = json.dumps(value, ensure_ascii=False, default=str) + "\n"
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise SaveError(
                f"cannot write {name}: {error.strerror}", where=str(self.path / name)
            ) from error

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The values of a .jsonl file; a last line that was cut off by a crash is left out."""
        path = self.path / name
        if not path.is_file():
            return
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield parsed(line)

    def replace_lines(self, name: str, values: Iterable[Mapping[str, Any]]) -> None:
        """Write a .jsonl file anew."""
        text = "".join(json.dumps(v, ensure_ascii=False, default=str) + "\n" for v in values)
        write_text(self.path / name, text)

    def rewind(self, step: int) -> None:
        """Cut the run back to a step, so that a resumed run writes no step twice: lines of later
        steps, checkpoints of later steps (they are damaged, or the run would have gone on from
        them) and what a killed process left half-written."""
        (self.path / UNVERIFIED).unlink(missing_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            self.replace_lines(name, [v for v in self.lines(name) if v["step"] <= step])
        for folder in (self.path, self.path / CHECKPOINTS):
            for left in _unnamed(folder):
                _remove(left)
        for checkpoint in self.checkpoints():
            if checkpoint > self.checkpoint_path(step):
                _remove(checkpoint)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest: every file of the run with its size and sha256. Last of all.

        Raises:
            SaveError: as `append`.
        """
        self.require_mine()
        left_out = (MANIFEST, LOCK, UNVERIFIED)
        files = {
            path.relative_to(self.path).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.relative_to(self.path).as_posix() not in left_out
        }
        (self.path / UNVERIFIED).unlink(missing_ok=True)
        write_json(self.path / MANIFEST, {**facts, "files": files})

    def _entries(self) -> list[Path]:
        """What is in the folder, but for its lock."""
        there = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [path for path in there if not path.name.startswith(LOCK)]

    def _never_started(self) -> bool:
        """Whether a start, or a removal, was killed when nothing but the contract was there."""
        names = {path.name for path in self._entries()}
        if not names <= {CONTRACT, f".{CONTRACT}.tmp", f".{RECIPE}.tmp"}:
            return False
        try:
            return CONTRACT not in names or "fingerprint" in parsed(
                self.file(CONTRACT).read_text(encoding="utf-8")
            )
        except (OSError, ValueError, TypeError):
            return False

    def _refuse(self, overwrite: bool) -> None:
        ours = _OWN | {path.name for path in _unnamed(self.path)}
        there = [path.name for path in self._entries()]
        strangers = [name for name in there if name not in ours]
        if strangers or not self.looks_like_one():
            raise OutputExists(
                "the output folder contains files that truetune did not write: "
                + ", ".join((strangers or there)[:5]),
                where=str(self.path),
                fix="choose an empty or new folder with --output",
                code="output-not-ours",
            )
        if overwrite:
            self._refuse_unlisted()
        elif self.finished:
            raise OutputExists(
                "the output folder contains a finished run",
                where=str(self.path),
                fix="choose another folder with --output, or replace the run with --overwrite",
                code="run-exists",
            )
        else:
            raise OutputExists(
                "the output folder contains an unfinished run",
                where=str(self.path),
                fix="continue it with `truetune train --resume "
                f"{shlex.quote(str(self.path))}`, or start again with --overwrite",
                code="run-unfinished",
            )

    def _refuse_unlisted(self) -> None:
        """A file that the run did not write was put there by somebody."""
        unlisted = self._unlisted_files() if self.finished else self._unlisted_folders()
        if unlisted:
            raise OutputExists(
                f"{len(unlisted)} files of the output folder are not the run's: "
                + ", ".join(unlisted[:5]),
                where=str(self.path),
                fix="move them away, or choose another folder with --output",
                code="output-not-ours",
            )

    def _unlisted_files(self) -> list[str]:
        """Files of a finished run that its manifest does not list."""
        try:
            listed = parsed((self.path / MANIFEST).read_text(encoding="utf-8"))["files"]
            known = {MANIFEST, LOCK, REPORT, *map(str, listed)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputExists(
                f"{MANIFEST} cannot be read, so the files of the run are unknown: {error}",
                where=str(self.path / MANIFEST),
                fix="choose another folder with --output, or remove this one yourself",
                code="output-not-ours",
            ) from error
        names = [
            path.relative_to(self.path).as_posix()
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        ]
        return [name for name in names if name not in known]

    def _unlisted_folders(self) -> list[str]:
        """Entries of an unfinished run's checkpoints/ that are no checkpoints."""
        folder = self.path / CHECKPOINTS
        ours = {*self.checkpoints(), *_unnamed(folder)}
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        return [path.relative_to(self.path).as_posix() for path in there if path not in ours]

    def _remove_own(self) -> None:
        # The manifest goes first: from here on the folder is an unfinished run.
        (self.path / MANIFEST).unlink(missing_ok=True)
        # And what says whose the folder is last: a removal that is killed can be repeated.
        names = [*sorted(_OWN - {RECIPE, CONTRACT}), RECIPE, CONTRACT]
        for path in _unnamed(self.path) + [self.path / name for name in names]:
            _remove(path)


def _unnamed(folder: Path) -> list[Path]:
    """What a killed process left half-written in a folder."""
    if not folder.is_dir():
        return []
    found = [(path, _UNNAMED.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    named = [(path, match[1].lstrip(".")) for path, match in found if match]
    return [path for path, name in named if name in _OWN or name.startswith(STEP)]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


@contextlib.contextmanager
def _alone_in(folder: Path, lock: str) -> Iterator[Owner | None]:
    """Make a folder if there is none, and hold a lock in it; see `RunDir.writing`."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, made)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            dead = held.enter_context(hold(folder / lock))
        except (NotADirectoryError, FileExistsError) as error:
            # A link that leads nowhere is there too.
            there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
            raise OutputExists(
                f"{there} is a file or a broken link, so {folder} cannot be a folder",
                where=str(folder),
                fix="choose another folder with --output",
            ) from error
        except OSError as error:
            raise UsageError(
                f"the folder cannot be written: {error.strerror}",
                where=str(error.filename or folder),
                why="the file system is read-only, or you do not own the folder",
                fix="make it writable, or copy it to a place where you may write",
                code="output-not-writable",
            ) from error
        yield dead


@contextlib.contextmanager
def named_at_last(folder: Path) -> Iterator[Path]:
    """Another name for a folder that is to be written, for this process alone; it takes its own
    name at the end, and is gone where the end is not reached. What a killed process left goes
    first.

    Raises:
        OutputExists: the folder is there already.
        Busy: another process writes it; nothing was changed.
        UsageError: its place cannot be written.
    """

    def require_absent() -> None:
        if os.path.lexists(folder):
            raise OutputExists(
                f"{folder} already exists",
                fix="choose another folder with --output",
                code="output-exists",
            )

    require_absent()
    unnamed = folder.with_name(f".{folder.name}.unverified")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_alone_in(folder.parent, f"{unnamed.name}.lock"))
        except Busy as busy:
            raise Busy(
                f"another process is writing {folder}",
                where=str(folder.parent / f"{unnamed.name}.lock"),
                fix="wait for it, or choose another folder with --output",
                code="output-busy",
            ) from busy
        require_absent()
        _remove(unnamed)
        try:
            yield unnamed
            require_absent()
            unnamed.rename(folder)
            flush_folder(folder.parent)
        finally:
            shutil.rmtree(unnamed, ignore_errors=True)


@contextlib.contextmanager
def claimed(
    output: Path | str, *, overwrite: bool = False, resume: bool = False
) -> Iterator[tuple[RunDir, Owner | None]]:
    """The directory of a run that is to be started or resumed, for this process alone; see
    `RunDir.writing`. It asks no more than the file system: the answer is there at once."""
    run = RunDir.open(output) if resume else RunDir(output)
    require = (
        run.require_unfinished
        if resume
        else functools.partial(run.require_room, overwrite=overwrite)
    )
    with run.writing(require) as dead:
        yield run, dead


_SCRATCH = "truetune-scratch-"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that is gone afterwards; those that killed processes left go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, Busy):
            # Without a lock it is being made. Another user's is that user's.
            if left.lstat().st_uid == os.geteuid() and (left / LOCK).is_file():
                with hold(left / LOCK):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder, hold(Path(folder) / LOCK):
        yield Path(folder)


def opened(source: str) -> str:
    """The folder to load for a run, a model folder or a Hub id.

    Raises:
        UsageError: a run that has saved nothing yet.
    """
    run = RunDir(source)
    if not run.looks_like_one():
        return source
    artifact = run.artifact() or next(iter(reversed(run.checkpoints())), None)
    if artifact is None:
        raise UsageError(
            "the run has not saved a model or a checkpoint yet",
            where=source,
            fix=f"continue it with truetune train --resume {shlex.quote(str(source))}",
            code="run-empty",
        )
    return str(artifact)
