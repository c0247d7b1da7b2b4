"""Pages made from the code: docs/settings.md from the recipe, docs/findings.md from the sources.

`--check` compares instead of writing; the checks run it, so the pages cannot drift.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

from truetune.recipe import settings

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "truetune"


def settings_page() -> str:
    """One table a group."""
    lines = [
        "# Settings",
        "",
        "Made from `recipe/settings.py` by `make docs`. Each is an option of `truetune train`",
        "(`--learning-rate`) and a line of a YAML recipe (`learning_rate: 1e-4`); the command line",
        "wins. `recipe.yaml` of a run holds the value and the origin of each.",
    ]
    group = None
    for field in settings():
        meta = field.metadata
        if meta["group"] != group:
            group = meta["group"]
            lines += ["", f"## {group}", "", "| setting | what | default |", "|---|---|---|"]
        also = f" (also {', '.join(f'`{a}`' for a in meta['aliases'])})" if meta["aliases"] else ""
        default = meta["shown"] or ("" if field.default is None else str(field.default))
        lines.append(f"| `{field.name}`{also} | {meta['help']} | {default} |")
    return "\n".join(lines) + "\n"


def findings_page() -> str:
    """Every code, with what it is of and where it is raised."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = str(path.relative_to(SOURCE))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                kind, code = _code_of(node)
                if code:
                    found[code].add((kind, module))
    lines = [
        "# Findings and errors by code",
        "",
        "Made from the sources by `make docs`. A *finding* has a level (error, warning, note) and",
        "is told with where, count, why and fix; an *error* ends the command with the exit code of",
        "its class (`errors.py`). Codes are stable.",
        "",
        "| code | kind | module |",
        "|---|---|---|",
    ]
    for code, places in sorted(found.items()):
        kinds = ", ".join(sorted({kind for kind, _ in places}))
        modules = ", ".join(f"`{module}`" for module in sorted({m for _, m in places}))
        lines.append(f"| `{code}` | {kinds} | {modules} |")
    return "\n".join(lines) + "\n"


def _code_of(call: ast.Call) -> tuple[str, str | None]:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    values = {word.arg: word.value for word in call.keywords}
    if name == "Finding" and call.args:
        values.setdefault("code", call.args[0])
    if name == "BadRow" and call.args:
        values.setdefault("code", call.args[0])
    code = values.get("code")
    if not isinstance(code, ast.Constant) or not isinstance(code.value, str) or not code.value:
        return "", None
    second = call.args[1] if name == "Finding" and len(call.args) > 1 else None
    level = values.get("level") or second
    if name == "Finding":
        known = isinstance(level, ast.Constant)
        return f"finding ({level.value})" if known else "finding", code.value
    if name == "rows_finding":
        known = isinstance(level, ast.Constant)
        return f"finding ({level.value})" if known else "finding", code.value
    return ("row error" if name == "BadRow" else "error"), code.value


PAGES = {"docs/settings.md": settings_page, "docs/findings.md": findings_page}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"{', '.join(stale)} differ from the code: run make docs\n")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
