"""Read the bytes and text of a file, or raise an error that names the faulty line.

Input:  a path.
Does:   opens the file (unpacks .gz and .zst within limits), refuses what is not text, splits it
        into lines of bounded length, decodes strict UTF-8, hashes.
Output: a binary stream, lines, or the whole text.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
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
# The longest row, in bytes: four million tokens of English, more than a model has for a context,
# and half of what the process of a chat template may write, so that no template is blamed for it.
# What is longer comes from a missing line break or quote, or from a damaged file.
MOST_TEXT = 16 * 2**20
# What a row takes in memory beside its values: a packed file may hold a tiny one 100 million times.
ROW_BYTES = 64
_BLOCK = 2**20
# How files begin that are no text, whatever they are called.
_MAGIC = {
    b"\x1f\x8b": ("a gzip archive", ".gz"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", ".zst"),
    b"PK\x03\x04": ("a zip archive", ".zip"),
    b"PAR1": ("a parquet file", ".parquet"),
    b"\xfd7zXZ\x00": ("an xz archive", ".xz"),
}
# The longer mark first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# What text of mostly ASCII looks like in them without a mark.
_UNMARKED = {
    "UTF-32LE": re.compile(rb"(?:[^\0]\0\0\0){2}"),
    "UTF-32BE": re.compile(rb"(?:\0\0\0[^\0]){2}"),
    "UTF-16LE": re.compile(rb"(?:[^\0]\0){4}"),
    "UTF-16BE": re.compile(rb"(?:\0[^\0]){4}"),
}


def most_unpacked(path: Path) -> int:
    """Return the size in bytes to which a compressed file may grow; more is a decompression
    bomb."""
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
    """The decompressed bytes of an archive, within a limit; every failure raises a DataError."""

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
            raise unpacks_too_far(self._path)
        buffer[: len(read)] = read
        return len(read)

    def _broken(self, error: Exception) -> DataError:
        command = PACKED[self._path.suffix.lower()]
        return DataError(
            f"the archive cannot be unpacked: {error}",
            where=str(self._path),
            why=f"it was cut off, or it is not a {self._path.suffix} file despite its name",
            fix=f"download the file again; `{command} {self._path}` shows where it breaks off",
            code="broken-gzip" if self._path.suffix.lower() == ".gz" else "broken-zstd",
        )


def unpacks_too_far(path: Path) -> DataError:
    size, most = path.stat().st_size, most_unpacked(path)
    command = PACKED.get(path.suffix.lower())
    instead = (
        f"unpack it yourself and pass the result: {command} {path}"
        if command
        else "convert it to jsonl and pass that"
    )
    return DataError(
        f"the file of {size:,} bytes unpacks to more than {most:,}",
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
        raise _not_utf8(
            f"line {line} has the byte 0x{raw[error.start]:02x}", path, line, "WINDOWS-1252"
        ) from error


def _not_utf8(what: str, path: Path, line: int, encoding: str) -> DataError:
    plain, unpack = _plain(path)
    name = shlex.quote(str(plain))
    return DataError(
        f"the file is not UTF-8: {what}",
        where=f"{path}:{line}",
        why=f"it was probably written as {encoding}",
        fix=f"{unpack}iconv -f {encoding} -t UTF-8 {name} > utf8{plain.suffix}",
        code="not-utf8",
    )


def _plain(path: Path) -> tuple[Path, str]:
    """The file as it is once unpacked, and the command to be run before any on that."""
    command = PACKED.get(path.suffix.lower())
    if command is None:
        return path, ""
    return path.with_suffix(""), f"{command} {shlex.quote(str(path))}; "


def text_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a text file, block by block, the first looked at for what it is.

    Raises:
        DataError: `not-text`, `not-utf8`, and those of `open_bytes`.
    """
    line = 1
    with open_bytes(path) as file:
        while block := file.read(_BLOCK):
            if line == 1:
                _require_text(block, path)
            if b"\0" in block:
                raise _has_nul(path, line + block.count(b"\n", 0, block.index(b"\0")))
            line += block.count(b"\n")
            yield block


def _require_text(block: bytes, path: Path) -> None:
    for mark, encoding in _MARKS.items():
        if block.startswith(mark):
            raise _not_utf8(f"it begins with the mark of {encoding}", path, 1, encoding)
    for magic, (kind, suffix) in _MAGIC.items():
        if block.startswith(magic):
            plain, unpack = _plain(path)
            raise DataError(
                f"the file is {kind}, not text",
                where=f"{path}:1",
                why="it was compressed twice"
                if unpack
                else "its extension belongs to another format",
                fix=f"{unpack}mv {shlex.quote(str(plain))} {shlex.quote(f'{plain}{suffix}')}",
                code="not-text",
            )
    for encoding, pattern in _UNMARKED.items():
        if pattern.match(block):
            raise _not_utf8("there are zero bytes between its letters", path, 1, encoding)


def _has_nul(path: Path, line: int) -> DataError:
    plain, unpack = _plain(path)
    return DataError(
        "the file contains a NUL character, so it is not text",
        where=f"{path}:{line}",
        why="it is damaged (a disk that was full leaves NULs), or not a text file",
        fix=f"write the file again, or remove the NUL characters: {unpack}tr -d '\\0' < "
        f"{shlex.quote(str(plain))} > repaired{plain.suffix}",
        code="not-text",
    )


def row_too_large(where: str) -> DataError:
    return DataError(
        f"a row is longer than {MOST_TEXT:,} bytes",
        where=where,
        why="a line break or a closing quote is missing, or the file is damaged: this limit is "
        "about four million tokens, more than a model's context",
        fix="separate the rows, or cut the text into several rows",
        code="row-too-large",
    )


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers. They end at \\n alone: str.splitlines would
    also cut at U+2028 inside a JSON string.

    Raises:
        DataError: `row-too-large`, and those of `text_blocks`.
    """
    number, held = 1, b""
    for block in text_blocks(path):
        if not held and block.isspace():
            # Millions of blank lines need no look each.
            number += block.count(b"\n")
            continue
        *lines, rest = (held + block).split(b"\n") if b"\n" in block else (held + block,)
        for line in lines:
            if len(line) > MOST_TEXT:
                raise row_too_large(f"{path}:{number}")
            if not line.isspace() and line:
                yield number, line
            number += 1
        held = rest
        if len(held) > MOST_TEXT:
            raise row_too_large(f"{path}:{number}")
    if held and not held.isspace():
        yield number, held


def read_text(path: Path, *, lines: bool = True) -> str:
    """The whole file as text.

    Args:
        lines: whether a line is at most one row, so that its length is bounded.

    Raises:
        DataError: `empty-file` if it holds nothing but white space, `row-too-large`, and those of
            its parts.
    """
    blocks = []
    number, length = 1, 0  # of the line that the blocks so far end with
    for block in text_blocks(path):
        blocks.append(block)
        # A carriage return ends a line too, in csv and in prose. Lines inside a block are short.
        ends = [at for at in (block.find(b"\n"), block.find(b"\r")) if at >= 0]
        if lines and length + (min(ends) if ends else len(block)) > MOST_TEXT:
            raise row_too_large(f"{path}:{number}")
        last = max(block.rfind(b"\n"), block.rfind(b"\r"))
        length = len(block) - last - 1 + (0 if ends else length)
        number += block.count(b"\n")
    text = decoded(b"".join(blocks), path)
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
