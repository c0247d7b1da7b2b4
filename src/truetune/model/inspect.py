"""Describe a model from its small files: no weight is read or downloaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.model.architecture import (
    causal_config,
    context_length,
    embedding_rows,
    head_is_tied,
    meta_model,
    no_config,
    projection_names,
    require_ids,
)
from truetune.model.quantise import require_quantised
from truetune.model.source import ModelFiles, locate, read_json
from truetune.model.tokenizer import locate_base, num_ids, open_tokenizer
from truetune.model.weights import (
    WeightsFormat,
    main_dtype,
    read_headers,
    weight_files,
    weights_format,
)


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model; of an adapter's base, where the model is an adapter.

    Attributes:
        source: folder or Hub id, as given.
        revision: commit of a Hub model, None for a folder.
        base: absolute path or Hub id of the base of an adapter, None if it is none.
        architecture: class in transformers.
        model_type: family in transformers.
        num_parameters: weights of the model, a tied head counted once.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        context_length: tokens; None if the architecture has no limit.
        tokenizer_length: tokens the tokenizer knows, added ones included.
        head_rows: rows of embedding and output head.
        spare_rows: rows above the largest token id: room for new tokens without resizing;
            negative if the tokenizer has ids that the model lacks.
        tied: whether head and embedding are one matrix.
        dtype: of the weights on disk (torch name); the config's if there are none.
        has_chat_template: whether the tokenizer brings one.
        config_eos_ids, generation_eos_ids: of config.json and generation_config.json.
        tokenizer_eos_id, pad_id, bos_id: of the tokenizer.
        lora_targets: names of all linear layers but the output head, with how many there are.
        weights: format of the weights in the folder; None if there are none, or a Hub model's
            are not in the cache.
        num_weight_bytes: size of the safetensors files; 0 if there are none.
    """

    source: str
    revision: str | None
    base: str | None
    architecture: str
    model_type: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    context_length: int | None
    tokenizer_length: int
    head_rows: int
    spare_rows: int
    tied: bool
    dtype: str | None
    has_chat_template: bool
    config_eos_ids: tuple[int, ...]
    generation_eos_ids: tuple[int, ...]
    tokenizer_eos_id: int | None
    pad_id: int | None
    bos_id: int | None
    lora_targets: dict[str, int]
    weights: WeightsFormat | None
    num_weight_bytes: int

    @property
    def served_eos_ids(self) -> tuple[int, ...]:
        """On which a server of the model ends an answer."""
        return self.generation_eos_ids or self.config_eos_ids

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def describe(source: str | Path, revision: str | None = None) -> ModelFacts:
    """Facts of a model or adapter.

    Raises:
        ModelError: the model does not exist, is not a causal language model, has no tokenizer, or
            is damaged.
    """
    return look_at(source, revision)[0]


def look_at(source: str | Path, revision: str | None = None) -> tuple[ModelFacts, Any]:
    """Like `describe`, but also return the tokenizer, which takes a second to open."""
    files = locate(source, revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    config = causal_config(base)
    tokenizer = open_tokenizer(files)
    model = meta_model(config)
    text_config = config.get_text_config(decoder=True)
    generation = base.folder / "generation_config.json"
    dtype, num_bytes = _on_disk(base, config)
    rows = embedding_rows(model)
    facts = ModelFacts(
        source=files.source,
        revision=files.revision,
        base=base.address if files.is_adapter else None,
        architecture=type(model).__name__,
        model_type=config.model_type,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        context_length=context_length(config),
        tokenizer_length=len(tokenizer),
        head_rows=rows,
        spare_rows=rows - num_ids(tokenizer),
        tied=head_is_tied(model),
        dtype=dtype or (str(config.dtype).removeprefix("torch.") if config.dtype else None),
        has_chat_template=bool(tokenizer.chat_template),
        config_eos_ids=require_ids(config.eos_token_id, "eos_token_id", str(base.folder)),
        generation_eos_ids=require_ids(
            read_json(generation).get("eos_token_id") if generation.is_file() else None,
            "eos_token_id",
            str(generation),
        ),
        tokenizer_eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        bos_id=tokenizer.bos_token_id,
        lora_targets=projection_names(model),
        weights=weights_format(base.folder),
        num_weight_bytes=num_bytes,
    )
    return facts, tokenizer


def _on_disk(files: ModelFiles, config: Any) -> tuple[str | None, int]:
    """dtype and size in bytes of the weights; (None, 0) if they are not all there.

    Raises:
        ModelError: `model-not-quantised`: config.json says so, and the weights are plain.
    """
    try:
        paths = weight_files(files)
    except ModelError:
        return None, 0
    tensors = read_headers(paths)
    require_quantised(config, tensors, str(files.folder / "config.json"))
    return main_dtype(tensors), sum(path.stat().st_size for path in paths)


def require_weights(source: str | Path, revision: str | None = None) -> None:
    """Raise now what loading would raise later about weights that are not there or are pickled.

    A Hub model's weights are not looked for: they are fetched when the model is loaded. Whether a
    config that does not call itself a causal language model is one is judged where it is opened.

    Raises:
        ModelError: a local folder without config.json or without safetensors.
    """
    files = locate(source, revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    if base.is_hub:
        return
    config = base.folder / "config.json"
    if not config.is_file():
        raise no_config(base)
    heads = read_json(config).get("architectures")
    if isinstance(heads, list) and str(next(iter(heads), "")).endswith("ForCausalLM"):
        weight_files(base)
