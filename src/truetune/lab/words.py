"""Word lists: a YAML file of this room -> its lists, each a tuple of lines."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def words(name: str) -> dict[str, Any]:
    """The lists of `NAME.yaml`, a path below this room, by their keys."""
    text = (Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")
    # The base loader makes text of every scalar: `true` and `12` are words here.
    return {key: _lines(value) for key, value in yaml.load(text, yaml.BaseLoader).items()}


def _lines(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lines(below) for key, below in value.items()}
    # A list is a literal block, one entry a line: no entry needs quotes or escapes.
    return tuple(value.splitlines())
