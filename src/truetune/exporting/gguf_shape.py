"""Describe a transformers model in llama.cpp's terms: its hyperparameters, and its tensors by their
names in a GGUF file.

input   a loaded model in float32
does    names tensors by gguf's own name maps; reads hyperparameters from the config, and measures
        on the model what a config does not say: what its norms add to their weights, and how its
        rotary embedding differs from the default one
output  Shape; `gguf_proof.py` verifies that llama.cpp computes the same
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from truetune.errors import UsageError
from truetune.findings import Finding
from truetune.system.lazy import gguf, torch


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes the models of one transformers architecture.

    Attributes:
        arch: its name in `gguf.MODEL_ARCH`.
        interleaved: it rotates neighbouring numbers of a head, transformers those half a head
            apart, so rows of query and key change places.
        windows: it computes sliding windows; else every layer sees everything.
    """

    arch: str
    interleaved: bool = False
    windows: bool = False


# By transformers' name of the architecture (`model_type`).
FAMILIES = {
    "llama": Family("LLAMA", interleaved=True),
    "mistral": Family("LLAMA", interleaved=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma": Family("GEMMA"),
    "gemma2": Family("GEMMA2", windows=True),
    "gemma3_text": Family("GEMMA3", windows=True),
    "phi3": Family("PHI3"),
}


@dataclass(frozen=True)
class Shape:
    """What a GGUF file says about a model, except its vocabulary.

    Attributes:
        arch: a `gguf.MODEL_ARCH`.
        values: (method of gguf's writer, value) each.
        names: name in the file by name in the state.
        family: see `Family`.
        extra: tensors that transformers computes and llama.cpp reads.
        added: what the model's norms add to their weights, by name in the state.
        context: tokens for which the two compute the same.
        findings: notes.
    """

    arch: Any
    values: tuple[tuple[str, Any], ...]
    names: dict[str, str]
    family: Family
    extra: dict[str, torch.Tensor]
    added: dict[str, float]
    context: int
    findings: tuple[Finding, ...]


def require_family(config: Any) -> Family:
    """The family of a config.

    Raises:
        UsageError: llama.cpp, or this module, does not know it.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise UsageError(
            f"models of the architecture {config.model_type} cannot be written as GGUF",
            why=f"known architectures are {', '.join(FAMILIES)}: for these, llama.cpp was compared "
            "with transformers",
            fix="serve the merged model (truetune export RUN --to merged), or convert it with "
            "llama.cpp's convert_hf_to_gguf.py and compare it with the run: truetune diagnose "
            "RUN --gguf FILE",
            code="gguf-architecture",
        )
    return found


def shape_of(model: Any) -> Shape:
    """The shape of a transformers model.

    Raises:
        UsageError: it has something that llama.cpp does not support.
    """
    config = model.config.get_text_config(decoder=True)
    family = require_family(config)
    arch = gguf.MODEL_ARCH[family.arch]
    values, extra, context, findings = _hyperparameters(model, config, family)
    names = _names(model, config, arch)
    return Shape(
        arch=arch,
        values=tuple(values),
        names=names,
        family=family,
        extra=extra,
        added=_added_to_norms(model, names),
        context=context,
        findings=tuple(findings),
    )


def tensors_of(model: Any, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of all that the file holds, one at a time."""
    for name, value in model.state_dict().items():
        written = shape.names.get(name)
        if written is None:
            continue
        value = value.detach().float().cpu()
        if shape.added.get(name):
            value = value + shape.added[name]
        yield written, as_rotated(name, value, model, shape)
    yield from shape.extra.items()


def as_rotated(name: str, value: torch.Tensor, model: Any, shape: Shape) -> torch.Tensor:
    """A matrix of the state whose rows come out of a layer, with the rows of query and key in
    llama.cpp's order."""
    if not shape.family.interleaved or not (".q_proj." in name or ".k_proj." in name):
        return value
    config = model.config.get_text_config(decoder=True)
    is_query = ".q_proj." in name
    heads = config.num_attention_heads if is_query else config.num_key_value_heads
    return _interleaved(value, heads)


def _interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head: the two halves of a rotation side by side."""
    halves = value.view(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def _names(model: Any, config: Any, arch: Any) -> dict[str, str]:
    """Name in the file by name in the state; a tied head is left out."""
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = model.state_dict()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    found, unknown = {}, []
    for name in state:
        if tied and name == "lm_head.weight":
            continue
        written = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            unknown.append(name)
        else:
            found[name] = written
    if unknown:
        raise UsageError(
            f"llama.cpp does not support {len(unknown)} tensors of this model: "
            + ", ".join(unknown[:4]),
            why="gguf's list of names for the architecture does not contain them",
            fix="use another server with the merged model: truetune export RUN --to merged",
            code="gguf-architecture",
        )
    if len(set(found.values())) < len(found):
        raise UsageError(
            "two tensors of the model have the same name in a GGUF file",
            fix="report it with the model's config.json",
            code="gguf-architecture",
        )
    return found


def _added_to_norms(model: Any, names: dict[str, str]) -> dict[str, float]:
    """What each norm of the model adds to its weight, found by running it on ones."""
    added = {}
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in names:
            module = modules.get(name.removesuffix(".weight"))
            weight = getattr(module, "weight", None)
            if module is None or weight is None or weight.ndim != 1 or not name.endswith(".weight"):
                continue
            out = module(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device))
            apart = float((out.flatten() - weight).double().mean())
            added[name] = float(round(apart))
    return {name: value for name, value in added.items() if value}


def _hyperparameters(
    model: Any, config: Any, family: Family
) -> tuple[list[tuple[str, Any]], dict[str, torch.Tensor], int, list[Finding]]:
    findings: list[Finding] = []
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = int(config.max_position_embeddings)
    ropes = _ropes(config)
    rope = ropes.get("full_attention") or next(iter(ropes.values()))
    rotated = int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))
    values: list[tuple[str, Any]] = [
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", config.num_key_value_heads),
        ("key_length", head_dim),
        ("value_length", head_dim),
        ("layer_norm_rms_eps", float(config.rms_norm_eps)),
        ("rope_dimension_count", rotated),
        ("rope_freq_base", float(rope["rope_theta"])),
        ("vocab_size", model.get_input_embeddings().weight.shape[0]),
    ]
    for name, method in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if value := getattr(config, name, None):
            values.append((method, float(value)))
    more, extra = _rope_scaling(model, config, rope, family, rotated)
    values += more
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        original = int(rope.get("original_max_position_embeddings") or context)
        if original < context:
            findings.append(
                _shorter(
                    original,
                    context,
                    "longrope: with a longer context, llama.cpp uses the factors for long texts "
                    "for short ones too",
                )
            )
            context = original
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = list(getattr(config, "layer_types", None) or [])
    slides = window > 0 and ("sliding_attention" in kinds if kinds else True)
    if family.windows:
        values.append(("sliding_window", window if slides else 0))
        if kinds:
            values.append(("sliding_window_pattern", [k == "sliding_attention" for k in kinds]))
        if local := ropes.get("sliding_attention"):
            values.append(("rope_freq_base_swa", float(local["rope_theta"])))
    elif slides and window < context:
        findings.append(
            _shorter(
                window,
                context,
                "llama.cpp computes this architecture without its sliding window",
            )
        )
        context = window
    if family.arch == "PHI3":
        # llama.cpp asks for both; 0 says that nothing slides.
        values.append(("sliding_window", 0))
        trained = getattr(config, "original_max_position_embeddings", None) or rope.get(
            "original_max_position_embeddings"
        )
        values.append(("rope_scaling_orig_ctx_len", int(trained or context)))
    values.append(("context_length", context))
    return values, extra, context, findings


def _shorter(context: int, own: int, why: str) -> Finding:
    return Finding(
        "gguf-context",
        "note",
        f"the GGUF file has a context of {context:,} tokens, but the model has one of {own:,}",
        why=why,
        fix="use another server for longer texts: truetune export RUN --to merged",
    )


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    if found and all(isinstance(value, dict) for value in found.values()):
        return {str(kind): dict(value) for kind, value in found.items()}
    return {"full_attention": {"rope_theta": 10000.0, **found}}


def _rope_scaling(
    model: Any, config: Any, rope: dict[str, Any], family: Family, rotated: int
) -> tuple[list[tuple[str, Any]], dict[str, torch.Tensor]]:
    """Describe a rotary embedding that is not the default one.

    Raises:
        UsageError: llama.cpp does not compute it.
    """
    kind = rope.get("rope_type", "default")
    factor = float(rope.get("factor") or 1.0)
    if kind == "default":
        return [], {}
    if kind == "linear":
        return [
            ("rope_scaling_type", gguf.RopeScalingType.LINEAR),
            ("rope_scaling_factor", factor),
        ], {}
    if kind == "llama3":
        base = float(rope["rope_theta"])
        plain = 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        scaled = model.get_decoder().rotary_emb.inv_freq.float().cpu()
        return [], {"rope_freqs.weight": plain / scaled}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values: list[tuple[str, Any]] = [
            ("rope_scaling_type", gguf.RopeScalingType.YARN),
            ("rope_scaling_factor", factor),
            ("rope_scaling_orig_ctx_len", int(original)),
        ]
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                values.append((f"rope_scaling_yarn_{name}", float(rope[name])))
        return values, {}
    if kind == "longrope" and family.arch == "PHI3":
        original = int(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        scale = config.max_position_embeddings / original
        own = rope.get("attention_factor")
        attention = own or (
            math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        )
        return [("rope_scaling_attn_factors", float(attention))], {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    raise UsageError(
        f"a rotary embedding of type {kind} cannot be written as GGUF",
        why="llama.cpp computes this type differently, or not at all",
        fix="use another server with the merged model: truetune export RUN --to merged",
        code="gguf-architecture",
    )
