"""Make pages from the code: docs/settings.md from the recipe, docs/findings.md from the sources,
docs/lab.md and its pictures from the results beside them, notebooks from their sources.

`--check` compares the pages instead of writing them; `make check` runs it, so they cannot drift.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from findings_page import findings_page
from notebooks import pages as notebooks

from truetune.lab.catalogue import every
from truetune.lab.page import files
from truetune.lab.results import read
from truetune.recipe.settings import Recipe, settings

ROOT = Path(__file__).parents[1]


def settings_page() -> str:
    """One table a group."""
    lines = [
        "# Settings",
        "",
        "This page is made from `recipe/settings.py` by `make docs`. Each setting is an option of",
        "`truetune train` (`--learning-rate 1e-4`) and a line of a YAML recipe",
        "(`learning_rate: 1e-4`). The command line takes precedence over the recipe. A run's",
        "`recipe.yaml` records the value and the origin of each setting.",
    ]
    types = get_type_hints(Recipe)
    group = None
    for field in settings():
        meta = field.metadata
        if meta["group"] != group:
            group = meta["group"]
            lines += ["", f"## {group}", "", "| setting | what | default |", "|---|---|---|"]
        also = f" (also {', '.join(f'`{a}`' for a in meta['aliases'])})" if meta["aliases"] else ""
        default = meta["shown"] or ("" if field.default is None else str(field.default))
        # Markdown would take a marker for a tag of HTML.
        default = re.sub(r"(<\S+>)", r"`\1`", default)
        declared = types[field.name]
        values = get_args(declared) if get_origin(declared) is Literal else ()
        choices = f" One of {', '.join(f'`{value}`' for value in values)}." if values else ""
        lines.append(f"| `{field.name}`{also} | {meta['help']}{choices} | {default} |")
    return "\n".join(lines) + "\n"


def lab_pages() -> dict[str, str]:
    """docs/lab.md and the pictures, from docs/lab/*.json."""
    return files(read(ROOT / "docs" / "lab", every()), every())


def pages() -> dict[str, str]:
    """Every page by its path."""
    made = {"docs/settings.md": settings_page(), "docs/findings.md": findings_page()}
    return made | notebooks() | {f"docs/{name}": text for name, text in lab_pages().items()}


def main() -> int:
    stale = []
    for name, text in pages().items():
        path = ROOT / name
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"{', '.join(stale)} differ from the code: run make docs\n")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
