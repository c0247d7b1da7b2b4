"""Load a frozen base in 4 or 8 bits with bitsandbytes, and open models that other tools quantised.

4 bits: NF4 with double quantisation (Dettmers et al. 2023, QLoRA); 8 bits: LLM.int8 (Dettmers et
al. 2022). Input embedding, norms and output head keep their own type.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from truetune.errors import ModelError, UsageError
from truetune.model.source import first_line
from truetune.model.weights import TensorFacts
from truetune.system.lazy import torch

Quantised = Literal["4bit", "8bit"]
# On a CPU it warns at import (also that of peft) about a missing kernel that it does not need.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
# And at every product of 8 bits that it computes in float16, as LLM.int8 is made: thousands of
# lines in a run of ten steps.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# It says at import which of its kernels are for another GPU, and torch says which of its classes
# are of an old kind; transformers and peft import it wherever it is installed.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

# as-trained: an adapter's base as it was in training, else as-stored. as-stored: what the files
# hold. dequantised: rounded to 4 or 8 bits as in training, then in plain layers again.
LoadIn = Literal["as-trained", "as-stored", "dequantised", "4bit", "8bit"]
NAMES: dict[Quantised, str] = {
    "4bit": "4 bits (NF4, double quantisation)",
    "8bit": "8 bits (LLM.int8)",
}


def require_bitsandbytes(what: str) -> None:
    """Raise if the extra is missing.

    Args:
        what: that needs it: an option, or a file that says so.

    Raises:
        UsageError: naming the extra.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{what} needs bitsandbytes, which is not installed",
            why="it is an optional extra: pip install 'truetune[bitsandbytes]'",
            fix="pip install bitsandbytes",
            code="extra-missing",
        )


def quantization_config(kind: Quantised, compute: torch.dtype) -> Any:
    """transformers' settings for it; `compute` is the type of the matrix products."""
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def same_in_evaluation(model: Any) -> None:
    """Let layers of 4 bits compute in evaluation as they do in training.

    On a CPU with bfloat16 instructions bitsandbytes repacks their weights at the first forward pass
    in evaluation mode: scales rounded to bfloat16, products in bfloat16, an assertion where the
    rows are no multiple of 32; and training goes on with the repacked weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stored_quantisation(config: Any) -> str | None:
    """The method that a model's files are quantised with (`bitsandbytes`, `gptq`, ...)."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method) or "bitsandbytes")


