"""Bytes and text of a file, or an error that says which line is to blame.

Input:  a path.
Does:   opens (unpacks .gz and .zst, as far as is sane), decodes strict UTF-8, hashes.
Output: a binary stream, or the whole text.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from truetune.errors import DataError

BOM = b"\xef\xbb\xbf"
# Extensions that may follow the one of the format, and the command that unpacks them.
PACKED = {".gz": "gunzip -k", ".zst": "zstd -d"}
_LFS = b"version https://git-lfs.github.com/spec/"
# A small file that unpacks to more than this was made to fill the memory. Text packs to a tenth,
# tables of repeated prompts to a hundredth.
_MOST_UNPACKED = 512 * 2**20
_MOST_RATIO = 100


def most_unpacked(path: Path) -> int:
    """The bytes to which a packed file may grow; more is a bomb and not data."""
    return max(_MOST_UNPACKED, _MOST_RATIO * path.stat().st_size)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The (unpacked) bytes of a file.

    Raises:
        DataError: `unreadable-file`, `broken-gzip`, `broken-zstd`, `unpacks-too-far`,
            `git-lfs-pointer`; also for errors while the body reads.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise _lfs_pointer(path)
            file.seek(0)
            if path.suffix.lower() not in PACKED:
                yield file
                return
            with _unpacked(file, path) as stream:
                yield cast(IO[bytes], io.BufferedReader(_Bounded(stream, path), 2**20))
    except OSError as error:
        if error.errno is None:
            raise  # not of the file, but of a library that found something wrong in it
        raise DataError(
            f"the file cannot be read: {error.strerror or error}",
            where=str(path),
            fix="check the permissions of the file",
            code="unreadable-file",
        ) from error


def _unpacked(file: IO[bytes], path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(file)
    # pyarrow brings zstd; it refuses windows that would take more than 128 MiB.
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file), "zstd")


class _Bounded(io.RawIOBase):
    """What an archive unpacks to, up to what is sane; every failure is a DataError."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path
        self._left = most_unpacked(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            read = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise self._broken(error) from error
        self._left -= len(read)
        if self._left < 0:
            command = PACKED[self._path.suffix.lower()]
            raise unpacks_too_far(
                self._path, f"unpack it yourself and give the result: {command} {self._path}"
            )
        buffer[: len(read)] = read
        return len(read)

    def _broken(self, error: Exception) -> DataError:
        command = PACKED[self._path.suffix.lower()]
        return DataError(
            f"the archive cannot be unpacked: {error}",
            where=str(self._path),
            why=f"it was cut off, or it is not a {self._path.suffix} file despite its name",
            fix=f"fetch the file again; `{command} {self._path}` shows how far it goes",
            code="broken-gzip" if self._path.suffix.lower() == ".gz" else "broken-zstd",
        )


def unpacks_too_far(path: Path, instead: str) -> DataError:
    size = path.stat().st_size
    return DataError(
        f"the file of {size:,} bytes unpacks to more than {most_unpacked(path):,}",
        where=str(path),
        why=f"more than {_MOST_RATIO} times its size: such a file may be designed to exhaust "
        "memory",
        fix=f"if you trust it, {instead}",
        code="unpacks-too-far",
    )


def _lfs_pointer(path: Path) -> DataError:
    return DataError(
        "the file is a Git LFS pointer, not the data itself",
        where=str(path),
        why="the repository was cloned without Git LFS",
        fix=f"fetch the data: git -C {path.parent} lfs pull",
        code="git-lfs-pointer",
    )


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
        why="the program that wrote it failed or is still writing",
        fix="pass a file that contains rows",
        code="empty-file",
    )
