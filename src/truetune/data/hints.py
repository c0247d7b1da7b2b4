"""Which columns could be the prompt and the answer, for errors and warnings about columns.

Input:  rows that no schema takes, or a row and the columns that its schema leaves out.
Does:   names columns by their name and content alone; it never guesses by their order among many.
Output: a mapping to suggest, in words.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.data.rows import Row, evenly, kind, missing, names
from truetune.errors import DataError

Path_ = tuple[str, ...]

_PROMPTS = (
    *("prompt", "question", "questions", "query", "problem", "instruction", "q", "input"),
    *("user", "human", "request", "ask"),
)
_ANSWERS = (
    *("completion", "answer", "answers", "response", "responses", "solution", "output", "a"),
    *("assistant", "reply", "target", "summary", "chosen"),
)
_CONTEXTS = ("context", "passage", "document", "paragraph", "article", "background", "input")
_SYSTEMS = ("system_message", "system_instruction", "sys_prompt", "sys")
_LABELS = (
    *("label", "labels", "class", "target", "sentiment", "intent"),
    *("completion", "answer", "response", "solution", "output", "summary"),
)
# Columns that say which row this is and where it is from.
WHICH = re.compile(
    r"(.*[_-])?(id|ids|uid|uuid|guid|idx|index|hash|sha1|sha256|md5|url|source|dataset|subset|split"
    r"|timestamp|created_at|date|license|language|lang)|__index_level_\d+__|unnamed: \d+|",
    re.IGNORECASE,
)
_JUDGED = re.compile(r"role|model|method|type|score|rating|category|topic|rejected", re.IGNORECASE)
REJECTED = re.compile(r"rejected([_-].*)?|.*[_-]rejected|dispreferred", re.IGNORECASE)
_DEEPEST = 4
_MOST_ROWS = 200
_GENERAL = "--columns prompt=COLUMN,completion=COLUMN"


def columns_hint(rows: Sequence[Row]) -> tuple[str, str]:
    """What to say about rows that no schema takes: a cause ("" if there is none), and the fix."""
    sample = evenly(rows, _MOST_ROWS)
    columns = list(dict.fromkeys(name for row in sample for name in row.fields))
    preferences = _preferences(sample, columns)
    if preferences:
        return preferences
    if any(_reads_like_text(name) for name in columns):
        return _no_header(rows[0].file, len(columns))
    flat = [_flat(row.fields) for row in sample]
    paths = list(dict.fromkeys(path for fields in flat for path in fields))
    picks = _picks(flat, paths)
    nested = any(len(path) > 1 for path in paths)
    if not nested:
        if picks:
            if any("," in path[0] for path in picks.values()):
                renamed = [f"{path[0]!r} to {slot}" for slot, path in picks.items()]
                return "", f"rename the columns: {', '.join(renamed)}"
            pairs = ",".join(f"{slot}={path[0]}" for slot, path in picks.items())
            return "", f"map the columns, for example --columns {shlex.quote(pairs)}"
        if len(columns) < 2:
            return "", 'write each row as {"messages": [{"role": "user", "content": "..."}, ...]}'
        return "", f"map the columns: {_GENERAL}, with two of {names(columns)}"
    why = f"nested fields are not read: {names('.'.join(p) for p in paths if len(p) > 1)}"
    if not picks:
        wanted = "'{prompt: .FIELD.FIELD, completion: .FIELD.FIELD}'"
        return why, f"write them as columns: jq -c {wanted} {_files(rows[0].file)}"
    for slot, path in picks.items():
        if any(_texts(fields.get(path)) for fields in flat):
            picks[slot] = (*path, "[0]")
    return why, f"write them as columns: {_jq(picks, rows[0].file)}"


def nested_column(column: str, rows: Sequence[Row], source: str) -> DataError | None:
    """The error for a column that names a field inside another (`data.input.text`), else None."""
    outer = re.split(r"[.\[/]", column, maxsplit=1)[0]
    inside = next((row for row in rows if isinstance(row.fields.get(outer), dict | list)), None)
    if outer == column or inside is None:
        return None
    fix = columns_hint(rows)[1]
    if "jq -c" not in fix:
        wanted = "'{prompt: .FIELD.FIELD, completion: .FIELD.FIELD}'"
        fix = f"write them as columns: jq -c {wanted} {_files(inside.file)}"
    return DataError(
        f"there is no column {column!r}: nested fields are not read",
        where=source,
        why=f"the column {outer} holds {kind(inside.fields[outer])}",
        fix=fix,
        code="no-such-column",
    )


def left_out(
    schema: str, picks: Mapping[str, str], fields: Mapping[str, Any], name: str
) -> str | None:
    """The slot that a column which the schema leaves out plainly belongs to, or None.

    A column whose text the prompt contains already is not lost.
    """
    value, lower = fields[name], name.lower()
    if schema == "text":
        given = not isinstance(value, list | dict | bool) and str(value or "0").strip()
        return "completion" if lower in _LABELS and given and value is not None else None
    if not isinstance(value, str) or not value.strip():
        return None
    if lower in _SYSTEMS and "system" not in picks:
        return "system"
    if schema not in ("alpaca", "prompt-completion", "reasoning") or lower not in _CONTEXTS:
        return None
    asked = [fields.get(column) for slot, column in picks.items() if slot in _SLOTS_OF_PROMPT]
    if any(isinstance(text, str) and value.strip() in text for text in asked):
        return None
    return "input"


_SLOTS_OF_PROMPT = ("prompt", "problem", "instruction", "input", "system")


def keeping(
    row: Row,
    schema: str,
    picks: Mapping[str, str],
    mapping: Mapping[str, str],
    name: str,
    slot: str,
) -> str:
    """How to keep a column that `left_out` named."""
    if slot in picks:
        return f"write {name} and {picks[slot]} into one column"
    wanted = dict(mapping)
    if slot == "completion":
        wanted = {"prompt": mapping.get("text", picks["text"])}
    elif slot == "input" and schema == "prompt-completion":
        renamed = {"prompt": "instruction", "completion": "output"}
        wanted = {t: s for t, s in mapping.items() if t not in renamed.values()}
        for old, new in renamed.items():
            wanted.pop(picks[old], None)
            wanted[new] = mapping.get(picks[old], picks[old])
    wanted[slot] = name
    pairs = ",".join(f"{target}={column}" for target, column in wanted.items())
    text = "" if isinstance(row.fields[name], str) else "write its values as text, then "
    return f"{text}keep it with --columns {shlex.quote(pairs)}, or remove the column"


def _preferences(rows: Sequence[Row], columns: list[str]) -> tuple[str, str] | None:
    by_lower = {column.lower(): column for column in columns}
    if not {"chosen", "rejected"} <= by_lower.keys():
        return None
    chosen = by_lower["chosen"]
    why = "this is preference data (chosen and rejected answers); truetune does not train on "
    why += "preferences"
    turns = next((row.fields[chosen] for row in rows if row.fields.get(chosen)), None)
    first = turns[0] if isinstance(turns, list) else None
    speaker = first.get("role", first.get("from")) if isinstance(first, dict) else None
    prompt = next((by_lower[n] for n in _PROMPTS if n in by_lower), None)
    if speaker is not None and (speaker not in ("assistant", "gpt") or prompt is None):
        return why, f"train on the chosen answers alone: --columns messages={chosen}"
    if prompt is not None:
        pairs = shlex.quote(f"prompt={prompt},completion={chosen}")
        return why, f"train on the chosen answers alone: --columns {pairs}"
    return why, (
        "to train on the chosen answers alone, write them as rows "
        '{"prompt": "...", "completion": "..."}'
    )


def _reads_like_text(name: str) -> bool:
    # No published dataset among those looked at has a column name of more than six words.
    return len(name.split()) > 6 or (" " in name.strip() and name.rstrip()[-1:] in (".", "?", "!"))


def _no_header(file: str, num_columns: int) -> tuple[str, str]:
    why = "the first line reads like a row, not like column names"
    if num_columns == 2 and Path(file).suffix.lower() == ".csv":
        named = shlex.quote(f"{Path(file).stem}_named.csv")
        command = f"(echo prompt,completion; cat {shlex.quote(file)}) > {named}"
        return why, f"if the file has no header line, add one: {command}"
    return why, "if the file has no header line, add one with the names of the columns"


def _flat(fields: Mapping[str, Any], before: Path_ = ()) -> dict[Path_, Any]:
    found: dict[Path_, Any] = {}
    for name, value in fields.items():
        path = (*before, name)
        if isinstance(value, dict) and value and len(path) < _DEEPEST:
            found |= _flat(value, path)
        else:
            found[path] = value
    return found


def _picks(flat: Sequence[Mapping[Path_, Any]], paths: list[Path_]) -> dict[str, Path_]:
    """Slot to field; {} where names and content do not say it."""
    for path in paths:
        roles = [one.get("role") for one in _turns(flat[0].get(path))]
        if "assistant" in roles:
            return {"messages": path}
    usable = [path for path in paths if not _about(path[-1]) and _varies(flat, path)]
    prompt, answer = _named(usable, _PROMPTS, ()), None
    answer = _named(usable, _ANSWERS, (prompt,))
    context = _named(usable, _CONTEXTS, (prompt, answer))
    others = [p for p in usable if p not in (prompt, answer) and not _is_named(p, _CONTEXTS)]
    if prompt is None and answer is None and len(others) == 2:
        prompt, answer = others
    elif prompt is None and len(others) == 1 and answer is not None:
        prompt = others[0]
    elif answer is None and len(others) == 1 and prompt is not None:
        answer = others[0]
    if prompt is None or answer is None:
        return {}
    if context is not None and _is_text(flat, prompt):
        return {"instruction": prompt, "input": context, "output": answer}
    return {"prompt": prompt, "completion": answer}


def _about(name: str) -> bool:
    return bool(WHICH.fullmatch(name) or _JUDGED.fullmatch(name))


def _named(
    paths: list[Path_], wanted: Sequence[str], taken: Sequence[Path_ | None]
) -> Path_ | None:
    free = [path for path in paths if path not in taken]
    return next((p for name in wanted for p in free if _is_named(p, (name,))), None)


def _is_named(path: Path_, wanted: Sequence[str]) -> bool:
    return any(part.lower() in wanted for part in path)


def _varies(flat: Sequence[Mapping[Path_, Any]], path: Path_) -> bool:
    """Whether a field holds text (or turns) that is not the same in all rows."""
    values = [v for v in (fields.get(path) for fields in flat) if v and not missing(v)]
    if not values or not all(isinstance(v, str) or _turns(v) or _texts(v) for v in values):
        return False
    return len(values) == 1 or len({json.dumps(v, default=repr) for v in values}) > 1


def _is_text(flat: Sequence[Mapping[Path_, Any]], path: Path_) -> bool:
    return all(isinstance(fields.get(path), str | None) for fields in flat)


def _turns(value: Any) -> list[dict[str, Any]]:
    turns = isinstance(value, list) and all(isinstance(v, dict) and "role" in v for v in value)
    return value if turns else []


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _jq(picks: Mapping[str, Path_], file: str) -> str:
    fields = [f"{slot}: {_jq_path(path)}" for slot, path in picks.items()]
    return f"jq -c {shlex.quote('{' + ', '.join(fields) + '}')} {_files(file)}"


def _jq_path(path: Path_) -> str:
    parts = [
        part if part == "[0]" else "." + (part if part.isidentifier() else json.dumps(part))
        for part in path
    ]
    return "".join(parts)


def _files(file: str) -> str:
    lines = Path(file).suffix.lower() in (".jsonl", ".ndjson")
    return f"{shlex.quote(file) if lines else 'ROWS.jsonl'} > flat.jsonl"
