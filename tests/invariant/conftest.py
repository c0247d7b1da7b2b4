"""The builders of the tests above are importable here too, also when this folder runs alone; and
each family as a folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """A family of tiny_families.py as a model folder, written when it is first asked for."""
    from tiny_families import FAMILIES
    from tiny_models import write_model

    place = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: write_model(place / name, name, **FAMILIES[name]))
