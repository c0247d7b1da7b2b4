"""First contacts: files in the shapes that published sets have are read whole, and train."""

from __future__ import annotations

from pathlib import Path

import pytest

from first_contact_files import FILES
from tiny_models import write_model
from tiny_runs import command
from truetune.data.load import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", FILES)
def test_a_published_shape_is_read_whole(tmp_path, name):
    write, number = FILES[name]
    loaded = load(write(tmp_path))
    assert len(loaded.conversations) == number
    assert not [finding for finding in loaded.findings if finding.level == "error"]
    assert len(set(loaded.places)) == number
    if loaded.schema != "text":
        for conversation in loaded.conversations:
            ask, say = conversation.messages[-2]["content"], conversation.messages[-1]["content"]
            assert ask.endswith("?")
            assert say.startswith("It is")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_published_shape_trains(tmp_path, model, name):
    write, _ = FILES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    run = tmp_path / "run"
    shown = command(
        *(
            "train",
            model,
            write(folder),
            "-o",
            run,
            "--max-steps",
            1,
            "--overlong",
            "truncate-prompt",
        )
    )
    assert shown.code == 0, shown.out + shown.err
    assert (run / "manifest.json").is_file()
