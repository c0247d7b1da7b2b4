"""One file to rows, by its extension.

Input:  a path.
Does:   picks the reader.
Output: `FileRows` and `FileInfo`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from truetune.data.files import PACKED, empty_file
from truetune.data.read_json import read_json, read_jsonl
from truetune.data.read_table import read_csv, read_parquet
from truetune.data.read_text import read_document, read_pieces
from truetune.data.rows import FileInfo, FileRows
from truetune.errors import DataError
from truetune.findings import near
from truetune.run_dir import sha256

Reader = Callable[[Path, int | None], FileRows]

READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_pieces,
    ".md": read_document,
}
TEXT_EXTENSIONS = (".txt", ".md")


def extension(path: Path) -> str:
    """The extension that names the format: `.jsonl` of `a.jsonl.gz`, in lower case."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def read_file(path: Path, limit: int | None = None) -> tuple[FileRows, FileInfo]:
    """Reads one file.

    Args:
        path: a file that exists.
        limit: stop after this many rows.

    Raises:
        DataError: `unknown-extension`, `empty-file`, and those of the reader.
    """
    reader = READERS.get(extension(path))
    if reader is None:
        raise _unknown_extension(path)
    num_bytes = path.stat().st_size
    if not num_bytes:
        raise empty_file(path)
    found = reader(path, limit)
    return found, FileInfo(str(path), sha256(path), len(found.places), num_bytes)


def _unknown_extension(path: Path) -> DataError:
    close = near(extension(path), READERS)
    return DataError(
        f"the extension {extension(path)} is not a supported format"
        if extension(path)
        else "the file name has no extension",
        where=str(path),
        why="the format is recognised by the file name",
        fix=f"{f'did you mean {close[0]}? ' if close else ''}rename or convert it to one of "
        f"{', '.join(READERS)} ({' or '.join(PACKED)} may follow any but .parquet)",
        code="unknown-extension",
    )
