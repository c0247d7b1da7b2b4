"""Tests that need a CUDA device: left out where there is none, and a table where there is one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

TABLE: list[tuple[str, str]] = []


def pytest_collection_modifyitems(items: list[Any]) -> None:
    here = Path(__file__).parent
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(skip)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Any:
    """Add a line to the table at the end."""
    return lambda text: TABLE.append((request.node.name, text))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TABLE:
        return
    import transformers

    name = torch.cuda.get_device_name()
    terminalreporter.section(f"{name}, torch {torch.__version__}, {transformers.__version__}")
    for test, text in TABLE:
        terminalreporter.line(f"{test:<58} {text}")
