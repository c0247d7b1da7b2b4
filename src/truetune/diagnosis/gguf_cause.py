"""Compare what a GGUF file holds with its model: settings, tokens and tensors.

input   a file, the merged model and its contract
does    reads the file's keys and tensors; compares the keys with those that an export would write,
        the tensors with what rounding to their types makes of the model's
output  FileCompared
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.diagnosis.rounding import STEPS, is_quantised, is_rounded
from truetune.diagnosis.tensors import ROUNDING, Same, apart, explain
from truetune.errors import TruetuneError
from truetune.exporting.gguf_file import keys_of, packed_as
from truetune.exporting.gguf_shape import Shape, shape_of, tensors_of
from truetune.exporting.gguf_vocabulary import UNUSED, Vocabulary, vocabulary_of
from truetune.findings import visible
from truetune.model.tokenizer import num_ids
from truetune.system.lazy import gguf, torch

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
# Settings that llama.cpp computes with, behind the name of the architecture.
_COMPUTED = (
    *("block_count", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.freq_base_swa", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
# Values that are as good as none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "rope.freq_base": (10000,),
}
# Types that can be written here without an importance matrix, to see what their rounding costs.
_QUANTISED = {"Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_K", "Q4_0", "Q4_1", "Q3_K", "Q2_K"}


@dataclass(frozen=True)
class FileCompared:
    """The differences between a file and the model.

    Attributes:
        wrong: what is certainly not the model's: tensors, settings, tokens.
        other: what differs, but may be another converter's way of writing it.
        ends: ids on which the file ends replies.
        unread: which tensors were not compared, and why; "" if all were.
    """

    wrong: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    unread: str = ""


def quant_of(named: str) -> str:
    """The type of a file by llama.cpp's name for it; the coarsest type if that is unknown."""
    return next((quant for word, quant in _QUANTS.items() if word in named), "q4_0")


def compare_file(
    path: Path, model: Any, contract: PromptContract, base: Callable[[], Any] | None = None
) -> FileCompared:
    """Compare a file with what an export of the model would hold.

    Args:
        model: merged, in float32.
        base: makes the model before training, if there is one: an adapter was merged.
    """
    reader = _reader(path)
    if reader is None:
        return FileCompared(unread="gguf cannot read the file")
    try:
        shape = shape_of(model)
        rows = model.get_input_embeddings().weight.shape[0]
        vocabulary, _ = vocabulary_of(contract, rows)
    except TruetuneError as error:
        return FileCompared(ends=_ends(reader), unread=f"its tensors were not compared: {error}")
    wanted = keys_of(shape, vocabulary)
    wrong, other = _keys(reader, wanted)
    tokens = _tokens(reader, vocabulary)
    held = {tensor.name: tensor for tensor in reader.tensors}
    unread: list[str] = []

    @functools.cache
    def before_training() -> dict[str, torch.Tensor]:
        assert base is not None
        one = base()
        return dict(tensors_of(one, shape_of(one)))

    def before(name: str) -> tuple[torch.Tensor, str] | None:
        own = before_training()
        return (own[name], "F32") if name in own else None

    def expected() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in tensors_of(model, shape):
            if name in held and not _readable(held[name]):
                unread.append(name)
            else:
                yield name, value

    said = explain(
        expected(),
        lambda name: _value(held[name]) if name in held else None,
        before if base is not None else None,
        orders=_Orders(shape),
        same=_same(reader, held, shape, merged=base is not None),
        rows=num_ids(contract.tokenizer),
    )
    extra = sorted(held.keys() - {*shape.names.values(), *shape.extra})
    if "output.weight" in extra:
        other.append(
            "the file has a separate output head, but the model uses its embedding as the head"
        )
    return FileCompared(
        (*([said] if said else []), *wrong, *tokens),
        tuple(other),
        _ends(reader),
        f"{len(unread)} tensors of types that gguf cannot read were not compared, first {unread[0]}"
        if unread
        else "",
    )


@dataclass(frozen=True)
class Held:
    """What a file holds by itself.

    Attributes:
        template: whether it has a chat template.
        tensors: that could be read.
        damaged: names of tensors with numbers that are not finite.
    """

    template: bool
    tensors: int
    damaged: tuple[str, ...]


def look_at(path: Path) -> Held:
    """Read a file that llama.cpp has loaded."""
    reader = _reader(path)
    if reader is None:
        return Held(True, 0, ())
    read = [tensor for tensor in reader.tensors if _readable(tensor)]
    damaged = (tensor.name for tensor in read if not torch.isfinite(_value(tensor)[0]).all())
    return Held("tokenizer.chat_template" in reader.fields, len(read), tuple(damaged))


def _ends(reader: Any) -> tuple[int, ...]:
    """Ids that the file names as ends."""
    fields = (
        reader.fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")
    )
    return tuple(dict.fromkeys(int(field.contents()) for field in fields if field is not None))


