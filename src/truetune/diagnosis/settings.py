"""Compare the settings of a model folder with those of the trained model: the architecture, replies
(generation_config.json), and the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.findings import visible

# Settings of a config that change no number that is computed from the same tensors.
_IDLE = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("use_cache", "initializer_range", "pretraining_tp", "quantization_config", "problem_type"),
    *("id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "router_aux_loss_coef"),
    *("output_router_logits", "attn_implementation", "use_bidirectional_attention"),
    # Which layers have a window is in layer_types, and the window in sliding_window.
    *("max_window_layers", "use_sliding_window"),
    # Compared as tensors; as the context.
    *("vocab_size", "tie_word_embeddings", "max_position_embeddings"),
}
_FLOAT_ROOM = 1e-6


def architecture(own: Any, its: Any) -> list[str]:
    """Settings that change what is computed and differ between two configs.

    Args:
        own: of the trained model.
        its: of the folder.
    """
    one, other = (config.get_text_config(decoder=True) for config in (own, its))
    if type(one) is not type(other):
        # The same tensors may be computed alike under another name; predictions tell.
        return []
    a, b = one.to_dict(), other.to_dict()
    try:
        # Tools write names of their own into a config, which no model reads.
        known = type(one)().to_dict()
    except (TypeError, ValueError):
        known = {name: None for name in a if name in b}
    found = []
    for name in known:
        if name in _IDLE or name.startswith("_") or "dropout" in name or "pdrop" in name:
            continue
        before, now = a.get(name), b.get(name)
        if name == "head_dim":
            before, now = (_head_dim(config) for config in (one, other))
        if not _alike(before, now):
            found.append(_said(name, before, now))
    return found


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _said(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [k for k in {**before, **now} if not _alike(before.get(k), now.get(k))]
        if keys:
            return "config.json: " + ", ".join(
                f"{name}.{k} is {_short(now.get(k))} instead of {_short(before.get(k))}"
                for k in keys[:4]
            )
    return f"config.json: {name} is {_short(now)} instead of {_short(before)}"


def _short(value: Any) -> str:
    return visible(f"{value!r:.80}", keep_newlines=False)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_alike(one.get(k), other.get(k)) for k in {**one, **other})
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return bool(one) == bool(other)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= _FLOAT_ROOM * max(abs(one), abs(other))
    return bool(one == other)


# What a server does with the model's predictions, and what it does where the file says nothing.
_DRAWN: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "stop_strings": None,
}
# Of no effect where replies are not drawn at random.
_RANDOM = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation(folder: Path | str, own: Iterable[Path | str]) -> list[str]:
    """Settings of generation_config.json that change replies and differ from the trained model's.

    Args:
        folder: of the stage.
        own: folders whose settings are healthy: of the trained model, of its base.
    """
    its = _drawn(folder)
    healthy = [_drawn(place) for place in own]
    found = []
    for name, default in _DRAWN.items():
        if any(_alike(its[name], settings[name]) for settings in healthy):
            continue
        if name in _RANDOM and not its["do_sample"]:
            continue
        if name == "length_penalty" and its["num_beams"] == 1:
            continue
        before = healthy[0][name] if healthy else default
        found.append(f"{name} is {_short(its[name])} instead of {_short(before)}")
    return found


def _drawn(folder: Path | str) -> dict[str, Any]:
    try:
        held = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = {}
    held = held if isinstance(held, dict) else {}
    return {
        name: default if held.get(name) is None else held[name] for name, default in _DRAWN.items()
    }


def vocabulary(own: PromptContract, its: PromptContract) -> list[str]:
    """How the tokens and merges of a folder's tokenizer differ from those of training."""
    before, now = own.tokenizer.get_vocab(), its.tokenizer.get_vocab()
    moved = [text for text, number in before.items() if now.get(text) != number]
    if moved:
        moved.sort(key=lambda text: before[text])
        first = moved[0]
        there = now.get(first)
        shown = (
            f"is missing, but should have the id {before[first]:,}"
            if there is None
            else f"has the id {there:,} instead of {before[first]:,}"
        )
        return [
            f"the ids of {len(moved):,} of {len(before):,} tokens differ, first "
            f"{visible(repr(first), keep_newlines=False):.60}: it {shown}"
        ]
    first_merges, second_merges = _merges(own), _merges(its)
    if first_merges is None or second_merges is None or first_merges == second_merges:
        return []
    return [
        f"the merges of the tokenizer are different ({len(second_merges):,} instead of "
        f"{len(first_merges):,})"
    ]


def _merges(contract: PromptContract) -> Sequence[str] | None:
    backend = getattr(contract.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    found = json.loads(backend.to_str())["model"].get("merges")
    return None if found is None else [m if isinstance(m, str) else " ".join(m) for m in found]
