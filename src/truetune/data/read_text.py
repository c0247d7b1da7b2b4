"""Plain text files.

Input:  a .txt or .md file.
Does:   a .md file is one text. A .txt file is often one long stream: it is cut into pieces at
        blank lines, each at least 4,000 characters long (about 1,000 tokens), so that a heading
        stays with what follows, a line of hard-wrapped prose is no text of its own, and there is
        something to hold out.
Output: `FileRows` with the one column `text`. Line ends become \\n; nothing else is changed.
"""

from __future__ import annotations

from pathlib import Path

from truetune.data.files import MOST_TEXT, PACKED, read_text, row_too_large
from truetune.data.rows import FileRows, Row
from truetune.findings import Finding

PIECE_CHARACTERS = 4000


def read_document(path: Path, limit: int | None) -> FileRows:
    """The whole file as one row.

    Raises:
        DataError: `row-too-large`, `not-text`, `not-utf8`, `empty-file`.
    """
    if path.suffix.lower() not in PACKED and path.stat().st_size > MOST_TEXT:
        raise row_too_large(f"{path}:1")
    text = _unix(read_text(path))
    if len(text) > MOST_TEXT:
        raise row_too_large(f"{path}:1")
    return FileRows.of([Row({"text": text}, str(path), 1, 1)])


def read_pieces(path: Path, limit: int | None) -> FileRows:
    """One row for each piece: cut at the first blank line after 4,000 characters.

    Raises:
        DataError: `row-too-large`, `not-text`, `not-utf8`, `empty-file`.
    """
    rows: list[Row] = []
    piece: list[str] = []
    length = 0
    for number, line in enumerate(_unix(read_text(path)).split("\n"), 1):
        blank = not line.strip()
        if blank and (not piece or length >= PIECE_CHARACTERS):
            rows += _row(piece, path, len(rows) + 1, number)
            piece, length = [], 0
            if limit is not None and len(rows) >= limit:
                break
            continue
        piece.append(line)
        length += len(line) + 1
        if length > MOST_TEXT:
            raise row_too_large(f"{path}:{number - len(piece) + 1}")
    else:
        rows += _row(piece, path, len(rows) + 1, number + 1)
    if len(rows) < 2:
        return FileRows.of(rows)
    note = Finding(
        code="text-pieces",
        level="note",
        what=f"the text file was split at blank lines into rows of {PIECE_CHARACTERS:,} characters "
        "or more",
        where=rows[0].where,
        count=len(rows),
        fix='to choose the boundaries yourself, write one {"text": "..."} object per line as jsonl',
    )
    return FileRows.of(rows, note)


def _row(piece: list[str], path: Path, index: int, end: int) -> list[Row]:
    """The row of lines `end - len(piece)` to `end`; none if there are no lines."""
    start = end - len(piece)
    while piece and not piece[-1].strip():
        piece = piece[:-1]
    return [Row({"text": "\n".join(piece)}, str(path), index, start)] if piece else []


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
