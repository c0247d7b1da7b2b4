"""The lines that load, chat with and serve what a run saved, to be copied as they are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

# vLLM makes room for rank 16 unless told otherwise, and takes these.
_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)


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
    """What peft must be told of a quantised base: by itself it opens the original weights, and the
    adapter on them is another model."""
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
) -> str:
    """The command that serves it.

    Args:
        folder: of the artifact.
        settings: of the run, by name.
        run: the run directory, from which a merged model can be made.
        base: of an adapter; None of a whole model.
        base_revision: its commit.
        stops: token ids that each request has to name, because the base's stop set lacks one.
    """
    if base is None:
        return f"vllm serve {shlex.quote(folder)}"
    if any(settings.get(name) for name in ("add_token", "dora", "qlora", "load_in_8bit")):
        # vLLM takes no rows of new tokens and no DoRA, and would load the base unquantised.
        merged = shlex.quote(f"{run}-merged")
        return f"truetune export {shlex.quote(run)} --merge -o {merged} && vllm serve {merged}"
    words = ["vllm", "serve", base]
    if base_revision:
        words += ["--revision", base_revision]
    words += ["--enable-lora"]
    words += ["--lora-modules", f"tuned={folder}"]
    words += ["--chat-template", f"{folder}/chat_template.jinja"]
    needed = int(settings.get("lora_r") or 0)
    rank = next((r for r in _VLLM_RANKS if r >= needed), _VLLM_RANKS[-1])
    if rank > _VLLM_RANKS[0]:
        words += ["--max-lora-rank", str(rank)]
    line = shlex.join(words)
    if stops:
        line += f"\n         (requests need stop_token_ids={list(stops)})"
    return line
