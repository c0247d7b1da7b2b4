"""Files in an artifact's folder: what may be added to a finished run, and what may not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from truetune.run_dir import RunDir, sha256
from truetune.verification.files import check_files, check_record
from truetune.verification.record import Record


@pytest.fixture
def listed(tmp_path: Path) -> RunDir:
    """A finished run as far as its manifest goes."""
    run = RunDir(tmp_path / "listed")
    for name in ("model/model.safetensors", "model/README.md", "model/LICENSE", "recipe.yaml"):
        run.file(name).parent.mkdir(parents=True, exist_ok=True)
        run.file(name).write_text(name)
    run.finish({})
    return run


def checks_of(run: RunDir) -> tuple[Any, Any]:
    none: Any = {}
    names = ("model/model.safetensors", "model/README.md", "model/LICENSE")
    files = {name: sha256(run.file(name)) for name in names if run.file(name).is_file()}
    record = Record("", none, files, none, none, none, none, (), none, none, "")
    return check_files(run), check_record(run, record, "")


@pytest.mark.parametrize(
    "name",
    [
        *("LICENSE.safetensors", "README.py", "README/modeling_x.py", "LICENSE.py", "NOTICE.pt"),
        *("README.bin", "readme.json", "LICENCE.txt.py", "NOTICE.d/a.md", "notice_tensors.bin"),
        *("sub/README.md", "README.md\n", "license.safetensors.index.json"),
    ],
)
def test_what_only_begins_like_a_licence_is_no_licence(listed: RunDir, name: str) -> None:
    path = listed.file(f"model/{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    files, record = checks_of(listed)
    assert files.state == "failed"
    assert files.numbers["added"] == [f"model/{name}"]
    assert record.state == "failed"
    assert f"model/{name} was added" in record.numbers["differing"]


@pytest.mark.parametrize("name", ["NOTICE.md", "NOTICE", "LICENCE.txt", "license.md", "Readme"])
def test_a_card_a_licence_and_a_notice_may_be_added(listed: RunDir, name: str) -> None:
    listed.file(f"model/{name}").write_text("x")
    files, record = checks_of(listed)
    assert files.state == record.state == "passed"
    assert files.numbers["unlisted"] == [f"model/{name}"]


@pytest.mark.parametrize("kind", ["link", "pipe", "replaced"])
def test_a_card_that_is_no_file_of_its_own(listed: RunDir, kind: str) -> None:
    path = listed.file("model/README.md" if kind == "replaced" else "model/NOTICE.md")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("model.safetensors")
    assert check_files(listed).state == "failed"


def test_a_card_may_be_edited_or_removed(listed: RunDir) -> None:
    listed.file("model/README.md").write_text("mine")
    listed.file("model/LICENSE").unlink()
    assert check_files(listed).state == "passed"
