"""Put an adapter on its base, and tell before a weight of the base is read whether it fits.

input   an adapter's folder; its base, or the config of one
does    bounds what the adapter's config makes peft compute; has peft put it on the base, first on
        the meta device, where the base has no memory; compares the weights that peft asks for with
        those in the file
output  the model with its adapter, or an error that names what does not fit
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from truetune.errors import ModelError
from truetune.findings import counted
from truetune.model.architecture import meta_model
from truetune.model.new_tokens import grow_for, use_row_layers
from truetune.model.source import ADAPTER_CONFIG, ModelFiles, first_line, read_json
from truetune.model.trial import are_quick
from truetune.model.weights import TensorFacts, listed, read_headers, weight_files
from truetune.system.quiet import quiet

# An adapter that names every layer of a large mixture of experts has 20,000 names.
_MOST_NAMES = 2**15
# As many layers as a model may have.
_MOST_LAYERS = 1_024
# Python keeps 512 compiled patterns: with more, each comparison with a layer compiles one.
_KEPT_PATTERNS, _MOST_COMPILED = 512, 2**19
# A name of layers, or the end of one; anything else is a pattern.
_PLAIN = re.compile(r"[\w.-]*")
# The first matrix of a LoRA pair: its rows are the rank.
_LORA_A = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")


def require_adapter(files: ModelFiles) -> dict[str, TensorFacts]:
    """Facts of the adapter's tensors, by name, from its config and the headers of its file.

    Raises:
        ModelError: `adapter-type`, `adapter-config-hostile`, `model-shape-mismatch`, and those of
            damaged files.
    """
    path = files.folder / ADAPTER_CONFIG
    config = read_json(path)
    kind = config.get("peft_type")
    require_bounded_adapter(config, str(path))
    if kind != "LORA":
        raise ModelError(
            f"the adapter is of type {kind}, not LORA",
            where=str(path),
            why="only LoRA adapters are loaded",
            fix="merge it into its base with the tool that created it, and load the merged model",
            code="adapter-type",
        )
    tensors = read_headers(weight_files(files))
    _require_rank(config, tensors, str(path))
    return tensors


def _require_rank(config: dict[str, Any], tensors: dict[str, TensorFacts], where: str) -> None:
    """Raise if the matrices have another rank than the config says: peft makes those first."""
    # Of all experts of a layer, one matrix holds the ranks of each.
    if config.get("target_parameters"):
        return
    patterns = config.get("rank_pattern")
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    wrong = [
        (name, facts.shape[0])
        for name, facts in sorted(tensors.items())
        if _LORA_A.search(name) and facts.shape and facts.shape[0] not in ranks
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} of the adapter's matrices do not have the rank that its config "
            f"requires: {wrong[0][0]} has {wrong[0][1]}, but r is {str(ranks[0])[:40]}",
            where=where,
            why="the config and the weights belong to different adapters, or one was edited",
            fix="use the adapter_config.json that was saved with the weights",
            code="model-shape-mismatch",
        )


def require_bounded_adapter(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter's config that would take peft minutes, or have it import a library.

    Raises:
        ModelError: `adapter-config-hostile`, `adapter-type`.
    """
    for name, value in config.items():
        if name == "trainable_token_indices" or not isinstance(value, list | dict):
            continue
        if len(value) > _MOST_NAMES:
            raise _hostile(f"{name} has {len(value):,} entries", where)
    copies = config.get("layer_replication") or []
    try:
        layers = sum(end - start for start, end in copies)
    except (TypeError, ValueError) as error:
        raise _hostile("layer_replication is not a list of (first, last) layers", where) from error
    if layers > _MOST_LAYERS or len(copies) > _MOST_LAYERS:
        raise _hostile(f"layer_replication makes {layers:,} layers", where)
    if config.get("megatron_config"):
        raise ModelError(
            "the adapter is for Megatron's parallel layers",
            where=where,
            why="peft would import the library that megatron_core names",
            fix="export the adapter from Megatron in the usual format of peft",
            code="adapter-type",
        )


def _hostile(what: str, where: str) -> ModelError:
    return ModelError(
        f"{ADAPTER_CONFIG} does not describe a valid adapter: {what}",
        where=where,
        why="the file is damaged or malicious",
        fix="copy the file again from the source of the adapter",
        code="adapter-config-hostile",
    )