def _same(reader: Any, held: dict[str, Any], shape: Shape, *, merged: bool) -> Same:
    """Whether a tensor is the model's, rounded to its type."""

    weighed = any(key.startswith("quantize.imatrix") for key in reader.fields)
    added = {shape.names[name]: number for name, number in shape.added.items()}

    def same(name: str, value: torch.Tensor, kind: str, wanted: torch.Tensor) -> bool:
        if name in shape.extra:
            # Computed by each converter for itself.
            return apart(value, wanted) <= 1e-3
        if kind in STEPS:
            return is_rounded(value, wanted, kind, merged=merged, added=added.get(name, 0.0))
        if kind not in _QUANTISED:
            return apart(value, wanted) <= ROUNDING.get(kind, _COARSE)
        packed = packed_as(name, wanted.numpy(), kind)
        if packed.nbytes == held[name].data.nbytes and bool(
            (packed.reshape(-1).view("uint8") == held[name].data.reshape(-1).view("uint8")).all()
        ):
            return True
        return is_quantised(value, wanted, _dequantised(packed, kind), weighed=weighed)

    return same


# Types of one to three bits.
_COARSE = 0.6


def _reader(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    # gguf says of damaged files what numpy says.
    except Exception:
        return None


def _readable(tensor: Any) -> bool:
    """Whether gguf can dequantise a tensor."""
    return _known(tensor.tensor_type.name)


@functools.cache
def _known(kind: str) -> bool:
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    # One block of zeros.
    _, size = gguf.GGML_QUANT_SIZES[number]
    plain = {"F32": np.float32, "F16": np.float16}
    data = np.zeros((1, 1), plain[kind]) if kind in plain else np.zeros((1, size), np.uint8)
    try:
        gguf.quants.dequantize(data, number)
    except NotImplementedError:
        return False
    return True


def _value(tensor: Any) -> tuple[torch.Tensor, str]:
    return _dequantised(tensor.data, tensor.tensor_type.name), tensor.tensor_type.name


def _dequantised(data: Any, kind: str) -> torch.Tensor:
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(found.astype("float32"))


def _keys(reader: Any, wanted: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Settings that llama.cpp computes with, and other keys, with different values."""
    wrong: list[str] = []
    words: list[str] = []
    lists: list[str] = []
    for key, own in wanted.items():
        if key.startswith(_FREE) or key == "tokenizer.ggml.tokens":
            continue
        entry = reader.fields.get(key)
        name = key.partition(".")[2]
        if entry is None:
            if key in ("tokenizer.ggml.add_bos_token", "tokenizer.chat_template"):
                words.append(f"{key} is missing")
            elif name == "rope.freq_base" and not _equal(own, 10000.0):
                wrong.append(f"{key} is missing, so llama.cpp takes 10000.0 instead of {own!r}")
            continue
        value = entry.contents()
        if isinstance(own, list | tuple):
            if said := _lists(key, list(own), value):
                lists.append(said)
        elif not _equal(own, value):
            shown = visible(f"{value!r:.80}", keep_newlines=False)
            said = (
                "the chat template is different"
                if key == "tokenizer.chat_template"
                else f"{key} is {shown} instead of {own!r:.80}"
            )
            # A longer context than this library writes is another converter's choice.
            shorter = name == "context_length" and value < own
            (wrong if name in _COMPUTED or shorter else words).append(said)
    for key, entry in reader.fields.items():
        name = key.partition(".")[2]
        if key in wanted or name not in _NEUTRAL:
            continue
        value = entry.contents()
        if not any(_equal(neutral, value) for neutral in _NEUTRAL[name]):
            wrong.append(f"{key} is {value!r:.80}, but the model has no such setting")
    return wrong, [*words, *lists]


def _tokens(reader: Any, vocabulary: Vocabulary) -> list[str]:
    """Tokens of the tokenizer that have another text in the file."""
    entry = reader.fields.get("tokenizer.ggml.tokens")
    if entry is None:
        return []
    # Rows of the embedding that no token has are named by each converter in its own way.
    used = [n for n, kind in enumerate(vocabulary.types) if kind != UNUSED]
    its = entry.contents()
    last = max(used, default=-1)
    if len(its) <= last:
        return [f"tokenizer.ggml.tokens has {len(its):,} entries instead of {last + 1:,}"]
    # Some converters write added tokens as they look in a text.
    wrong = [n for n in used if _spaced(its[n]) != _spaced(vocabulary.tokens[n])]
    if not wrong:
        return []
    first = wrong[0]
    return [
        f"tokenizer.ggml.tokens has entries that differ ({len(wrong):,}), first {first}: "
        f"{visible(f'{its[first]!r:.60}', keep_newlines=False)} instead of "
        f"{vocabulary.tokens[first]!r:.60}"
    ]


def _spaced(token: str) -> str:
    return token.replace("\u2581", " ")


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
        f"{key} has entries that differ ({len(at):,}), first {at[0]}: {shown} instead of "
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
