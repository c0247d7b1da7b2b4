"""List a model's weight files and read their headers, without reading weights.

A safetensors file begins with the length of a JSON header (8 bytes, little endian) that gives
each tensor's dtype, shape and bytes, so names, shapes and completeness are known before a single
weight is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truetune.errors import ModelError
from truetune.findings import phrase
from truetune.model.source import ModelFiles, read_json, refuse_pointer
from truetune.system.lazy import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

WeightsFormat = Literal["safetensors", "pickle", "gguf"]

# Names of safetensors dtypes in torch.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# Bits of one number of each dtype that the format has.
_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# A header longer than this is no header; the library has the same limit.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorFacts:
    """What a header says of one tensor.

    Attributes:
        dtype: torch's name of it.
        shape: rows first.
        path: the file that holds it.
        start: its first byte in that file.
        num_bytes: its size there.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def weights_format(folder: Path) -> WeightsFormat | None:
    """The format of the weights in a folder, None if it holds none; safetensors wins."""
    names = [item.name for item in folder.iterdir() if item.is_file()]
    if any(name.endswith(".safetensors") or name == INDEX for name in names):
        return "safetensors"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return "pickle"
    return "gguf" if any(name.endswith(".gguf") for name in names) else None


def weight_files(files: ModelFiles) -> list[Path]:
    """The safetensors files that hold the model's weights, in the order of the index.

    Raises:
        ModelError: no weights, weights in another format only, shards missing, or one file beside
            shards of which nobody can say which are the model.
    """
    folder = files.folder
    wanted = ADAPTER_WEIGHTS if files.is_adapter else WEIGHTS
    if (folder / wanted).is_file():
        if not files.is_adapter and (folder / INDEX).is_file():
            _require_one_model(folder)
        return [folder / wanted]
    # A pipe, a device or a folder; a link that leads nowhere is a file that was not copied.
    if (folder / wanted).exists():
        raise ModelError(
            f"{wanted} is not a file but a folder, a pipe or a device, or a link to one",
            where=str(folder / wanted),
            why="the folder is damaged or malicious",
            fix="copy the file again from the source of the model",
            code="model-file-hostile",
        )
    if not files.is_adapter and (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    raise _no_weights(files, wanted)


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{index.name} lists no weights",
            where=str(index),
            fix="copy the file again from the source of the model",
            code="model-config-unreadable",
        )
    names = [name for name in weight_map.values() if _is_name(name)]
    if len(names) < len(weight_map):
        raise ModelError(
            f"{index.name} names weights outside its folder, or something that is not a file name",
            where=str(index),
            fix="copy the file again from the source of the model",
            code="model-config-unreadable",
        )
    names = list(dict.fromkeys(names))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weight files are missing: {listed(missing)}",
            where=str(index),
            why="the download or copy was not finished",
            fix="fetch the missing files, or the whole model again",
            code="model-shards-missing",
        )
    return [index.parent / name for name in names]