def require_fit(
    files: ModelFiles,
    base: ModelFiles,
    config: Any,
    tensors: Mapping[str, TensorFacts],
    tokenizer_size: int,
    *,
    trainable: bool,
) -> None:
    """Refuse an adapter that peft does not put on its base, or only in part.

    Args:
        config: the transformers config of the base.
        tensors: of the adapter.
        tokenizer_size: one more than the largest id.
        trainable: see `_require_counterparts`.

    Raises:
        ModelError: `adapter-wrong-base`, `adapter-tables`, `adapter-config-hostile`,
            `adapter-wrong-tokenizer`.
    """
    from peft import LoraConfig, PeftModel

    path = files.folder / ADAPTER_CONFIG
    # Making room for new rows changes the config.
    model = meta_model(copy.deepcopy(config))
    _require_quick(read_json(path), [name for name, _ in model.named_modules()], str(path))
    grow_for(model, files.folder, tokenizer_size)
    try:
        with quiet():
            settings = LoraConfig.from_pretrained(str(files.folder))
            # First values that are computed from the base's weights, which are not here.
            settings.init_lora_weights = True
            model = PeftModel.from_pretrained(
                model,
                files.folder,
                is_trainable=trainable,
                config=settings,
                low_cpu_mem_usage=True,
                torch_device="cpu",
            )
    except NotImplementedError:  # what cannot be made without memory: loading will tell
        return
    except Exception as error:  # as in `load._attach`
        if "meta" in str(error):
            return
        raise _refused_by_peft(error, files, base) from error
    _require_counterparts(model, files, base, tensors, trainable=trainable)


def attach(
    model: Any,
    files: ModelFiles,
    base: ModelFiles,
    tensors: dict[str, TensorFacts],
    *,
    trainable: bool,
) -> Any:
    """Put an adapter on its base, with its weights in float32.

    Args:
        model: the base, a transformers PreTrainedModel.
        tensors: of the adapter.
        trainable: whether the adapter's weights get gradients.

    Returns:
        A PeftModel.

    Raises:
        ModelError: `adapter-wrong-base`, `adapter-tables`.
    """
    from peft import PeftModel

    try:
        with quiet():
            # peft casts adapter weights to float32 itself.
            model = PeftModel.from_pretrained(model, files.folder, is_trainable=trainable)
            use_row_layers(model)
    except Exception as error:  # peft: RuntimeError, ValueError, KeyError, TypeError and own ones
        raise _refused_by_peft(error, files, base) from error
    _require_counterparts(model, files, base, tensors, trainable=trainable)
    return model


def _require_quick(config: Mapping[str, Any], layers: list[str], where: str) -> None:
    """Refuse patterns on which Python's engine takes forever: peft matches them with the name of
    every layer."""
    for name in ("rank_pattern", "alpha_pattern"):
        number = len(config.get(name) or ())
        if number > _KEPT_PATTERNS and number * len(layers) > _MOST_COMPILED:
            raise _hostile(f"{name} has {number:,} entries", where)
    patterns = sorted({text for text in _patterns(config) if not _PLAIN.fullmatch(text)})
    if patterns and not are_quick(patterns, layers):
        raise _hostile("its patterns of layer names take seconds to match", where)


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """As peft puts them together."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            yield config[name]
    for name, around in (
        ("modules_to_save", r"(^|.*\.)%s($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\."),
        ("rank_pattern", r"(.*\.)?(%s)$"),
        ("alpha_pattern", r"(.*\.)?(%s)$"),
    ):
        value = config.get(name) or ()
        for text in [value] if isinstance(value, str) else value:
            if not _PLAIN.fullmatch(str(text)):
                yield around.replace("%s", str(text))


def _refused_by_peft(error: Exception, files: ModelFiles, base: ModelFiles) -> ModelError:
    """What peft raised (RuntimeError, ValueError, KeyError, TypeError and its own) as ours."""
    message = str(error)
    shapes = "size mismatch" in message or "not found in the base model" in message
    why = "shapes or layers differ" if shapes else f"{type(error).__name__} from peft"
    return _wrong_base(first_line(error), why, files, base)


def _wrong_base(what: str, why: str, files: ModelFiles, base: ModelFiles) -> ModelError:
    return ModelError(
        f"the adapter does not fit its base {base.source}: {what}",
        where=str(files.folder / ADAPTER_CONFIG),
        why=why,
        fix="set base_model_name_or_path to the model that the adapter was trained on",
        code="adapter-wrong-base",
    )


def _require_counterparts(
    model: Any,
    files: ModelFiles,
    base: ModelFiles,
    tensors: Mapping[str, TensorFacts],
    *,
    trainable: bool,
) -> None:
    """Compare the weights of an adapter in its file with those that peft made for it.

    Args:
        model: a PeftModel, with or without memory.
        trainable: refuse whole embedding tables, which would not be trained further.

    Raises:
        ModelError: `adapter-wrong-base`, `adapter-tables`.
    """
    from peft import get_peft_model_state_dict

    present = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    lost, absent = tensors.keys() - present, present - tensors.keys()
    tables = lost & model.state_dict().keys()
    if tables and trainable:
        raise ModelError(
            f"the adapter contains whole embedding matrices: {listed(tables)}",
            where=str(files.folder),
            why="they would be frozen during training and lost when the adapter is saved",
            fix="merge the adapter into its base first, and train the result",
            code="adapter-tables",
        )
    lost -= tables
    if lost or absent:
        names = lost or absent
        raise _wrong_base(
            f"no counterpart for {counted(len(names), 'weight')}: {listed(names)}",
            "the base does not have the layers that the adapter was trained on, or some of the "
            "adapter's weights are not in its file",
            files,
            base,
        )
