"""The trainer's state on disk: what it continues, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune import SFTExample, SFTTrainer
from truetune.compute.batch import Limits
from truetune.engine.checkpoint import (
    STATE_FACTS,
    STATE_TENSORS,
    last_good,
    load_state,
    read_facts,
    save_state,
)
from truetune.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("error")

RUN = {"data": "abc", "batch_size": 2, "learning_rate": 0.1, "lora": None, "layers": ["q", "v"]}


def model(width: int = 4, **extra: torch.nn.Module) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(9, width), torch.nn.Linear(width, 9)
        return Stack({"embed": embed, "drop": torch.nn.Dropout(0.3), "head": head, **extra})


class Stack(torch.nn.Module):
    def __init__(self, layers: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = ids_BT
        for layer in self.children():
            hidden = layer(hidden)
        return hidden


def trainer(of: torch.nn.Module, **changes: Any) -> SFTTrainer:
    examples = [SFTExample([r, r + 1, r + 2, r], [0, 1, 1, 1]) for r in range(6)]
    settings: dict[str, Any] = {
        "max_seq_len": 4, "pad_id": 0, "batch_size": 2, "max_steps": 7, "max_lr": 0.1
    }  # fmt: skip
    return SFTTrainer(of, examples=examples, **(settings | changes))


def write(made: SFTTrainer, folder: Path) -> dict[str, Any]:
    """A checkpoint with the weights beside the state."""
    folder.mkdir()
    torch.save(made.model.state_dict(), folder / "weights.pt")
    save_state(made, folder, run=RUN)
    return json.loads((folder / STATE_FACTS).read_text())


def resumed(folder: Path, **changes: Any) -> SFTTrainer:
    fresh = model()
    fresh.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    made = trainer(fresh, **changes)
    load_state(made, folder, run=RUN)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    made = trainer(model())
    for _ in range(3):
        made.train_step()
    write(made, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, optim: str, at: int) -> None:
    torch.manual_seed(1)
    whole = trainer(model(), optim=optim)
    steps = []
    for step in range(7):
        if step == at:
            write(whole, tmp_path / "c")
        steps.append(whole.train_step())
    torch.manual_seed(99)
    again = resumed(tmp_path / "c", optim=optim)
    assert again.step == at
    assert [again.train_step() for _ in range(at, 7)] == steps[at:]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lowered_limits_are_resumed(tmp_path: Path) -> None:
    """A run whose micro-batch was halved goes on with the smaller one."""
    made = trainer(model(), batch_size=4)
    assert made.batcher.limits.halve(made.batcher.micro_batches(0)[0])
    write(made, tmp_path / "c")
    again = resumed(tmp_path / "c", batch_size=4)
    assert again.batcher.limits == made.batcher.limits == Limits(2)
    assert [len(b.rows) for b in again.batcher.micro_batches(1)] == [2, 2]


def test_the_facts(folder: Path) -> None:
    facts = read_facts(folder)
    assert facts["step"] == 3
    assert facts["run"] == RUN
    assert set(facts["files"]) == {"weights.pt", STATE_TENSORS}
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", [STATE_TENSORS, STATE_FACTS, "weights.pt"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        load_state(trainer(model()), folder, run=RUN)
    assert name in str(caught.value)
    assert caught.value.where == str(folder)


@pytest.mark.parametrize("name", [STATE_TENSORS, "weights.pt"])
def test_a_file_that_was_cut_or_grew(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for damaged in (content[:-1], content + b"\0", b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="changed after they were written") as caught:
            read_facts(folder)
        assert name in str(caught.value)
    (folder / name).write_bytes(content)
    assert read_facts(folder)["step"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"step": 1, "run": {}, "files": ["weights.pt"]}',
        '{"step": 1, "run": {}, "files": {"weights.pt": null}}',
        '{"step": 1, "files": {}}',
        '{"run": {}, "files": {}}',
    ],
)
def test_damaged_facts(folder: Path, text: str) -> None:
    (folder / STATE_FACTS).write_text(text)
    with pytest.raises(CheckpointError, match="incomplete"):
        read_facts(folder)


@pytest.mark.parametrize("name", [STATE_TENSORS, STATE_FACTS, "weights.pt"])
def test_one_flipped_bit_anywhere(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    places = [
        (at, bit) for at in range(0, len(content), max(1, len(content) // 150)) for bit in (0, 5)
    ]
    for at, bit in places:
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            read_facts(folder)
        assert caught.value.code == "checkpoint-damaged"
    assert len(places) > 100
    (folder / name).write_bytes(content)
    assert read_facts(folder)["step"] == 3


@pytest.mark.parametrize("changes", [{"step": 2}, {"run": {**RUN, "data": "b"}}, {"limits": []}])
def test_edited_facts(folder: Path, changes: dict[str, Any]) -> None:
    facts = json.loads((folder / STATE_FACTS).read_text())
    (folder / STATE_FACTS).write_text(json.dumps(facts | changes))
    with pytest.raises(CheckpointError, match=STATE_FACTS):
        load_state(trainer(model()), folder, run=RUN)
    # The same in another layout is the same.
    (folder / STATE_FACTS).write_text(json.dumps(facts))
    assert read_facts(folder)["step"] == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "deep/config.json"])
def test_a_file_that_was_added(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"not written with it: {name}"):
        read_facts(folder)
    (folder / name).unlink()
    # What file systems and file managers leave is none.
    (folder / ".nfs0001").write_text("")
    assert read_facts(folder)["step"] == 3


def test_the_last_good_one(tmp_path: Path) -> None:
    assert last_good([]) == (None, [])
    made, folders = trainer(model()), []
    for step in (1, 2, 3):
        made.train_step()
        folders.append(tmp_path / f"step-{step}")
        write(made, folders[-1])
    good, passed = last_good(folders)
    assert good is not None
    assert (good.folder, good.facts["step"], passed) == (folders[2], 3, [])
    (folders[2] / "weights.pt").write_bytes(b"")
    (folders[1] / STATE_FACTS).unlink()
    good, passed = last_good(folders)
    assert good is not None
    assert (good.folder, good.facts["step"]) == (folders[0], 1)
    assert [(f.code, f.level, f.where) for f in passed] == [
        ("checkpoint-damaged", "warning", str(folder)) for folder in folders[:0:-1]
    ]
    assert all("continues from step 1 instead" in f.what for f in passed)
    (folders[0] / STATE_TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        last_good(folders)
    assert caught.value.where == str(folders[2])


def test_facts_that_were_checked_are_not_checked_again(folder: Path) -> None:
    facts = read_facts(folder)
    (folder / "weights.pt").unlink()
    made = trainer(model())
    load_state(made, folder, run=RUN, facts=facts)
    assert made.step == 3


def test_other_settings_are_named_with_both_values(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_state(trainer(model()), folder, run=RUN | {"batch_size": 4, "data": "xyz"})
    for part in ("batch_size: 2 then, 4 now", "data: 'abc' then, 'xyz' now"):
        assert part in str(caught.value)
    assert "learning_rate" not in str(caught.value)


def test_a_setting_that_the_checkpoint_does_not_know(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="optim: None then, 'sgd' now"):
        load_state(trainer(model()), folder, run=RUN | {"optim": "sgd"})


def test_settings_are_compared_as_they_are_written(folder: Path) -> None:
    made = trainer(model())
    load_state(made, folder, run=RUN | {"layers": ("q", "v")})
    assert made.step == 3


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: model(extra=torch.nn.Linear(9, 9)), "extra"),
        (lambda: model().requires_grad_(False), "embed.weight"),
        (lambda: model(width=5), r"\(9, 4\), but now has \(9, 5\)"),
    ],
)
def test_other_trainable_parameters(folder: Path, other: Any, named: str) -> None:
    now = other()
    now.head.requires_grad_(True)
    made = trainer(now)
    with pytest.raises(CheckpointError, match=named):
        load_state(made, folder, run=RUN)
    assert made.step == 0
