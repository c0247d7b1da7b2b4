"""The lines that load, chat with and serve a saved model, ready to be copied."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from truetune.model.served_adapter import adapter_line, model_line, why_merge


def load_line(folder: str, settings: Mapping[str, Any], *, is_adapter: bool) -> str:
    """The call that opens it in Python.

    Args:
        folder: of the artifact, or its name on the Hub.
        settings: of the run, by name.
    """
    kind = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    name = json.dumps(folder, ensure_ascii=False)
    return f"{kind}.from_pretrained({name}{_bits(settings)})"


def _bits(settings: Mapping[str, Any]) -> str:
    """The settings that peft needs for a quantised base: by default it opens the original weights,
    on which the adapter is a different model."""
    if settings.get("qlora"):
        how = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
    elif settings.get("load_in_8bit"):
        how = "load_in_8bit=True"
    else:
        return ""
    return f", quantization_config=BitsAndBytesConfig({how})"


def serve_line(
    folder: str,
    settings: Mapping[str, Any],
    *,
    run: str,
    base: str | None,
    base_revision: str | None = None,
    stops: Sequence[int] = (),
    dtype: str = "",
) -> str:
    """The command that serves it.

    Args:
        folder: of the artifact.
        settings: of the run, by name.
        run: the run directory, from which a merged model can be made.
        base: of an adapter; None of a whole model.
        base_revision: its commit.
        stops: token ids that each request has to name, because the base's stop tokens lack one.
        dtype: of the weights of a whole model, as in `model_line`.
    """
    if base is None:
        return model_line("vllm", folder, dtype)
    config = {
        "use_dora": settings.get("dora"),
        "trainable_token_indices": settings.get("add_token"),
        "r": settings.get("lora_r"),
    }
    rounded = bool(settings.get("qlora") or settings.get("load_in_8bit"))
    if why_merge(config, quantised=rounded):
        merged = f"{run}-merged"
        line = f"truetune export {shlex.quote(run)} --merge -o {shlex.quote(merged)}"
        return f"{line} && {model_line('vllm', merged)}"
    line = adapter_line("vllm", folder, base, base_revision, int(settings.get("lora_r") or 0))
    if stops:
        line += f"\n         (requests need stop_token_ids={list(stops)})"
    return line
