"""Find why a GGUF file differs from its model: compare its values and tensors with the expected
ones.

input   a file, the merged model and its contract
does    reads the file's keys and tensors; compares the keys with those that an export would write,
        the tensors within the rounding of their types
output  sentences
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.contract.contract import PromptContract
from truetune.diagnosis.tensors import explain
from truetune.errors import TruetuneError
from truetune.exporting.gguf_file import keys_of
from truetune.exporting.gguf_shape import Shape, shape_of, tensors_of
from truetune.exporting.gguf_vocabulary import vocabulary_of
from truetune.findings import visible

if TYPE_CHECKING:
    import torch

# By llama.cpp's word for the type of a file, the export of about that many bits.
_QUANTS = {
    "F32": "f32",
    "BF16": "bf16",
    "F16": "f16",
    "Q8_0": "q8_0",
    "Q6_K": "q6_k",
    "Q5_K": "q5_k_m",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q4_K": "q4_k_m",
    "Q4_1": "q4_1",
}
# What a file may say otherwise, or not at all.
_FREE = ("general.", "tokenizer.ggml.pre", "tokenizer.ggml.scores", "tokenizer.ggml.padding")


def quant_of(named: str) -> str:
    """The type of a file by llama.cpp's name for it; the coarsest type if that is unknown."""
    return next((quant for word, quant in _QUANTS.items() if word in named), "q4_0")


def why_differs(path: Path, model: Any, contract: PromptContract, base: Any = None) -> list[str]:
    """How the file differs from an export of the model, the likeliest cause first.

    Args:
        model: merged, in float32.
        base: the model before training, where there is one.
    """
    reader = _reader(path)
    if reader is None:
        return ["the file cannot be read by gguf"]
    try:
        shape = shape_of(model)
        rows = model.get_input_embeddings().weight.shape[0]
        vocabulary, _ = vocabulary_of(contract, rows)
        words = _keys(reader, keys_of(shape, vocabulary))
        held = {tensor.name: tensor for tensor in reader.tensors}

        def found(name: str) -> tuple[torch.Tensor, str] | None:
            return _value(held[name]) if name in held else None

        before = None
        if base is not None:
            own = dict(tensors_of(base, shape_of(base)))
            before = lambda name: (own[name], "F32") if name in own else None  # noqa: E731
        said = explain(tensors_of(model, shape), found, before, orders=_Orders(shape))
        extra = sorted(held.keys() - {*shape.names.values(), *shape.extra})
        if "output.weight" in extra:
            words.append(
                "the file has a separate output head, but the model uses its embedding as the head"
            )
        return [*([said] if said else []), *words]
    except TruetuneError as error:
        return [error.what]


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    # gguf says of damaged files what numpy says.
    except Exception:
        return None


def _value(tensor: Any) -> tuple[torch.Tensor, str]:
    import gguf
    import torch

    kind = tensor.tensor_type
    try:
        data = gguf.quants.dequantize(tensor.data, kind)
    except NotImplementedError:
        data = tensor.data
    return torch.from_numpy(data.astype("float32")), kind.name


def _keys(reader: Any, wanted: dict[str, Any]) -> list[str]:
    """Keys with different values, settings before lists."""
    words: list[str] = []
    lists: list[str] = []
    for key, own in wanted.items():
        if key.startswith(_FREE):
            continue
        entry = reader.fields.get(key)
        if entry is None:
            if key in ("tokenizer.ggml.add_bos_token", "tokenizer.chat_template"):
                words.append(f"{key} is missing")
            continue
        value = entry.contents()
        if isinstance(own, list | tuple):
            if said := _lists(key, list(own), value):
                lists.append(said)
        elif not _equal(own, value):
            shown = visible(f"{value!r:.80}", keep_newlines=False)
            words.append(
                "the chat template is different"
                if key == "tokenizer.chat_template"
                else f"{key} is {shown} instead of {own!r:.80}"
            )
    return [*words, *lists]


def _lists(key: str, own: list[Any], value: Any) -> str:
    its = list(value) if isinstance(value, list | tuple) else [value]
    plain = [o.decode("utf-8", "replace") if isinstance(o, bytes) else o for o in own]
    if len(its) != len(plain):
        return f"{key} has {len(its):,} entries instead of {len(plain):,}"
    at = [i for i, (a, b) in enumerate(zip(plain, its, strict=True)) if not _equal(a, b)]
    if not at:
        return ""
    shown = visible(f"{its[at[0]]!r:.60}", keep_newlines=False)
    return (
        f"{key} has {len(at):,} different entries, first {at[0]}: {shown} instead of "
        f"{plain[at[0]]!r:.60}"
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or not isinstance(one, int | float):
        return bool(one == other)
    if not isinstance(other, int | float):
        return False
    return abs(one - other) <= 1e-5 * max(abs(one), abs(other), 1e-12)


class _Orders:
    """Other arrangements of a tensor that converters are known to write."""

    def __init__(self, shape: Shape) -> None:
        values = dict(shape.values)
        self.heads = {
            ".attn_q.": int(values["head_count"]),
            ".attn_k.": int(values["head_count_kv"]),
        }

    def __call__(self, name: str, wanted: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        for part, heads in self.heads.items():
            if part in name and wanted.shape[0] % (2 * heads) == 0:
                half = wanted.shape[0] // heads // 2
                rest = wanted.shape[1:]
                yield (
                    "the rows of each head are in transformers' order, but llama.cpp rotates "
                    "neighbouring ones",
                    wanted.view(heads, half, 2, *rest).transpose(1, 2).reshape(wanted.shape),
                )
                yield (
                    "the rows of each head were permuted once too often",
                    wanted.view(heads, 2, half, *rest).transpose(1, 2).reshape(wanted.shape),
                )
        if "_norm." in name:
            yield "1 was not added, as this architecture needs for its norms", wanted - 1
            yield "1 was added once too often", wanted + 1
        if wanted.ndim == 2 and wanted.shape[0] == wanted.shape[1]:
            yield "it is transposed", wanted.T
