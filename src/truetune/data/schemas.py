"""Recognise the schema of a row by its columns.

Input:  column names (and, for a list of turns, the keys of its first one).
Does:   matches them against the schemas below, the most specific first; names in any case.
Output: the schema's name and, for each of its slots, the column that fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from truetune.data.rows import names
from truetune.errors import DataError, UsageError

Names = tuple[str, ...]
Picks = dict[str, str]

# Slots of every schema but plain text.
_CHAT_OPTIONAL: dict[str, Names] = {
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
_TURNS: Names = ("messages", "conversations", "conversation")


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema: slots, and the column names that fill each, best first.

    Attributes:
        name: what --schema calls it.
        required: a row has the schema if each of these slots finds a column.
        optional: slots used where they are there.
    """

    name: str
    required: dict[str, Names]
    optional: dict[str, Names] = field(default_factory=dict)

    def pick(self, columns: Names, mapped: frozenset[str] = frozenset()) -> Picks | None:
        """Slot to column, None if a required slot finds none. No column fills two slots.

        Args:
            columns: the columns of the row.
            mapped: columns that --columns named; they go before others of the same slot.
        """
        by_lower = {column.lower(): column for column in reversed(columns)}
        picks: Picks = {}
        for slot, wanted in [*self.required.items(), *self.optional.items()]:
            free = [by_lower[n] for n in wanted if n in by_lower]
            free = [column for column in free if column not in picks.values()]
            free.sort(key=lambda column: column not in mapped)
            if free:
                picks[slot] = free[0]
            elif slot in self.required:
                return None
        return picks

    def needs(self) -> str:
        """The required columns, in words."""
        slots = [" or ".join(wanted[:3]) for wanted in self.required.values()]
        return f"{self.name}: {', '.join(slots)}"


SCHEMAS: tuple[Schema, ...] = (
    Schema("messages", {"messages": ("messages",)}, _CHAT_OPTIONAL),
    Schema("sharegpt", {"messages": ("conversations", "conversation")}, _CHAT_OPTIONAL),
    Schema(
        "instances",
        {"instruction": ("instruction",), "instances": ("instances",)},
        _CHAT_OPTIONAL,
    ),
    Schema(
        "reasoning",
        {
            "problem": ("problem", "question", "prompt", "query", "instruction"),
            "thinking": (
                *("thinking", "reasoning", "cot", "trace", "thought", "thoughts", "think"),
                *("reasoning_content", "chain_of_thought", "complex_cot", "rationale"),
                *("reasoning_trace", "thinking_trace", "deepseek_reasoning"),
            ),
            "solution": (
                *("solution", "answer", "response", "output", "completion", "final_answer"),
                "deepseek_solution",
            ),
        },
        {"input": ("input",), **_CHAT_OPTIONAL},
    ),
    Schema(
        "alpaca",
        {
            "instruction": ("instruction",),
            "output": ("output", "response", "completion", "answer"),
        },
        {"input": ("input", "context"), "history": ("history",), **_CHAT_OPTIONAL},
    ),
    Schema(
        "prompt-completion",
        {
            "prompt": ("prompt", "question", "query", "problem", "input"),
            "completion": ("completion", "response", "answer", "solution", "output"),
        },
        _CHAT_OPTIONAL,
    ),
    Schema("text", {"text": ("text",)}),
)
BY_NAME = {schema.name: schema for schema in SCHEMAS}
ALIASES = {
    "openai": "messages",
    "chatml": "messages",
    "self-instruct": "instances",
    "prompt_completion": "prompt-completion",
    "plain": "text",
}
# What --columns may name.
TARGETS: frozenset[str] = frozenset(
    {slot for schema in SCHEMAS for slot in (*schema.required, *schema.optional)}
    | {"conversations"}
)
# An object with one of these is a row itself, not a wrapper around a list of rows.
ROW_COLUMNS: frozenset[str] = frozenset(
    n for schema in SCHEMAS for wanted in schema.required.values() for n in wanted
)


@lru_cache(maxsize=4096)
def recognise(
    columns: Names, mapped: frozenset[str] = frozenset(), only: str | None = None
) -> tuple[str, Picks] | None:
    """The first schema that the columns fill and that uses every mapped column.

    Args:
        columns: the columns of a row.
        mapped: columns that --columns named.
        only: consider this schema alone.

    Returns:
        its name and its picks (not to be changed: they are shared), or None.
    """
    for schema in SCHEMAS:
        if only in ("messages", "sharegpt") and schema.name == only:
            # Asked for by name, the list of turns may stand under any of its names.
            schema = Schema(only, {"messages": _TURNS}, _CHAT_OPTIONAL)
        if only is not None and schema.name != only:
            continue
        picks = schema.pick(columns, mapped)
        if picks is not None and mapped <= set(picks.values()):
            return schema.name, picks
    return None


def recognise_row(
    fields: dict[str, Any], mapped: frozenset[str] = frozenset()
) -> tuple[str, Picks] | None:
    """As `recognise`; a list of turns is named for its keys (role or from), not its column."""
    found = recognise(tuple(fields), mapped)
    if found is None or found[0] not in ("messages", "sharegpt"):
        return found
    turns = fields[found[1]["messages"]]
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict):
        if "role" in first:
            return "messages", found[1]
        if "from" in first:
            return "sharegpt", found[1]
    return found


def schema_named(name: str) -> str | None:
    """The canonical name; None for "auto".

    Raises:
        UsageError: `unknown-schema`.
    """
    lowered = name.lower()
    if lowered == "auto":
        return None
    if lowered in BY_NAME or lowered in ALIASES:
        return ALIASES.get(lowered, lowered)
    raise UsageError(
        f"there is no schema {name!r}",
        where="--schema",
        fix=f"use one of auto, {', '.join(BY_NAME)}",
        code="unknown-schema",
    )


def no_schema(columns: Names, source: str, cause: str, fix: str) -> DataError:
    """The error for columns that no schema takes; cause and fix of `columns_hint`."""
    needs = "each schema needs: " + "; ".join(schema.needs() for schema in SCHEMAS)
    return DataError(
        "no schema fits the columns",
        where=source,
        why=f"{_there(columns)}; {cause or needs}",
        fix=fix,
        code="no-schema",
    )


def _there(columns: Names) -> str:
    return f"the columns are {names(columns)}" if columns else "there are no columns"


def schema_mismatch(columns: Names, wanted: str, source: str) -> DataError:
    """The error for a --schema that no row has."""
    found = recognise(columns)
    hint = f"the columns look like --schema {found[0]}" if found else "--schema auto lists them all"
    return DataError(
        f"no row has the schema {wanted}",
        where=source,
        why=f"{_there(columns)}; {BY_NAME[wanted].needs()}",
        fix=f"{hint}; --columns maps others",
        code="schema-mismatch",
    )
