"""Write a GGUF file, tensor by tensor.

input   Shape, Vocabulary, tensors, a type of quantisation
does    writes values and vocabulary by gguf's writer; quantises by llama.cpp's own code, which
        xllamacpp brings along
output  a file, not yet verified
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truetune.errors import SaveError, UsageError
from truetune.exporting.gguf_shape import Shape, tensors_of
from truetune.exporting.gguf_vocabulary import Vocabulary
from truetune.findings import near
from truetune.system.lazy import gguf, torch


@dataclass(frozen=True)
class Quant:
    """The types of a file's matrices; everything else is float32.

    Attributes:
        kind: of most matrices, a `gguf.GGMLQuantizationType`.
        head: of the output head, or of the embedding that is one.
        better: of the matrices that suffer most: attention values and the way down, in the first
            and the last eighth of the layers and each third between, as llama.cpp has it.
        file_type: gguf's `LlamaFileType`.
    """

    kind: str
    head: str
    better: str
    file_type: str


QUANTS = {
    "f32": Quant("F32", "F32", "F32", "ALL_F32"),
    "f16": Quant("F16", "F16", "F16", "MOSTLY_F16"),
    "bf16": Quant("BF16", "BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": Quant("Q8_0", "Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "q6_k": Quant("Q6_K", "Q6_K", "Q6_K", "MOSTLY_Q6_K"),
    "q5_k_m": Quant("Q5_K", "Q6_K", "Q6_K", "MOSTLY_Q5_K_M"),
    "q5_k_s": Quant("Q5_K", "Q6_K", "Q5_K", "MOSTLY_Q5_K_S"),
    "q5_1": Quant("Q5_1", "Q6_K", "Q5_1", "MOSTLY_Q5_1"),
    "q5_0": Quant("Q5_0", "Q6_K", "Q5_0", "MOSTLY_Q5_0"),
    "q4_k_m": Quant("Q4_K", "Q6_K", "Q6_K", "MOSTLY_Q4_K_M"),
    "q4_k_s": Quant("Q4_K", "Q6_K", "Q5_K", "MOSTLY_Q4_K_S"),
    "q4_1": Quant("Q4_1", "Q6_K", "Q4_1", "MOSTLY_Q4_1"),
    "q4_0": Quant("Q4_0", "Q6_K", "Q4_0", "MOSTLY_Q4_0"),
}
# Where rows are no multiple of a block of 256: the type of about its size with blocks of 32.
_SMALLER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def require_quant(name: str) -> Quant:
    """Return the quantisation with a name.

    Raises:
        UsageError: there is no such quantisation.
    """
    if name in QUANTS:
        return QUANTS[name]
    meant = near(name, QUANTS)
    raise UsageError(
        f"unknown quantisation {name!r}",
        where="--quant",
        why=f"did you mean {meant[0]}?" if meant else "",
        fix=f"use one of {', '.join(QUANTS)}",
        code="gguf-quant",
    )


def write_file(
    path: Path, model: Any, shape: Shape, vocabulary: Vocabulary, quant: str, name: str
) -> dict[str, str]:
    """Write a model.

    Args:
        path: must not exist.
        name: the model name that is written into the file.

    Returns:
        the type of each tensor, by its name in the file.

    Raises:
        SaveError: a weight exceeds the type's range, or the disk is full.
    """
    sizes = _sizes(model, shape)
    kinds = _kinds(model, sizes, shape, require_quant(quant))
    writer = new_writer(path, shape.arch)
    _describe(writer, shape, vocabulary, name)
    writer.add_file_type(int(gguf.LlamaFileType[QUANTS[quant].file_type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tensors(writer, path, sizes, tensors_of(model, shape), kinds)
    return kinds


def keys_of(shape: Shape, vocabulary: Vocabulary) -> dict[str, Any]:
    """The metadata of a file, by gguf's keys."""
    writer = new_writer(None, shape.arch)
    _describe(writer, shape, vocabulary, "")
    return {key: entry.value for key, entry in writer.kv_data[0].items()}


def _describe(writer: Any, shape: Shape, vocabulary: Vocabulary, name: str) -> None:
    # llama.cpp takes a habit of its tokenizer from this name: it must not be there by chance.
    harmless = re.sub(r"(?i)(phi|bert)[-_]?", r"\1 ", name)
    writer.add_name(f"{vocabulary.name}{harmless}")
    for method, value in shape.values:
        getattr(writer, f"add_{method}")(value)
    _add_vocabulary(writer, vocabulary)


