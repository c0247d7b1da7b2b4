"""Rewrite command-line options in messages as Python arguments."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

from truetune.recipe.settings import setting_types

_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)(?:[ =]([\w./-]*\w))?")
# What functions of the facade take beside the settings.
_OWN: dict[str, Any] = {
    **dict.fromkeys(("base", "resume", "quant", "adapter", "onto", "system", "url"), str),
    **dict.fromkeys(("pattern", "tasks", "row", "merged", "quantised", "gguf"), str),
    "to": Literal["merged", "gguf", "ollama", "mlx", "vllm", "sglang"],
    "match": Literal["exact", "contains", "number", "regex", "json", "none"],
    **dict.fromkeys(("max_new_tokens", "limit", "shots", "samples", "top_k", "port"), int),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), float),
    **dict.fromkeys(("smoke_test", "go_template", "public", "unverified", "fast"), bool),
}
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")


def in_python(text: str) -> str:
    """`--max-length 512` as `max_length=512`; lines that are typed into a shell stay."""
    return "\n".join(
        line if re.search(r"\btruetune [a-z]|\btorchrun ", line) else _OPTION.sub(_argument, line)
        for line in text.split("\n")
    )


def _argument(found: re.Match[str]) -> str:
    name, value = found[1].replace("-", "_"), found[2]
    types = {**setting_types(), **_OWN}
    rest = found[0][len(f"--{found[1]}") :]
    if name not in types and name.removeprefix("no_") in types:
        return f"{name.removeprefix('no_')}=False{rest}"
    if name not in types:
        return found[0]
    declared = types[name]
    if declared is bool:
        return f"{name}=True{rest}"
    if value and _is_value(declared, value):
        return f"{name}={value if _NUMBER.fullmatch(value) or value.isupper() else repr(value)}"
    return f"{name}{rest}"


def _is_value(declared: Any, value: str) -> bool:
    """Whether the word after an option is its value, and not the sentence going on."""
    kinds = [declared, *get_args(declared)]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return value in choices or bool(_NUMBER.fullmatch(value)) or value.isupper()
