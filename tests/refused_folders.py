"""Model folders that training refuses before it reads a weight, by what was done to them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import edit_json

WEIGHTS = "model.safetensors"


def _header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    made = json.dumps(change(header) or header).encode()
    (folder / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + length :])


def _norm(**facts: Any) -> Callable[[Path], None]:
    """A fact of one tensor in the header."""
    return lambda folder: _header(folder, lambda h: h["model.norm.weight"].update(facts))


def _renamed(folder: Path) -> None:
    _header(folder, lambda h: {n if n == "__metadata__" else f"x.{n}": h[n] for n in h})


def _half(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))


def _index(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return write


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _device(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def _one_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    norm = load_file(folder / WEIGHTS)["model.norm.weight"]
    save_file({"model.norm.weight": norm}, folder / WEIGHTS, metadata={"format": "pt"})


def _code(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in half": (_half, "model-weights-damaged"),
    "a shape that its bytes do not hold": (_norm(shape=[10**18]), "model-weights-damaged"),
    "a negative shape": (_norm(shape=[-32]), "model-weights-damaged"),
    "an unknown type": (_norm(dtype="F999"), "model-weights-damaged"),
    "one tensor": (_one_tensor, "model-weights-missing"),
    "renamed tensors": (_renamed, "model-weights-missing"),
    "another shape": (
        lambda folder: edit_json(folder / "config.json", head_dim=10**12),
        "model-shape-mismatch",
    ),
    "heads that share no keys": (
        lambda folder: edit_json(folder / "config.json", num_key_value_heads=7),
        "model-shape-mismatch",
    ),
    "a pickle": (_pickled, "model-pickle"),
    "an index to another folder": (_index("../outside.safetensors"), "model-config-unreadable"),
    "an index to a device": (_index("/dev/zero"), "model-config-unreadable"),
    "a pipe": (_pipe, "model-file-hostile"),
    "a link to a device": (_device, "model-file-hostile"),
    "code": (_code, "model-remote-code"),
}
