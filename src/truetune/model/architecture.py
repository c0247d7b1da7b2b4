"""Determine the kind of model in a folder from config.json alone.

input   config.json
does    refuses what is not a causal language model of text; builds the model without weights
output  a transformers config; a model on the meta device; its linear layers by name
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from truetune.data.read import READERS, extension
from truetune.data.rows import names
from truetune.errors import ModelError
from truetune.findings import counted
from truetune.model.source import NO_GGUF, ModelFiles, first_line, read_json
from truetune.model.weights import INDEX, WEIGHTS, TensorFacts, listed
from truetune.system.lazy import torch

_WHAT_IS_TAKEN = "truetune trains text-only decoder language models (transformers' ForCausalLM)"


def causal_config(files: ModelFiles) -> Any:
    """The transformers config of a causal language model.

    Raises:
        ModelError: no config.json, an unknown or remote-code model, an encoder-decoder, a model
            of images or sound, an encoder, a classifier, weights under a name of their own.
    """
    path = files.folder / "config.json"
    if not path.is_file():
        raise no_config(files)
    raw = read_json(path)
    where = str(path)
    _require_known_type(raw, where)
    _require_sane(raw, where)
    _require_usual_weights(raw, files.folder)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except Exception as error:  # each config class checks its fields in its own way
        raise ModelError(
            f"config.json is not a valid {raw.get('model_type')} config: {first_line(error)}",
            where=where,
            fix="copy the file again from the source of the model",
            code="model-config-unreadable",
        ) from error
    _require_causal(config, where)
    _require_sizes(config, where)
    # How attention is computed is this machine's choice; a name from a folder could fetch code.
    config._attn_implementation = None
    if not has_grouped_products():
        config._experts_implementation = "eager"
    return config


@functools.cache
def has_grouped_products() -> bool:
    """Whether torch has the product by which transformers computes all experts of a layer at once,
    on a CPU (2.8 has not, and transformers asks only whether it has the name)."""
    product = getattr(torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))
    if product is None:
        return True  # transformers has a loop of its own for that
    try:
        product(torch.ones(4, 8), torch.ones(1, 8, 8), offs=torch.tensor([4], dtype=torch.int32))
    except (NotImplementedError, RuntimeError):
        return False
    return True


# No model has more; a million layers take hours and all memory before anything is read.
_MOST_LAYERS = 1_024
_MOST_SIZE = 2**24
# Stop tokens of a model: published ones list up to a dozen, and each is asked about in turn.
_MOST_IDS = 1024
# Of a classifier; a config's own class makes a name for each, whatever the model is.
_MOST_LABELS = 2**17
_SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")


def _require_sane(raw: Mapping[str, Any], where: str) -> None:
    """Refuse what the config's own class would build lists of, or take for a name of code.

    Raises:
        ModelError: `model-config-hostile`.
    """
    pending: list[Mapping[str, Any]] = [raw]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, Mapping):
                pending.append(value)
            layers = "layers" in name and isinstance(value, int)
            labels = name == "num_labels" and isinstance(value, int)
            if (layers and value > _MOST_LAYERS) or (labels and value > _MOST_LABELS):
                raise _not_sane(f"{name} is {value:,}", where)
            if name.endswith(("eos_token_id", "bos_token_id", "pad_token_id")):
                require_ids(value, name, where)


def require_ids(value: Any, name: str, where: str) -> tuple[int, ...]:
    """Token ids as a config states them: none, one, or a list.

    Raises:
        ModelError: `model-config-hostile` for anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    # -1 stands for "none" in some configs.
    if any(type(i) is not int or not -1 <= i < 2**31 for i in ids):
        raise _not_sane(f"{name} is {str(value)[:60]!r}, which is not a token id", where)
    if len(ids) > _MOST_IDS:
        raise _not_sane(f"{name} lists {len(ids):,} token ids", where)
    return tuple(ids)


def _require_sizes(config: Any, where: str) -> None:
    text_config = config.get_text_config(decoder=True)
    for name in _SIZES:
        value = getattr(text_config, name, 1)
        most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST_SIZE
        # A list where layers differ (heads, for some); only whole numbers are judged.
        if isinstance(value, int) and not 1 <= value <= most:
            raise _not_sane(f"{name} is {value:,}", where)


def _require_usual_weights(raw: Mapping[str, Any], folder: Path) -> None:
    """transformers would load the file that the config names, whatever was read of the others."""
    named = raw.get("transformers_weights")
    used = [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()][:1]
    if named not in (None, *(used or (WEIGHTS, INDEX))):
        raise ModelError(
            f"config.json names weights of its own: transformers_weights is {str(named)[:80]!r}",
            where=str(folder / "config.json"),
            why=f"other programs load {WEIGHTS} or the shards of {INDEX}, so they would load a "
            "different model",
            fix=f"remove transformers_weights; a single file must be called {WEIGHTS}",
            code="model-weights-elsewhere",
        )


def _not_sane(what: str, where: str) -> ModelError:
    return ModelError(
        f"config.json does not describe a valid model: {what}",
        where=where,
        why="the file is damaged or malicious",
        fix="copy the file again from the source of the model",
        code="model-config-hostile",
    )


