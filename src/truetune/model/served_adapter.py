"""Decide which adapters a server can load on their base, and build the command; others must be
merged.

Read in the sources of vLLM and SGLang: they add pairs of matrices to layers of the base, and take
tokenizer and stop tokens from the base. Some of what else an adapter can hold they refuse, and some
they leave out without a word.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.model.source import read_json

# vLLM makes room for rank 16 unless configured otherwise, and takes these.
_RANKS = (16, 32, 64, 128, 256, 320, 512)
SERVERS = ("vllm", "sglang")


def why_merge(
    config: Mapping[str, Any],
    *,
    quantised: bool = False,
    new_tokens: bool = False,
    stops: Sequence[str] = (),
) -> list[str]:
    """Why an adapter has to be merged before it is served; [] if it can be loaded as it is.

    Args:
        config: the adapter's.
        quantised: it was trained on rounded weights, which the server would not load.
        new_tokens: its tokenizer has tokens that the base's lacks.
        stops: trained stop tokens that the base does not stop on.
    """
    rank = int(config.get("r") or 0)
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    reasons = (
        ("it is not a LoRA adapter", config.get("peft_type", "LORA") != "LORA"),
        ("it is DoRA", config.get("use_dora")),
        (
            "it contains embeddings of new tokens",
            config.get("trainable_token_indices") or new_tokens,
        ),
        ("it contains whole layers (modules_to_save)", config.get("modules_to_save")),
        ("it contains biases", config.get("bias", "none") != "none" or config.get("lora_bias")),
        (f"its layers differ in rank or alpha ({', '.join(patterns)})", patterns),
        (f"its rank {rank} is above {_RANKS[-1]}", rank > _RANKS[-1]),
        (
            "it was trained on rounded weights, but the server would load the base unrounded",
            quantised,
        ),
        (f"the base does not stop on {', '.join(stops)}", stops),
    )
    return [why for why, holds in reasons if holds]


def adapter_line(server: str, folder: str, base: str, revision: str | None, rank: int) -> str:
    """The command that serves a base with an adapter, under the name `tuned`.

    Args:
        folder: of the adapter; its chat template lies in it.
        revision: commit of the base.
    """
    template = ["--chat-template", f"{folder}/chat_template.jinja"]
    at = ["--revision", revision] if revision else []
    if server == "sglang":
        words = [*_SGLANG, base, *at, "--enable-lora", "--lora-paths", f"tuned={folder}"]
        return shlex.join([*words, *template])
    words = ["vllm", "serve", base, *at, "--enable-lora", "--lora-modules", f"tuned={folder}"]
    words += template
    if rank > _RANKS[0]:
        room = next((each for each in _RANKS if each >= rank), _RANKS[-1])
        words += ["--max-lora-rank", str(room)]
    return shlex.join(words)


def model_line(server: str, folder: str, dtype: str = "") -> str:
    """The command that serves a whole model.

    Args:
        dtype: of the stored weights; "" if unknown. Both servers round float32 weights to float16
            unless they are told not to ("auto" in the documentation of their --dtype).
    """
    whole = ["--dtype", dtype] if dtype == "float32" else []
    return shlex.join([*(_SGLANG if server == "sglang" else ("vllm", "serve")), folder, *whole])


def stored_dtype(folder: Path) -> str:
    """The dtype that config.json of a whole model names; "" if there is none."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype") or "")


_SGLANG = ("python", "-m", "sglang.launch_server", "--model-path")
