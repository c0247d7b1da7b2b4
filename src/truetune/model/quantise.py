"""A frozen base in 4 or 8 bits, through bitsandbytes.

4 bits: NF4 with double quantisation (Dettmers et al. 2023, QLoRA); 8 bits: LLM.int8 (Dettmers et
al. 2022). Input embedding, norms and output head keep their own type.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal

from truetune.errors import ModelError, UsageError
from truetune.model.source import first_line

if TYPE_CHECKING:
    import torch

Quantised = Literal["4bit", "8bit"]
# On a CPU it tells at import (peft's too) which kernel it goes without; nothing is missing for it.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
# And at every product of 8 bits that it computes in float16, as LLM.int8 is made: thousands of
# lines in a run of ten steps.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

# as-trained: an adapter's base as it was in training, else as-stored. as-stored: what the files
# hold. dequantised: rounded to 4 or 8 bits as in training, then in plain layers again.
LoadIn = Literal["as-trained", "as-stored", "dequantised", "4bit", "8bit"]
NAMES: dict[Quantised, str] = {
    "4bit": "4 bits (NF4, double quantisation)",
    "8bit": "8 bits (LLM.int8)",
}


def require_bitsandbytes(what: str) -> None:
    """Raise where the extra is missing.

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


def refuse_twice(config: Any, where: str) -> None:
    """Raise where weights that are quantised already would be quantised again.

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
    """The model with plain linear layers that hold the rounded weights.

    Raises:
        ModelError: transformers cannot dequantise this method.
    """
    try:
        plain = model.dequantize()
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
