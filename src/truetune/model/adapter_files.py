"""Read what an adapter folder holds from its two files, without loading the base.

input   adapter_config.json and adapter_model.safetensors
does    compares names and shapes with the base's layers; looks whether anything was learned
output  AdapterFacts
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from truetune.model.adapter_fit import require_bounded_adapter
from truetune.model.architecture import causal_config, linear_layers, meta_model
from truetune.model.source import ADAPTER_CONFIG, ModelFiles, read_json
from truetune.model.weights import read_headers, weight_files
from truetune.system.lazy import torch

_PREFIX = "base_model.model."
_LORA = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")
_WHOLE = re.compile(r"\.(?:modules_to_save\.)?weight$|\.token_adapter|\.trainable_tokens_delta$")


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter.

    Attributes:
        kind: peft_type of its config.
        num_tensors: in the weight file.
        empty: names of tensors without a single number.
        pairs: layers that have both matrices of LoRA.
        moved: of those, layers whose second matrix is not all zeros.
        unmatched: layers that the base does not have, or in another shape.
        asked: names in target_modules that no layer of the base has.
        missing: layers of the base that target_modules names and the file lacks.
        tables: whether embedding or head rows are in the file.
        finite: whether every number is.
        virtual: virtual tokens of a soft prompt; 0 if it is none.
        virtual_broken: why the base cannot take them; "" if it can.
    """

    kind: str
    num_tensors: int
    empty: tuple[str, ...]
    pairs: int
    moved: int
    unmatched: tuple[str, ...]
    asked: tuple[str, ...]
    missing: tuple[str, ...]
    tables: bool
    finite: bool
    virtual: int = 0
    virtual_broken: str = ""


def read_adapter(files: ModelFiles, base: ModelFiles) -> AdapterFacts:
    """Look into an adapter's weight file.

    Raises:
        ModelError: no safetensors, damaged, or an unreadable config.
    """
    from safetensors import safe_open

    config = read_json(files.folder / ADAPTER_CONFIG)
    require_bounded_adapter(config, str(files.folder / ADAPTER_CONFIG))
    paths = weight_files(files)
    headers = read_headers(paths)
    shapes = {name.removeprefix(_PREFIX): facts.shape for name, facts in headers.items()}
    layers = _layers(base)
    matrices: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if found := _LORA.search(name):
            matrices.setdefault(name[: found.start()], {})[found[1]] = shape
    moved, finite = set(), True
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                finite &= bool(torch.isfinite(value).all()) if value.is_floating_point() else True
                found = _LORA.search(name)
                if found and found[1] == "B" and bool(value.any()):
                    moved.add(name.removeprefix(_PREFIX)[: found.start() - len(_PREFIX)])
    asked = config.get("target_modules")
    names = asked if isinstance(asked, list) else []
    unmatched = [layer for layer, parts in matrices.items() if not _fits(layer, parts, layers)]
    return AdapterFacts(
        kind=str(config.get("peft_type", "unknown")),
        num_tensors=len(headers),
        empty=tuple(sorted(n for n, facts in headers.items() if not facts.num_elements)),
        pairs=sum(set(parts) == {"A", "B"} for parts in matrices.values()),
        moved=len(moved),
        unmatched=tuple(sorted(unmatched)),
        asked=tuple(n for n in names if not any(_named(path, n) for path in layers)),
        missing=tuple(
            path for path in layers if any(_named(path, n) for n in names) and path not in matrices
        )
        if matrices
        else (),
        tables=any(_WHOLE.search(n) and not _LORA.search(n) for n in shapes),
        finite=finite,
        **_soft_prompt(config, shapes, base),
    )


def _soft_prompt(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], base: ModelFiles
) -> dict[str, Any]:
    """What a folder of virtual tokens says of itself, compared with its file and its base."""
    number = config.get("num_virtual_tokens")
    if not isinstance(number, int) or isinstance(number, bool):
        return {}
    found = shapes.get("prompt_embeddings")
    known = causal_config(base)
    text = getattr(known, "get_text_config", lambda: known)()
    width = getattr(text, "hidden_size", None)
    if config.get("peft_type") == "PREFIX_TUNING":
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = 2 * text.num_hidden_layers * heads * size
    broken = ""
    if found is None:
        broken = "the file holds no prompt_embeddings"
    elif len(found) != 2 or found[0] < number:
        broken = f"the file holds {found[0]:,} of {number:,} virtual tokens"
    elif width and found[1] != width:
        broken = f"a virtual token has {found[1]:,} dimensions, but the base has {width:,}"
    return {"virtual": number, "virtual_broken": broken}


def _named(path: str, name: str) -> bool:
    """How peft matches a name of target_modules: the whole path or its end."""
    return path == name or path.endswith("." + name)


def _layers(base: ModelFiles) -> dict[str, tuple[int, int]]:
    """path -> (inputs, outputs) of every layer that LoRA can wrap."""
    model = meta_model(causal_config(base))
    found: dict[str, tuple[int, int]] = {}
    for path, module in linear_layers(model):
        rows, columns = _shape(module)
        found[path] = (columns, rows) if hasattr(module, "in_features") else (rows, columns)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for path, module in model.named_modules():
        if any(module is table for table in tables):
            rows, columns = _shape(module)
            found[path] = (columns, rows)
    return found


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return int(rows), int(columns)


def _fits(
    layer: str, parts: dict[str, tuple[int, ...]], layers: dict[str, tuple[int, int]]
) -> bool:
    if layer not in layers:
        return False
    inputs, outputs = layers[layer]
    a, b = parts.get("A", ()), parts.get("B", ())
    # Of an embedding, LoRA's matrices stand the other way round.
    return (not a or inputs in a or outputs in a) and (not b or outputs in b or inputs in b)


def is_empty(facts: AdapterFacts) -> bool:
    """Whether the adapter changes nothing."""
    learned: Any = facts.moved or facts.tables
    return not learned and (facts.pairs > 0 or not facts.num_tensors or bool(facts.empty))
