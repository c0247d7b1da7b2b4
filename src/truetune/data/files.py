"""Bytes and text of a file, or an error that says which line is to blame.

Input:  a path.
Does:   opens (through gzip for .gz), decodes strict UTF-8, hashes.
Output: a binary stream, or the whole text.
Who:    the readers; no other module of the data room opens a file.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from truetune.errors import DataError

BOM = b"\xef\xbb\xbf"


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The (unpacked) bytes of a file.

    Raises:
        DataError: `unreadable-file`, `broken-gzip`; also for errors while the body reads.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".gz":
                with gzip.open(file) as unpacked:
                    yield cast(IO[bytes], unpacked)
            else:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"the gzip archive cannot be unpacked: {error}",
            where=str(path),
            why="it was cut off, or it is not gzip in spite of its name",
            fix="fetch the file again, or unpack it with gunzip to see how far it goes",
            code="broken-gzip",
        ) from error
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror or error}",
            where=str(path),
            fix="look at the permissions of the file",
            code="unreadable-file",
        ) from error


def sha256(path: Path) -> str:
    """Hex digest of the bytes as they lie on the disk."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decoded(raw: bytes, path: Path, first_line: int = 1) -> str:
    """`raw` as text, a byte order mark removed.

    Args:
        raw: bytes that start on `first_line` of the file.

    Raises:
        DataError: `not-utf8`, with the line and the byte.
    """
    if first_line == 1 and raw.startswith(BOM):
        raw = raw[len(BOM) :]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        encoding = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"the file is not UTF-8: line {line} has the byte 0x{raw[error.start]:02x}",
            where=f"{path}:{line}",
            why=f"it was probably written as {encoding}",
            fix=f"iconv -f {encoding} -t UTF-8 {path} > utf8{path.suffix}",
            code="not-utf8",
        ) from error


def read_text(path: Path) -> str:
    """The whole file as text.

    Raises:
        DataError: `empty-file` if it holds nothing but white space, and those of its parts.
    """
    with open_bytes(path) as file:
        text = decoded(file.read(), path)
    if not text.strip():
        raise empty_file(path)
    return text


def empty_file(path: Path | str) -> DataError:
    return DataError(
        "the file holds no rows",
        where=str(path),
        why="the step that wrote it failed, or it is still being written",
        fix="give a file that holds rows",
        code="empty-file",
    )
