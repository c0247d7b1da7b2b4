"""The notebooks: made from their sources, on the public interface alone, and they run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from scripts.notebooks import FOLDER, cells, notebook

import truetune

SOURCES = sorted(FOLDER.glob("*.py"))


def test_there_are_three() -> None:
    assert [path.stem for path in SOURCES] == ["first_sft", "masks_by_hand", "reasoning_traces"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_its_source(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    made = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert made == json.loads(notebook(source))
    assert [cell["cell_type"] for cell in made["cells"]][:2] == ["markdown", "code"]
    assert made["cells"][0]["source"][0].startswith("# ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_uses_the_public_interface_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("truetune"):
            assert node.module == "truetune"
            assert {name.name for name in node.names} <= set(truetune.__all__)
        if isinstance(node, ast.Import):
            assert all(not name.name.startswith("truetune.") for name in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for kind, text in cells(path.read_text(encoding="utf-8")):
        if kind == "code":
            exec(compile(text, str(path), "exec"), names)
    if path.stem == "first_sft":
        assert names["reply"].text == "The river of Flanbarrow is the Gunnow."  # type: ignore[attr-defined]
        assert names["checked"].ok  # type: ignore[attr-defined]
    if path.stem == "masks_by_hand":
        sound, endless = names["sound"], names["endless"]
        assert sound[1].endswith("<|end|>")  # type: ignore[index]
        assert "<|end|>" not in endless[1]  # type: ignore[index]
        assert abs(sound[0] - endless[0]) < 0.05  # type: ignore[index]
    if path.stem == "reasoning_traces":
        assert names["reply"].text.startswith("<think>")  # type: ignore[attr-defined]
