"""Convert tools and tool calls to their canonical form.

Input:  what rows hold: OpenAI's form, bare functions, JSON text of either, sharegpt's
        function_call, Anthropic's tool_use.
Does:   parses and wraps; changes no name and no argument.
Output: `{"type": "function", "function": {...}}` objects, arguments parsed where they are objects.
"""

from __future__ import annotations

import json
from typing import Any

from truetune.data.rows import BadRow, excerpt, kind, missing


def tools_of(value: Any) -> tuple[dict[str, Any], ...] | None:
    """The `tools` column; None if it is empty.

    Raises:
        BadRow: `bad-tools`.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "bad-tools", "the tools are not JSON")
    if missing(value) or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
        return None
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list | tuple):
        raise BadRow("bad-tools", f"the tools are {kind(items)}, not a list", fix=_TOOLS_FIX)
    return tuple(_tool(item) for item in items)


_TOOLS_FIX = 'use [{"type": "function", "function": {"name": ..., "parameters": ...}}]'


def _tool(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        item = _parsed(item, "bad-tools", "a tool is not JSON")
    if not isinstance(item, dict):
        raise BadRow("bad-tools", f"a tool is {kind(item)}, not an object", fix=_TOOLS_FIX)
    if "function" not in item:
        item = {"type": "function", "function": item}
    function = item["function"]
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise BadRow("bad-tools", "a tool has no name", fix=_TOOLS_FIX)
    return item if "type" in item else {"type": "function", **item}


def calls_of(value: Any) -> list[dict[str, Any]]:
    """Tool calls from a `tool_calls` field, or the text of a function_call turn.

    Raises:
        BadRow: `bad-tool-call`.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "bad-tool-call", "a tool call is not JSON")
    if missing(value) or value in ("", []) or (isinstance(value, str) and not value.strip()):
        return []
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list | tuple):
        raise BadRow("bad-tool-call", f"tool calls are {kind(items)}, not a list", fix=_CALL_FIX)
    return [_call(item) for item in items]


_CALL_FIX = 'use {"name": "...", "arguments": {...}}'


def _call(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        item = _parsed(item, "bad-tool-call", "a tool call is not JSON")
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise BadRow("bad-tool-call", "a tool call has no function name", fix=_CALL_FIX)
    known = [key for key in ("arguments", "parameters", "input") if key in function]
    arguments = _arguments(function[known[0]] if known else {})
    inner = {
        "name" if key == "name" else "arguments": function["name"] if key == "name" else arguments
        for key in function
        if key in ("name", *known[:1])
    }
    parts = {"type": "function", "function": {**inner, "arguments": arguments}}
    if not missing(item.get("id")) and item["id"] != "":
        parts["id"] = item["id"]
    if "function" not in item:
        return {key: parts[key] for key in ("type", "id", "function") if key in parts}
    # In the row's order: some templates print the whole call.
    order = dict.fromkeys([*(["type"] if "type" not in item else []), *item])
    return {key: parts[key] for key in order if key in parts}


def _arguments(value: Any) -> Any:
    # Templates disagree: some print arguments as they are, some through tojson. As an object they
    # come out as JSON in both; as text the second kind would quote them twice.
    if missing(value) or value == "":
        return {}
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, dict) else value
    if isinstance(value, dict):
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRow(
                "bad-tool-call",
                "a tool call has an argument that is not valid JSON",
                why=str(error),
                fix="write dates and other objects as text",
            ) from error
        return value
    raise BadRow(
        "bad-tool-call", f"the arguments of a call are {kind(value)}, not an object", fix=_CALL_FIX
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _parsed(text: str, code: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(code, what, why=f"it reads {excerpt(text)}", fix="write valid JSON") from error
