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


def _elsewhere(name: str) -> Callable[[Path], None]:
    """Moved out of the folder, with a link in its place."""

    def move(folder: Path) -> None:
        place = folder.parent / "elsewhere"
        place.mkdir(exist_ok=True)
        shutil.move(folder / name, place / name)
        (folder / name).symlink_to(Path("..") / place.name / name)

    return move


def _number(value: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        def change(tensors: dict[str, Any]) -> None:
            tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = value

        _tensors(folder / WEIGHTS, change)

    return write


def _tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def shards(folder: Path, *, twice: bool = False, keep: bool = False) -> None:
    """Two shards in place of one file.

    Args:
        twice: a tensor of the first is in the second, too, with other numbers.
        keep: the one file stays.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for at, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"model-0000{at}-of-00002.safetensors"
        weight_map.update(dict.fromkeys(part, name))
        held = {n: tensors[n] for n in part}
        if twice and at == 2:
            held[names[0]] = tensors[names[0]] + 1
        save_file(held, folder / name, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if not keep:
        (folder / WEIGHTS).unlink()


def _name_twice(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    again = json.dumps({"model.norm.weight": header["model.layers.0.input_layernorm.weight"]})
    made = (json.dumps(header)[:-1] + ", " + again[1:]).encode()
    (folder / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + length :])


def _named_weights(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    edit_json(folder / "config.json", transformers_weights="other.safetensors")


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
    **{
        f"a link to {name}": (_elsewhere(name), "model-link-outside")
        for name in ("config.json", "tokenizer.json", "chat_template.jinja")
    },
    "NaN": (_number(float("nan")), "weights-not-finite"),
    "infinity": (_number(float("inf")), "weights-not-finite"),
    "weights of another name": (_named_weights, "model-weights-elsewhere"),
    "quantised by name": (
        lambda folder: edit_json(
            folder / "config.json", quantization_config={"quant_method": "fp8"}
        ),
        "model-not-quantised",
    ),
    "a file beside shards": (lambda folder: shards(folder, keep=True), "model-weights-twice"),
    "a tensor in two shards": (lambda folder: shards(folder, twice=True), "model-weights-twice"),
    "a name twice": (_name_twice, "model-weights-damaged"),
}

ADAPTER = "adapter_model.safetensors"


def _adapter(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def _halved(tensors: dict[str, Any]) -> None:
    tensors.update({n: t[: len(t) // 2] for n, t in tensors.items() if "lora_B" in n})


def _every_second_gone(tensors: dict[str, Any]) -> None:
    for name in sorted(tensors)[::2]:
        del tensors[name]


def _adapter_pipe(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    os.mkfifo(folder / ADAPTER)


# Patterns that Python's engine tries for ages on the names of layers.
_SLOW = r"(\w+\.?)+!"
REFUSED_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another rank": (_adapter(r=10**12), "model-shape-mismatch"),
    "another type": (_adapter(peft_type="EVIL"), "adapter-type"),
    "a pipe": (_adapter_pipe, "model-file-hostile"),
    "halved": (lambda folder: _tensors(folder / ADAPTER, _halved), "adapter-wrong-base"),
    "half of them": (
        lambda folder: _tensors(folder / ADAPTER, _every_second_gone),
        "adapter-wrong-base",
    ),
    "NaN": (
        lambda folder: _tensors(folder / ADAPTER, lambda t: t[min(t)].fill_(float("nan"))),
        "weights-not-finite",
    ),
    "a module without weights": (_adapter(modules_to_save=["lm_head"]), "adapter-wrong-base"),
    "a library to import": (
        _adapter(megatron_config={"a": 1}, megatron_core="megatron.core"),
        "adapter-type",
    ),
    "slow target_modules": (_adapter(target_modules=_SLOW), "adapter-config-hostile"),
    "slow rank_pattern": (_adapter(rank_pattern={_SLOW: 2}), "adapter-config-hostile"),
    "many ranks": (
        _adapter(rank_pattern={f"x{i}": 4 for i in range(30_000)}),
        "adapter-config-hostile",
    ),
    "many layers": (_adapter(layer_replication=[[0, 1]] * 200_000), "adapter-config-hostile"),
    "many names": (
        _adapter(target_modules=["q_proj", *map(str, range(10**6))]),
        "adapter-config-hostile",
    ),
}
