"""Compare tool calls with the tools that their row declares."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from truetune.checks.conversations.rows import DataFacts
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding, share


@check()
def calls_match_tools(facts: DataFacts) -> Iterator[Finding]:
    """Each call names a declared tool and passes arguments that its schema accepts."""
    unknown: dict[str, list[int]] = defaultdict(list)
    wrong: dict[int, str] = {}
    undeclared: list[int] = []
    with_calls = 0
    for index, conversation in enumerate(facts.train):
        calls = [
            call["function"]
            for message in conversation.messages
            for call in message.get("tool_calls", ())
        ]
        with_calls += bool(calls)
        if calls and not conversation.tools:
            undeclared.append(index)
            continue
        tools = {t["function"]["name"]: t["function"] for t in conversation.tools or ()}
        for call in calls:
            if call["name"] not in tools:
                unknown[call["name"]].append(index)
            elif index not in wrong and (problem := call_problem(call, tools[call["name"]])):
                wrong[index] = f"{call['name']}: {problem}"
    if undeclared:
        yield rows_finding(
            facts.names,
            undeclared,
            code="tools-undeclared",
            level="warning",
            what=f"{share(len(undeclared), with_calls)} with tool calls declare no tools",
            why="a served prompt lists the tools; here the model learns to call tools that its "
            "prompt does not mention",
            fix="add a tools column, or specify it with --columns tools=COLUMN",
        )
    if unknown:
        rows = sorted({i for group in unknown.values() for i in group})
        names = ", ".join(map(repr, list(unknown)[:3]))
        yield rows_finding(
            facts.names,
            rows,
            code="tool-unknown",
            level="warning",
            what=f"{share(len(rows), with_calls)} with tool calls call a tool that the row does "
            f"not declare: {names}",
            why="the name was probably changed in one place only",
            fix="declare it, or rename the call",
        )
    if wrong:
        first = min(wrong)
        yield rows_finding(
            facts.names,
            wrong,
            code="tool-arguments",
            level="warning",
            what=f"{share(len(wrong), with_calls)} with tool calls pass arguments that the tool's "
            "schema does not accept",
            why=f"the first error: {wrong[first]}",
            fix="correct the call, or the tool's parameters",
        )


def call_problem(call: Mapping[str, Any], tool: Mapping[str, Any]) -> str:
    """What is wrong with a call's arguments; "" if its schema finds nothing wrong."""
    arguments = call["arguments"]
    schema = tool.get("parameters")
    if isinstance(arguments, str) and arguments.lstrip()[:1] in ("{", "["):
        return f"the arguments are text, but not a complete JSON object: {_broken(arguments)}"
    if not isinstance(arguments, Mapping):
        return f"the arguments are {_kind(arguments)}, not an object"
    return value_problem(arguments, schema, "") if isinstance(schema, Mapping) else ""


def _broken(text: str) -> str:
    """Where JSON breaks off, and the text."""
    try:
        json.loads(text)
    except ValueError as error:
        return f"{text[:60]!r}, {error}; a server's parser rejects such a call"
    except RecursionError:
        return "it is nested too deeply"
    return f"{text[:60]!r}"


# The types of JSON Schema; a whole float is an integer there.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, list | tuple),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: _is_number(v) and float(v).is_integer(),
    "number": lambda v: _is_number(v),
}
# What people write in place of them.
_ALIASES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
    "none": "null",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def value_problem(value: Any, schema: Mapping[str, Any], path: str, depth: int = 0) -> str:
    """The first violation of type, enum, required, properties or items; "" for none.

    Other keywords of JSON Schema are not judged, so they raise no alarm.
    """
    name = path or "the arguments"
    problem = _type_problem(value, schema.get("type"), name)
    if problem or depth > 20:
        return problem
    allowed = schema.get("enum")
    if isinstance(allowed, Sequence) and not isinstance(allowed, str) and value not in allowed:
        return f"{name} is {value!r}, which is not one of {', '.join(map(repr, list(allowed)[:6]))}"
    if isinstance(value, Mapping):
        return _object_problem(value, schema, path, depth)
    items = schema.get("items")
    if isinstance(value, list | tuple) and isinstance(items, Mapping):
        for index, item in enumerate(value):
            if problem := value_problem(item, items, f"{path}[{index}]", depth + 1):
                return problem
    return ""


def _type_problem(value: Any, declared: Any, name: str) -> str:
    listed = [declared] if isinstance(declared, str) else declared
    if not isinstance(listed, Sequence):
        return ""
    kinds = [_ALIASES.get(str(kind).lower(), str(kind).lower()) for kind in listed]
    if not kinds or any(kind not in _TYPES or _TYPES[kind](value) for kind in kinds):
        return ""
    return f"{name} is {_kind(value)}, not {' or '.join(kinds)}"


def _object_problem(
    value: Mapping[str, Any], schema: Mapping[str, Any], path: str, depth: int
) -> str:
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    for key in required if isinstance(required, Sequence) and not isinstance(required, str) else ():
        if key not in value:
            return f"{_joined(path, key)} is required but missing"
    for key, inner in value.items():
        if key in known:
            if isinstance(known[key], Mapping) and (
                problem := value_problem(inner, known[key], _joined(path, key), depth + 1)
            ):
                return problem
        elif known and not schema.get("additionalProperties"):
            return f"{_joined(path, key)} is not a parameter ({', '.join(map(str, known))})"
    return ""


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else f"{key!r}"


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a boolean", type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if _is_number(value) else type(value).__name__)
