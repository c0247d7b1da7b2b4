"""Find what a source refers to: local files, a dataset folder, or a dataset on the Hub.

Input:  the source and split as the user gave them.
Does:   lists files, tells their splits by their names, finds near names for a missing one.
Output: `Source`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from truetune.data.read import READERS, TEXT_EXTENSIONS, extension
from truetune.data.rows import SPLIT_WORDS, names
from truetune.errors import DataError
from truetune.findings import Finding, near

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
# Files that describe data; a folder may hold them beside it.
_ABOUT = re.compile(r"(dataset_infos?|state|dataset_dict|package|config)\.json|manifest.*\.json")


@dataclass(frozen=True, slots=True)
class Source:
    """What to read.

    Attributes:
        files: in the order of their names; () if `datasets` is to read it.
        findings: files left aside, and why.
    """

    files: tuple[Path, ...]
    findings: tuple[Finding, ...] = ()


def resolve(source: str | Path, split: str | None) -> Source:
    """Find the files or the dataset of a source.

    Raises:
        DataError: `no-such-file`, `no-data-files`, `no-such-split`.
    """
    _require_a_name(str(source))
    path = _as_typed(Path(source).expanduser())
    if path.is_dir():
        return Source(()) if is_dataset_folder(path) else _folder(path, split)
    if path.exists():
        if not path.is_file():
            raise _no_stream(str(path), "it is a pipe or a device")
        if split is not None and _split_word(split) != "train":
            raise no_such_split(split, ["train"], str(path), why="one file is one split")
        return Source((path,))
    described = str(source).rpartition(":")[0]  # of `folder:config`
    if (described and is_dataset_folder(Path(described))) or is_hub_id(str(source)):
        return Source(())
    raise _no_such_file(path)


def _as_typed(path: Path) -> Path:
    """A path below the working folder, relative to it.

    A run records absolute paths. Resumed from the same folder, its rows have the names that they
    had before, in samples.jsonl and on the page.
    """
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _require_a_name(source: str) -> None:
    """Raise for what looks like data and is neither a file nor an id: a stream, a web address."""
    if source in ("-", "/dev/stdin"):
        raise _no_stream(source, "it means standard input")
    scheme, _, rest = source.partition(":/")
    if not rest or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        return
    rest = rest.lstrip("/")
    what, fix = "data is read from files", f"download it first: curl -LO {source}"
    found = re.match(r"(?:(?:www\.)?(?:huggingface\.co|hf\.co)/)?datasets/([^/?#]+/[^/?#@]+)", rest)
    if found and (scheme == "hf" or "hugg" in rest or rest.startswith("hf.co")):
        what, fix = "a dataset of the Hub is named by its id", f"give {found[1]}"
        inside = re.match(r"/(?:(?:resolve|blob|raw)/[^/]+/)?([^?#]+\.\w+)", rest[found.end() :])
        if inside:
            fix += (
                f", or one file of it: hf download {found[1]} {inside[1]} --repo-type dataset "
                "--local-dir ."
            )
    raise DataError(
        f"{source} is a web address",
        where=source,
        why=f"{what}, and the training data must still be available for --resume",
        fix=fix,
        code="data-is-url",
    )


def _no_stream(source: str, what: str) -> DataError:
    return DataError(
        "data cannot be read from a stream",
        where=source,
        why=f"{what}: its rows cannot be read again for --resume, and findings could not name "
        "their location",
        fix="write it to a file first: COMMAND > rows.jsonl",
        code="data-is-stream",
    )


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` wrote the folder, or a card in it says which files are which split."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return (
        header.startswith("---")
        and re.search(r"^(configs|dataset_info):", header, re.M) is not None
    )


def no_such_split(split: str, there: list[str], where: str, *, why: str = "") -> DataError:
    """The error for a split that is not there."""
    sliced = (
        "slices of a split are not supported: limit the number of rows instead"
        if "[" in split
        else ""
    )
    return DataError(
        f"there is no split {split!r}",
        where=where,
        why=why or sliced,
        fix=f"use --split {there[0]}" if len(there) == 1 else f"use one of {names(there)}",
        code="no-such-split",
    )


def is_hub_id(source: str) -> bool:
    """Whether a text may name something on the Hub, and is no mistyped path."""
    if not _HUB_ID.fullmatch(source) or extension(Path(source)) in READERS:
        return False
    # `data/train` beside an existing folder `data` is a mistyped path, not a dataset of the Hub;
    # so is a bare name with a dot, or one that is nearly the name of something here.
    if "/" in source:
        return not Path(source).parent.is_dir()
    return "." not in source and not _near(Path(source))


def _folder(folder: Path, split: str | None) -> Source:
    visible = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    files = [p for p in visible if extension(p) in READERS and not _ABOUT.fullmatch(p.name)]
    tables = [p for p in files if extension(p) not in TEXT_EXTENSIONS]
    files = tables or files  # beside data, .md and .txt are a read-me and a licence
    if not files:
        raise DataError(
            "the folder holds no data files",
            where=str(folder),
            why=f"it holds {names([p.name for p in visible], 10)}" if visible else "it is empty",
            fix=f"pass a folder with files in one of the formats {', '.join(READERS)}",
            code="no-data-files",
        )
    chosen, findings = _of_split(files, folder, split)
    skipped = [p for p in visible if p not in files]
    if skipped:
        findings.append(
            Finding(
                code="files-skipped",
                level="note",
                what=f"files in the folder that contain no rows were not read: "
                f"{names([str(p.relative_to(folder)) for p in skipped], 5)}",
                where=str(skipped[0]),
                count=len(skipped),
            )
        )
    return Source(tuple(chosen), tuple(findings))


def _of_split(
    files: list[Path], folder: Path, split: str | None
) -> tuple[list[Path], list[Finding]]:
    words = {path: _words(path.relative_to(folder)) for path in files}
    there = sorted({SPLIT_WORDS[w] for ws in words.values() for w in ws if w in SPLIT_WORDS})
    if not there and split in (None, "train"):
        return files, []
    wanted = _split_word(split or "train")
    chosen = [path for path in files if wanted in map(_split_word, words[path])]
    if not chosen:
        where = str(folder)
        raise no_such_split(
            split or "train", there or ["train"], where, why="splits are recognised by file names"
        )
    aside = [path for path in files if path not in chosen]
    left = [str(path.relative_to(folder)) for path in aside]
    if split is not None or not left:
        return chosen, []
    # A file of another split is left out as everybody expects, one of no split perhaps by mistake.
    unmarked = [p for p in files if p not in chosen and not SPLIT_WORDS.keys() & set(words[p])]
    return chosen, [
        Finding(
            code="split-chosen",
            level="warning" if unmarked else "note",
            what=f"the split train was read; not read: {names(left, 5)}"
            + (f"; the names of {len(unmarked)} of them match no split" if unmarked else ""),
            where=str(aside[0]),
            count=len(left),
            why="the split is recognised by the words train, validation and test in file names",
            fix="choose a split with --split, or pass one file",
        )
    ]


def _words(path: Path) -> list[str]:
    return [word for part in path.parts for word in re.split(r"[\W_]+", part.lower()) if word]


def _split_word(split: str) -> str:
    return SPLIT_WORDS.get(split.lower(), split.lower())


def _no_such_file(path: Path) -> DataError:
    folder, close = path.parent, _near(path)
    if path.is_symlink():
        target = path.readlink()
        return DataError(
            "the symbolic link is broken",
            where=str(path),
            why=f"it points to {target}, which does not exist or links back",
            fix="repair the link, or pass the file itself",
            code="no-such-file",
        )
    why = f"the folder {folder} does not exist either"
    if folder.is_dir():
        there = sorted(p.name for p in folder.iterdir())
        why = f"{folder} holds {names(there, 10)}" if there else f"{folder} is empty"
    return DataError(
        "there is no such file or folder",
        where=str(path),
        why=why,
        fix=f"did you mean {names([str(folder / name) for name in close])}?"
        if close
        else "check the path",
        code="no-such-file",
    )


def _near(path: Path) -> list[str]:
    """Return names in the same folder that resemble that of a missing path."""
    if not path.parent.is_dir():
        return []
    there = [p.name for p in path.parent.iterdir()]
    return near(path.name, sorted(there), 3)