def write_trial(path: Path, vocabulary: Vocabulary) -> None:
    """Write a file with a vocabulary and a minimal model of zeros."""
    width, rows = 32, len(vocabulary.tokens)
    writer = new_writer(path, gguf.MODEL_ARCH.LLAMA)
    writer.add_name(f"{vocabulary.name}trial")
    for method, value in (
        *(("embedding_length", width), ("block_count", 1), ("feed_forward_length", width)),
        *(("head_count", 1), ("head_count_kv", 1), ("layer_norm_rms_eps", 1e-5)),
        *(("rope_dimension_count", width), ("vocab_size", rows), ("context_length", 64)),
    ):
        getattr(writer, f"add_{method}")(value)
    _add_vocabulary(writer, vocabulary)
    square = torch.zeros(width, width)
    tensors = {
        "token_embd.weight": torch.zeros(rows, width),
        "output_norm.weight": torch.zeros(width),
        **{f"blk.0.{name}_norm.weight": torch.zeros(width) for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": square for name in ("gate", "up", "down")},
    }
    kinds = {name: "F16" if value.ndim > 1 else "F32" for name, value in tensors.items()}
    sizes = {name: tuple(value.shape) for name, value in tensors.items()}
    write_tensors(writer, path, sizes, tensors.items(), kinds)


def new_writer(path: Path | None, arch: Any) -> Any:
    """gguf's writer of a file for one architecture."""
    return gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.encode("utf-8", "replace") for token in vocabulary.tokens])
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges([merge.encode("utf-8") for merge in vocabulary.merges])
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space)
    if isinstance(vocabulary.template, str):
        writer.add_chat_template(vocabulary.template)
    else:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in vocabulary.template.items()]
        )


def _sizes(model: Any, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, in the order of `tensors_of`."""
    state = model.state_dict()
    sizes = {shape.names[name]: tuple(state[name].shape) for name in state if name in shape.names}
    return sizes | {name: tuple(value.shape) for name, value in shape.extra.items()}


def _kinds(
    model: Any, sizes: dict[str, tuple[int, ...]], shape: Shape, quant: Quant
) -> dict[str, str]:
    """The type of each tensor."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    has_head = "output.weight" in sizes
    kinds = {}
    for name, size in sizes.items():
        if len(size) < 2 or name in shape.extra:
            kinds[name] = "F32"
            continue
        kind = quant.kind
        if name == "output.weight" or (name == "token_embd.weight" and not has_head):
            kind = quant.head
        elif ".attn_v." in name or ".ffn_down." in name:
            layer = int(name.split(".")[1])
            kind = quant.better if _matters(layer, layers) else kind
        kinds[name] = _fitting(kind, int(size[-1]))
    return kinds


def _matters(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: str, width: int) -> str:
    """Return the type, or the next one that supports rows of this width."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    if width % block == 0:
        return kind
    return _fitting(_SMALLER.get(kind, "F16"), width)


def write_tensors(
    writer: Any,
    path: Path,
    sizes: dict[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    kinds: dict[str, str],
) -> None:
    """Write the header, then the tensors one at a time: no two of them are in memory at once."""
    try:
        for name, size in sizes.items():
            kind = gguf.GGMLQuantizationType[kinds[name]]
            block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
            length = math.prod(size) // block * num_bytes
            writer.add_tensor_info(name, size, np.dtype(np.float32), length, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in tensors:
            writer.write_tensor_data(packed_as(name, value.numpy(), kinds[name]))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise SaveError(
            f"cannot write {path.name}: {error.strerror or error}",
            where=str(path),
            fix="free some space, or choose another folder with --output",
        ) from error
    finally:
        writer.close()


def packed_as(name: str, value: Any, kind: str) -> Any:
    """A tensor as the bytes of its type.

    Raises:
        SaveError: a number exceeds the range of float16.
    """
    value = np.ascontiguousarray(value, dtype=np.float32)
    if kind == "F32":
        return value
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.isfinite(half).all():
            raise SaveError(
                f"{name} contains {float(np.abs(value).max()):.3g}, but the largest float16 is "
                "65,504",
                why="the model was trained in a dtype with a wider range",
                fix="use --quant bf16, or another type with that range",
                code="gguf-overflow",
            )
        return half
    return _quantised(value, kind)


def _quantised(value: Any, kind: str) -> Any:
    """By llama.cpp's own code where it can be reached, else by gguf's."""
    number = gguf.GGMLQuantizationType[kind]
    library = _ggml()
    if library is None or kind == "BF16":
        try:
            return gguf.quants.quantize(value, number)
        except NotImplementedError as error:
            raise UsageError(
                f"{kind} cannot be written here",
                why="the installed xllamacpp does not expose llama.cpp's quantiser, and gguf has "
                "none for this type",
                fix="use --quant q8_0, or another type with blocks of 32",
                code="gguf-quant",
            ) from error
    rows, width = value.shape[0], value.shape[-1]
    rows = value.size // width
    block, size = gguf.GGML_QUANT_SIZES[number]
    out = np.zeros((*value.shape[:-1], width // block * size), dtype=np.uint8)
    written = library.ggml_quantize_chunk(
        int(number),
        value.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        width,
        None,
    )
    assert written == out.nbytes, (kind, value.shape, written, out.nbytes)
    return out


@functools.cache
def _ggml() -> Any:
    """llama.cpp's quantiser: a function of ggml.h that xllamacpp's library exports."""
    import importlib.util

    package = importlib.util.find_spec("xllamacpp")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("xllamacpp*.so")) + sorted(
            Path(folder).glob("xllamacpp*.pyd")
        ):
            try:
                library = ctypes.CDLL(str(path))
                function = library.ggml_quantize_chunk
            except (OSError, AttributeError):
                continue
            function.restype = ctypes.c_size_t
            function.argtypes = [
                *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
                *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
            ]
            return library
    return None
