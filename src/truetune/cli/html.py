"""Pages of HTML: one file that runs nothing and fetches nothing, every text from outside escaped.

It stands with the screens, because pages are another way to show what they show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from truetune.errors import SaveError, UsageError
from truetune.findings import escaped
from truetune.run_dir import write_text


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: escaped here.
        style: CSS.
        body: HTML, escaped already.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escaped(title)}</title><style>{style}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def write_document(path: Path, text: str) -> None:
    """Write a page, and make its folder; a page that was there stays whole where that fails.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except (SaveError, OSError) as error:
        cause = error.__cause__ or error
        raise UsageError(
            f"the page cannot be written: {getattr(cause, 'strerror', None) or cause}",
            where=str(path),
            fix="name another file with --html FILE",
            code="page-not-written",
        ) from error
