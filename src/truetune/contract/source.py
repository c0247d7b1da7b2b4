"""Where a template comes from, and how it is saved.

input   what the run asked for, a tokenizer, template arguments
does    finds the Jinja source: the model's own, one of its named ones, a built-in, a file; writes
        arguments into it as defaults
output  source, the source for conversations with tools, and their origin in words
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.contract.builtin import DEFAULT, NAMES, builtin_template
from truetune.errors import UsageError


def template_source(asked: str | None, tokenizer: Any) -> tuple[str, str | None, str]:
    """(Jinja source, the source for conversations with tools or None, where they came from).

    Raises:
        UsageError: no such template, or several and none of them the default.
    """
    own = getattr(tokenizer, "chat_template", None)
    named = dict(own) if isinstance(own, Mapping) else {}
    if asked is None or asked == "auto":
        if named and "default" not in named and len(named) > 1:
            raise UsageError(
                "the model has several chat templates, but no default",
                fix="choose one with --chat-template: " + ", ".join(sorted(named)),
                code="no-default-template",
            )
        if named:
            # A server takes the one for tools where tools are offered.
            first = named.get("default") or next(iter(named.values()))
            tools = named.get("tool_use") if "default" in named else None
            return str(first), tools, "the model's own"
        if own:
            return str(own), None, "the model's own"
        return (
            builtin_template(DEFAULT, tokenizer),
            None,
            f"built-in {DEFAULT}, because the model has none",
        )
    if asked in named:
        return str(named[asked]), None, f"the model's own, named {asked}"
    if asked in NAMES:
        return builtin_template(asked, tokenizer), None, f"built-in {asked}"
    if "{%" in asked or "{{" in asked:
        return asked, None, "given as source"
    path = Path(asked)
    if path.is_file():
        return path.read_text(encoding="utf-8"), None, f"file {asked}"
    raise _no_such_template(asked, [*NAMES, *sorted(named)])


def require_template(asked: str | None) -> None:
    """Raise now if `template_source` would: a file that is not there.

    Raises:
        UsageError: a path of no file. Other names may be those of the model's own templates.
    """
    is_path = asked is not None and "{" not in asked and (asked.endswith(".jinja") or "/" in asked)
    if asked is not None and is_path and not Path(asked).is_file():
        raise _no_such_template(asked, NAMES)


def _no_such_template(asked: str, names: Sequence[str]) -> UsageError:
    return UsageError(
        f"--chat-template {asked!r} is neither a file nor a built-in template",
        fix="pass a .jinja file, or one of: " + ", ".join(names),
        code="no-such-template",
    )


def with_defaults(source: str, arguments: Mapping[str, Any]) -> str:
    """The template with arguments as its defaults: a server that passes none renders the same, one
    that passes them wins."""
    defaults = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {jinja(value)} -%}}"
        # A line of its own: the renderer drops the line break after a block and nothing else,
        # so that the template's own beginning stays as it is.
        "{%- endif %}\n"
        for name, value in sorted(arguments.items())
    ]
    return "".join(defaults) + source


def jinja(value: Any) -> str:
    """A JSON value as a Jinja literal, with the lower-case constants that every engine knows."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{jinja(k)}: {jinja(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(jinja, value)) + "]"
    # Jinja reads an escaped surrogate pair as two characters: nothing is escaped that need not be.
    return json.dumps(value, ensure_ascii=False)
