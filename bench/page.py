"""Tables between markers of docs/performance.md."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def put(text: str, begin: str, end: str, page: Path = PAGE) -> None:
    """Replace what stands between two markers.

    Raises:
        ValueError: the page lacks one of them.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)
    if not found or not after[1]:
        raise ValueError(f"{page} has no {begin} with {end} after it")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after[2]}", encoding="utf-8")