# What transformers needs to open files of a method: a module, and how it is installed.
_OPENED_WITH = {
    "bitsandbytes": ("bitsandbytes", "'truetune[bitsandbytes]'"),
    "torchao": ("torchao", "'truetune[torchao]'"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
}


def require_opener(config: Any, where: str) -> None:
    """Raise if the files are quantised by a method whose package is not installed.

    Raises:
        UsageError: naming the package.
    """
    method = stored_quantisation(config)
    module, package = _OPENED_WITH.get(method or "", ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise UsageError(
            f"the weights are quantised by {method}, and {module} is not installed",
            where=where,
            why="transformers opens them with that package",
            fix=f"pip install {package}",
            code="extra-missing",
        )


def require_quantised(config: Any, tensors: Mapping[str, TensorFacts], where: str) -> None:
    """Raise where config.json calls weights quantised that are plain.

    Raises:
        ModelError: `model-not-quantised`.
    """
    method = stored_quantisation(config)
    # Whatever the method, quantised weights are integers or 8-bit numbers, or lie beside scales.
    plain = all(facts.dtype in ("float32", "bfloat16", "float16") for facts in tensors.values())
    if method and tensors and plain and not any("scale" in name for name in tensors):
        raise ModelError(
            f"config.json says that the weights are quantised ({method}), but they are not",
            where=where,
            why="the folder holds the config of a quantised model and unquantised weights",
            fix="remove quantization_config from config.json, or use the weights that belong to it",
            code="model-not-quantised",
        )


def stored_bits(config: Any) -> int | None:
    """Bits of the quantised weights in a model's files, the fewest if they differ; None if the
    config does not state them."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    stored = found if isinstance(found, dict) else found.to_dict()
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return 4 if stored.get("load_in_4bit") else 8
    groups = stored.get("config_groups")
    if isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        bits = [each.get("num_bits") for each in weights if isinstance(each, dict)]
        return min((bit for bit in bits if isinstance(bit, int)), default=None)
    if isinstance(stored.get("bits"), int):
        return int(stored["bits"])
    # torchao names a class: Int8WeightOnlyConfig.
    named = re.findall(r"\bU?Int(\d+)\w*Config\b", str(stored.get("quant_type")))
    return min(map(int, named), default=None)


@dataclass(frozen=True)
class Blocks:
    """How a quantiser rounds a matrix: in blocks of consecutive numbers, each with one scale.

    Attributes:
        width: numbers in a block; 0 for a row.
        nested: blocks whose scales are quantised together; 0 where they are not.
        turned: whether it rounds the transposed matrix.
    """

    width: int = 0
    nested: int = 0
    turned: bool = False


def scale_blocks(model: Any) -> dict[str, Blocks]:
    """The weights of a model that were rounded to the nearest level in blocks, by name. Other
    methods choose levels by what they do to outputs."""
    method, bits = stored_quantisation(model.config), stored_bits(model.config)
    turned = {f"{name}.weight" for name in _turned_layers(model)}
    found = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        state = getattr(value, "quant_state", None)
        if method == "bitsandbytes" and state is not None:
            nested = int(state.state2.blocksize) if state.nested else 0
            found[name] = Blocks(int(state.blocksize), nested, name in turned)
        elif (method == "bitsandbytes" and value.dtype == torch.int8) or (
            method == "torchao" and bits == 8 and hasattr(value, "qdata")
        ):
            found[name] = Blocks(turned=name in turned)
    return found


def plain_weights(model: Any) -> dict[str, Any] | None:
    """What the quantised weights of a model stand for, by their names in the plain model; None if
    nothing here can restore them. The model may be changed: it is not to be run afterwards."""
    if stored_quantisation(model.config) == "compressed-tensors":
        from compressed_tensors.compressors import decompress_module

        for module in model.modules():
            # transformers may have restored them when it loaded the files.
            packed = hasattr(module, "weight_packed")
            whole = getattr(module, "weight", None)
            held = packed or (whole is not None and not whole.is_floating_point())
            if held and hasattr(module, "quantization_scheme"):
                decompress_module(module)
        return dict(model.state_dict())
    if stored_quantisation(model.config) == "torchao":
        return {
            name: value.dequantize() if hasattr(value, "qdata") else value
            for name, value in model.state_dict().items()
        }
    try:
        return dict(dequantised(model, "").state_dict())
    except ModelError:
        return None


def refuse_twice(config: Any, where: str) -> None:
    """Raise if weights that are quantised already would be quantised again.

    Raises:
        ModelError: naming the method they have.
    """
    method = stored_quantisation(config)
    if method:
        raise ModelError(
            f"the weights are quantised already ({method})",
            where=where,
            why="config.json has a quantization_config",
            fix="train with --lora: the base is used as it is",
            code="model-quantised",
        )


def dequantised(model: Any, where: str) -> Any:
    """The model with plain layers that hold the rounded weights.

    Raises:
        ModelError: transformers cannot dequantise this method.
    """
    turned = _turned_layers(model)
    try:
        plain = _turned_back(model.dequantize(), turned)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"the weights cannot be dequantised: {first_line(error)}",
            where=where,
            why="transformers cannot dequantise this method",
            fix="pass the unquantised model with --base",
            code="merge-quantised",
        ) from error
    # transformers leaves its marks on the object, and save_pretrained acts on them.
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        if hasattr(plain, name):
            setattr(plain, name, False if name.startswith("is_") else None)
    if getattr(plain, "hf_quantizer", None) is not None:
        plain.hf_quantizer = None
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    # How quantised files became quantised layers; saving would run it backwards.
    conversions = getattr(plain, "_weight_conversions", None)
    if conversions:
        plain._weight_conversions = [c for c in conversions if _is_reversible(c)]
    return plain


def _turned_layers(model: Any) -> list[str]:
    """Names of layers whose inputs were the rows of their matrix (Conv1D of GPT-2): bitsandbytes
    holds them as linear layers, with the matrix transposed."""
    from transformers.pytorch_utils import Conv1D

    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if getattr(module, "source_cls", None) is Conv1D]


def _turned_back(model: Any, names: list[str]) -> Any:
    from transformers.pytorch_utils import Conv1D

    for name in names:
        linear = model.get_submodule(name)
        layer = Conv1D(0, 0)
        layer.nx, layer.nf = linear.in_features, linear.out_features
        layer.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous(), False)
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    return model


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def num_weights(parameter: Any) -> int:
    """Weights of a parameter; two of 4 bits share one byte in memory."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())