def no_config(files: ModelFiles) -> ModelError:
    """The error for a folder without config.json."""
    inner = [name for name in ("model", "adapter") if (files.folder / name).is_dir()]
    data = [path.name for path in files.folder.iterdir() if _is_data(path)]
    why, fix = "", "pass a folder with config.json"
    if inner:
        why, fix = "a run folder keeps its model in a subfolder", f"pass {files.folder / inner[0]}"
    elif any(path.suffix.lower() == ".gguf" for path in files.folder.iterdir()):
        why, fix = NO_GGUF
    elif data:
        why = f"it holds data files: {names(sorted(data))}"
        fix = f"put the model first, then the data: MODEL {files.source}"
    return ModelError(
        f"{files.source} is not a model folder: it has no config.json",
        where=str(files.folder),
        why=why,
        fix=fix,
        code="model-no-config",
    )


def _is_data(path: Path) -> bool:
    # .json and .txt lie in model folders too, where config.json may be what is missing.
    return (
        path.is_file()
        and extension(path) in READERS
        and path.suffix not in (".json", ".txt", ".md")
    )


def _require_known_type(raw: Mapping[str, Any], where: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES:
        return
    if raw.get("auto_map"):
        raise ModelError(
            f"the model ({kind or 'no model_type'}) needs Python code from its own repository",
            where=where,
            why="auto_map in config.json points to it; truetune does not run code that comes "
            "with weights",
            fix="choose a model whose architecture is built into transformers",
            code="model-remote-code",
        )
    raise ModelError(
        f"unknown architecture: model_type is {kind!r}"
        if kind
        else "config.json has no model_type",
        where=where,
        why="this version of transformers does not have it, or the file belongs to something else",
        fix="update transformers, or choose another model",
        code="model-unknown-type",
    )


def _require_causal(config: Any, where: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.model_type

    def refused(what: str) -> ModelError:
        return ModelError(
            what,
            where=where,
            why=_WHAT_IS_TAKEN,
            fix="choose a causal language model, for example of the qwen, llama or gemma families",
            code="model-not-causal",
        )

    if config.is_encoder_decoder:
        raise refused(f"{kind} is an encoder-decoder model")
    if any(getattr(config, f"{sense}_config", None) for sense in ("vision", "audio")):
        raise refused(f"{kind} also processes images or sound")
    if kind not in CAUSAL:
        raise refused(f"{kind} is not a causal language model")
    # Encoders whose classes can also be built as decoders; without is_decoder they see the future.
    if kind in MASKED and not getattr(config, "is_decoder", False):
        raise refused(f"{kind} is an encoder: its attention is not causal")
    head = str((config.architectures or [""])[0])
    if "For" in head and not head.endswith("ForCausalLM") and head != CAUSAL[kind]:
        raise refused(f"the model was saved with another head: {head}")


def meta_model(config: Any) -> Any:
    """The model with the shapes of its weights and no memory for them (meta device).

    Raises:
        ModelError: the architecture cannot be built as config.json says.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture fails in its own way
        raise ModelError(
            f"a {config.model_type} model cannot be built from config.json: {first_line(error)}",
            why="a value in it is invalid, or belongs to another version of transformers",
            fix="copy config.json again from the source of the model",
            code="model-config-unreadable",
        ) from error
    model.tie_weights()
    return model


def context_length(config: Any) -> int | None:
    """The longest sequence in tokens that the model was made for; None if it has no limit."""
    text_config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def embedding_rows(model: Any) -> int:
    """Rows of the input embedding: ids from 0 up to this exist in the model."""
    return int(model.get_input_embeddings().weight.shape[0])


def head_is_tied(model: Any) -> bool:
    """Whether output head and input embedding are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def linear_layers(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Paths and modules of all linear layers but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield path, module


def projection_names(model: Any) -> dict[str, int]:
    """Names of the linear layers (the last part of their path) with how many have it."""
    return dict(Counter(path.rpartition(".")[2] for path, _ in linear_layers(model)))


def require_shapes(config: Any, tensors: Mapping[str, TensorFacts], where: str) -> bool:
    """Compare the shapes in the weight files with those the config asks for.

    Only where every stored name is one of the model's: else transformers renames or merges
    weights on loading, and shapes can be compared only afterwards.

    Returns:
        Whether the files hold every weight of the model under its name, and nothing else.

    Raises:
        ModelError: they differ.
    """
    values = meta_model(config).state_dict(keep_vars=True)
    wanted = {name: tuple(value.shape) for name, value in values.items()}
    if not tensors.keys() <= wanted.keys():
        return False
    wrong = [(n, f.shape, wanted[n]) for n, f in tensors.items() if f.shape != wanted[n]]
    if wrong:
        raise shape_mismatch(wrong, where)
    # Tied weights are one under two names.
    stored = {id(values[name]) for name in tensors}
    return all(id(value) in stored for value in values.values())


def shape_mismatch(
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]], where: str
) -> ModelError:
    """The error for weights (name, stored shape, wanted shape) that do not fit the config."""
    name, stored, asked = sorted(wrong)[0]
    return ModelError(
        f"config.json requires another shape for {counted(len(wrong), 'weight')}: {name} is "
        f"{list(stored)}, but config.json says {list(asked)}",
        where=where,
        why="config.json and the weights belong to different models, or one of them was edited",
        fix=f"use the config.json that came with the weights (affected: "
        f"{listed(name for name, _, _ in wrong)})",
        code="model-shape-mismatch",
    )