def _require_one_model(folder: Path) -> None:
    """An index that stayed when the model was saved again as one file names shards that are gone,
    or that file itself."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    others = {name for name in named if _is_name(name) and name != WEIGHTS}
    there = sorted(name for name in others if (folder / name).is_file())
    if there:
        raise _twice(
            f"{WEIGHTS} and the shards that {INDEX} lists ({listed(there)}) are both there",
            str(folder),
        )


def _twice(what: str, where: str) -> ModelError:
    return ModelError(
        f"the folder holds weights twice: {what}",
        where=where,
        why="programs differ in which of them they load, so they would load different models",
        fix="remove the weights that do not belong to the model, or fetch it again into an empty "
        "folder",
        code="model-weights-twice",
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value


def _no_weights(files: ModelFiles, wanted: str) -> ModelError:
    found = weights_format(files.folder)
    where = str(files.folder)
    if found == "pickle":
        return ModelError(
            "the weights exist only as pickles (such as pytorch_model.bin)",
            where=where,
            why="loading a pickle can run arbitrary code, so truetune does not load it",
            fix="if you trust the author, convert it once: `AutoModelForCausalLM.from_pretrained("
            "FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)`, and copy the tokenizer",
            code="model-pickle",
        )
    if found == "gguf":
        return ModelError(
            "the folder contains only GGUF weights",
            where=where,
            why="GGUF is a format for serving; its weights are quantised",
            fix="use the original model in safetensors",
            code="model-no-weights",
        )
    if files.is_hub:
        why = "the repository, or its part in the local cache, has no weights in safetensors"
        fix = "go online if the cache is incomplete; otherwise choose a model with safetensors"
    elif found == "safetensors":
        why = f"it has safetensors files, but neither {wanted} nor an index that names them"
        fix = f"a single file must be called {wanted}"
    else:
        why = "only the small files were copied"
        fix = f"copy {wanted} (or all its shards and {INDEX}) into the folder"
    return ModelError(
        f"there are no weights: {wanted} is missing",
        where=where,
        why=why,
        fix=fix,
        code="model-no-weights",
    )


def read_headers(paths: Iterable[Path]) -> dict[str, TensorFacts]:
    """Facts of all tensors in some safetensors files, by name; no weight is read.

    Raises:
        ModelError: a file is damaged or shorter than its header says; two files hold a tensor of
            one name with other numbers.
    """
    tensors: dict[str, TensorFacts] = {}
    for path in paths:
        found = _read_header(path)
        for name in sorted(tensors.keys() & found):
            if not _equal(tensors[name], found[name]):
                raise _twice(
                    f"{name} is in {tensors[name].path.name} and, with other numbers, in "
                    f"{path.name}",
                    str(path.parent),
                )
        tensors.update(found)
    return tensors


def _equal(one: TensorFacts, other: TensorFacts) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.num_bytes
        while left:
            size = min(left, 2**22)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def _read_header(path: Path) -> dict[str, TensorFacts]:
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _damaged(path, "its header is cut off or is not a safetensors header")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        end = max((facts["data_offsets"][1] for facts in header.values()), default=0)
        tensors = {name: _facts(path, 8 + length, facts) for name, facts in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path, "its header is not readable") from error
    if 8 + length + end != size:
        raise _damaged(
            path, f"its header describes {8 + length + end:,} bytes, but the file has {size:,}"
        )
    return tensors


def _facts(path: Path, data: int, facts: dict[str, Any]) -> TensorFacts:
    start, end = (int(offset) for offset in facts["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError("the offsets of a tensor are inverted")
    shape = tuple(facts["shape"])
    if len(shape) > 64 or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("a shape is not made of whole numbers")
    if (math.prod(shape) * _BITS[facts["dtype"]] + 7) // 8 != end - start:
        raise ValueError("a tensor has more or fewer bytes than its shape and dtype need")
    dtype = _TORCH_NAMES.get(facts["dtype"], facts["dtype"].lower())
    return TensorFacts(dtype, shape, path, data + start, end - start)


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path.name} is damaged or incomplete: {why}",
        where=str(path),
        why="the download or copy was not finished, or the disk was full",
        fix="fetch the file again",
        code="model-weights-damaged",
    )


# Numbers of each tensor that are looked at: damage of a whole tensor shows in any of them.
LOOKED_AT = 65_536


def look_at_numbers(paths: Iterable[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tensors that hold NaN or infinity, matrices of zeros), by their first numbers."""
    from safetensors import safe_open

    broken, zero = [], []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                piece = first_rows(file.get_slice(name))
                if not piece.is_floating_point() or not piece.numel():
                    continue
                if not bool(torch.isfinite(piece.float()).all()):
                    broken.append(name)
                elif piece.ndim > 1 and not bool(piece.any()):
                    zero.append(name)
    return tuple(broken), tuple(zero)


def first_rows(table: Any) -> Any:
    """The rows of a tensor in a file that are looked at."""
    shape = table.get_shape()
    if not shape:
        return table[:]
    return table[: max(LOOKED_AT // max(math.prod(shape[1:]), 1), 1)]


def main_dtype(tensors: Mapping[str, TensorFacts]) -> str | None:
    """The torch dtype name that most weights have, by number of elements."""
    counts = Counter[str]()
    for facts in tensors.values():
        counts[facts.dtype] += facts.num_elements
    return counts.most_common(1)[0][0] if counts else None


def listed(names: Iterable[str]) -> str:
    """Names as a phrase, the rest counted."""
    return phrase(sorted(names), 4)
