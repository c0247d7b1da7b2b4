"""Word lists: files that are read as they stand, and that an installed package has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import truetune
from truetune.lab.words import words

PACKAGE = Path(truetune.__file__).parent
LISTS = sorted(path.relative_to(PACKAGE / "lab") for path in PACKAGE.glob("lab/**/*.yaml"))


def test_every_word_is_text_and_every_line_is_an_entry() -> None:
    assert "true false" in words("world")["opposites"]
    assert words("building/plain")["ones"][:2] == ("zero", "one")
    assert words("building/plain")["forward"]["sum"][0] == "{a} + {b} = {v}"


@pytest.mark.parametrize("path", LISTS, ids=str)
def test_lists_hold_neither_blanks_nor_doubles(path: Path) -> None:
    def check(value: object, key: str) -> None:
        if isinstance(value, dict):
            assert value
            for name, below in value.items():
                check(below, name)
        else:
            assert isinstance(value, tuple), key
            assert value, key
            assert all(line == line.strip() != "" for line in value), key
            assert len(set(value)) == len(value), key

    check(words(str(path.with_suffix(""))), str(path))


def test_a_wheel_holds_every_file_that_is_not_code(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    root = PACKAGE.parent.parent
    if not (root / "pyproject.toml").is_file():
        pytest.skip("the package is installed: there is nothing to build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(root / "src", tmp_path / "src", ignore=ignored)
    code = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    ours = {
        path.relative_to(tmp_path / "src").as_posix()
        for path in (tmp_path / "src" / "truetune").rglob("*")
        if path.is_file()
    }
    assert {name for name in ours if name.endswith(".yaml")} >= {
        f"truetune/lab/{path.as_posix()}" for path in LISTS
    }
    assert ours <= packed
