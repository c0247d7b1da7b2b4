"""Load a model together with its tokenizer.

input   a folder or Hub id, a purpose
does    reports errors before weights are read; chooses device and dtypes with reasons; loads
        safetensors only, runs no code that comes with a model, and refuses weights that
        transformers would fill in at random
output  LoadedModel
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.findings import Finding
from truetune.model.adapter_fit import attach
from truetune.model.architecture import (
    causal_config,
    embedding_rows,
)
from truetune.model.fingerprint import (
    Fingerprint,
    read_fingerprint,
    require_same_base,
    take_fingerprint,
)
from truetune.model.new_tokens import grow_for
from truetune.model.placement import Choice, Placement, Purpose, place
from truetune.model.quantise import (
    NAMES,
    LoadIn,
    Quantised,
    dequantised,
    quantization_config,
    refuse_twice,
    require_bitsandbytes,
    require_opener,
    same_in_evaluation,
    stored_quantisation,
)
from truetune.model.source import (
    ADAPTER_CONFIG,
    ModelFiles,
    first_line,
    locate,
)
from truetune.model.tokenizer import (
    has_tokenizer,
    load_tokenizer,
    locate_base,
    num_ids,
)
from truetune.model.weights import (
    main_dtype,
)
from truetune.model.whole import judge_loading, require_whole
from truetune.system.lazy import torch
from truetune.system.quiet import quiet

__all__ = ["Choice", "LoadedModel", "load_model", "load_tokenizer"]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and its tokenizer.

    Attributes:
        model: a transformers PreTrainedModel, or a PeftModel around one.
        tokenizer: what AutoTokenizer gives; an adapter's own if it has one.
        source: folder or Hub id, as the user wrote it.
        revision: commit of a Hub model, None for a folder.
        base: absolute path or Hub id of the model without adapter (the same model if there is
            none).
        base_revision: commit of a base from the Hub.
        base_dtype: torch name of the dtype that the base's weights have on disk.
        is_adapter: whether `model` is a PeftModel.
        device: of all weights.
        compute_dtype: for autocast; None to compute in the parameters' own type.
        choices: device, dtype and parameter dtype, each with its reason.
        findings: warnings and notes about this model.
        quantised: in how many bits the base is held, None if it is not quantised here.
        fingerprint: of the base, where the model is an adapter or is loaded to train one.
    """

    model: Any
    tokenizer: Any
    source: str
    revision: str | None
    base: str
    base_revision: str | None
    base_dtype: str
    is_adapter: bool
    device: torch.device
    compute_dtype: torch.dtype | None
    choices: tuple[Choice, ...]
    findings: tuple[Finding, ...] = ()
    quantised: Quantised | None = None
    fingerprint: Fingerprint | None = None

    @property
    def transformers_model(self) -> Any:
        """The PreTrainedModel, without peft's wrapper; injected LoRA layers still act in it."""
        return self.model.get_base_model() if self.is_adapter else self.model


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    purpose: Purpose = "full",
    base: str | Path | None = None,
    load_in: LoadIn = "as-trained",
    full_fingerprint: bool = False,
    bf16_weights: bool = False,
    tokenizer: Any = None,
) -> LoadedModel:
    """Load a causal language model, or an adapter on its base.

    An adapter that truetune saved is opened only on the base it was trained on.

    Args:
        source: model or adapter folder, or Hub id.
        revision: branch, tag or commit of a Hub model.
        device: auto (cuda, mps, cpu in this order), or a torch device.
        dtype: the type to compute in; auto takes bfloat16 where the GPU has it, float32 on CPU.
        purpose: full: all weights trainable, in float32. lora: base frozen, in the compute type.
            inference: nothing trainable. An adapter's base is frozen whatever the purpose, and
            the adapter's weights are float32.
        base: where an adapter's base is now; None takes its config's.
        load_in: bits that the (frozen) base is held in; see `LoadIn`.
        full_fingerprint: hash every byte of the base, not samples.
        bf16_weights: purpose full with weights in bfloat16, for an optimizer that keeps the rest.
        tokenizer: the model's own, where it is open already.

    Raises:
        ModelError: the model cannot be loaded; everything that can be checked before weights are
            read is checked first.
        UsageError: a device or dtype is not available here, or bitsandbytes is missing.
    """
    files = locate(source, revision, weights=True)
    base_files = locate_base(files, weights=True, instead=base) if files.is_adapter else files
    config, config_json = causal_config(base_files), str(base_files.folder / "config.json")
    if load_in in ("4bit", "8bit"):
        # This comes first: the package that opens such files would not help.
        refuse_twice(config, config_json)
    require_opener(config, config_json)
    # Answers may be asked of what is broken, to see how; it is not trained further.
    whole = require_whole(
        files,
        base_files,
        tokenizer,
        trainable=purpose != "inference",
        finite=purpose != "inference",
    )
    config, tokenizer, tensors = whole.config, whole.tokenizer, whole.tensors
    base_dtype = main_dtype(tensors) or "float32"
    _require_trainable(config, purpose, str(base_files.folder))
    trained = read_fingerprint(files.folder) if files.is_adapter else None
    full = full_fingerprint or (trained is not None and trained.is_full and purpose != "inference")
    fingerprint = None
    if files.is_adapter or purpose == "lora":
        size = num_ids(tokenizer)
        fingerprint = take_fingerprint(base_files, tensors, config, size, full=full)
    if trained and fingerprint:
        require_same_base(trained, fingerprint, files.folder)
    quantised = _quantised(load_in, trained, files)
    placement = place(
        device,
        dtype,
        "lora" if files.is_adapter and purpose == "full" else purpose,
        base_dtype,
        bf16_weights=bf16_weights,
    )
    model, findings = _read_weights(base_files, config, placement, quantised)
    findings += whole.findings
    if load_in == "dequantised" and (quantised or stored_quantisation(config)):
        with quiet():
            model = dequantised(model, str(base_files.folder))
        quantised = None
    if purpose != "full" or files.is_adapter:
        model.requires_grad_(False)
    if files.is_adapter:
        grow_for(model, files.folder, num_ids(tokenizer))
    findings += _tokenizer_findings(model, tokenizer, files)
    if revision and not files.is_hub:
        findings.append(_useless_revision(revision, files))
    if whole.adapter is not None:
        model = attach(model, files, base_files, whole.adapter, trainable=purpose != "inference")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=files.source,
        revision=files.revision,
        base=base_files.address,
        base_revision=base_files.revision,
        base_dtype=base_dtype,
        is_adapter=files.is_adapter,
        device=placement.device,
        compute_dtype=placement.compute,
        choices=(*placement.choices, *_quantised_choice(quantised, trained)),
        findings=tuple(findings),
        quantised=quantised,
        fingerprint=fingerprint,
    )


def _quantised(load_in: LoadIn, trained: Fingerprint | None, files: ModelFiles) -> Quantised | None:
    """In how many bits the base is to be read."""
    if load_in in ("4bit", "8bit"):
        require_bitsandbytes(f"a base in {NAMES[load_in]}")
        return load_in
    before = trained.quantised if trained else None
    if load_in == "as-stored" or before is None:
        return None
    require_bitsandbytes(f"the adapter {files.source}, trained on a base in {NAMES[before]},")
    return before


def _quantised_choice(
    quantised: Quantised | None, trained: Fingerprint | None
) -> tuple[Choice, ...]:
    if quantised is None:
        return ()
    reason = "as the adapter was trained" if trained and trained.quantised else "as asked"
    return (Choice("base", NAMES[quantised], reason),)


def _require_trainable(config: Any, purpose: Purpose, where: str) -> None:
    if purpose == "full" and getattr(config, "quantization_config", None):
        raise ModelError(
            "the weights are quantised and cannot be trained in full",
            where=where,
            why="config.json has a quantization_config",
            fix="train an adapter on it (LoRA), or start from the unquantised model",
            code="model-quantised",
        )


def _read_weights(
    files: ModelFiles, config: Any, placement: Placement, quantised: Quantised | None
) -> tuple[Any, list[Finding]]:
    from transformers import AutoModelForCausalLM

    # On CPU without a device map, which would involve accelerate without need.
    where: dict[str, Any] = {}
    if placement.device.type != "cpu":
        where["device_map"] = {"": placement.device}
    if quantised:
        refuse_twice(config, str(files.folder))
        compute = placement.compute or placement.parameters
        where["quantization_config"] = quantization_config(quantised, compute)
    # compressed-tensors draws bars of its own.
    bars = (
        contextlib.redirect_stderr(io.StringIO())
        if stored_quantisation(config) == "compressed-tensors"
        else contextlib.nullcontext()
    )
    try:
        with quiet(), bars:
            model, info = AutoModelForCausalLM.from_pretrained(
                files.folder,
                config=config,
                dtype=placement.parameters,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Wrong shapes are reported below, with their names.
                ignore_mismatched_sizes=True,
                **where,
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the model does not fit on {placement.device}",
            where=str(files.folder),
            why=first_line(error),
            fix="use a smaller model, LoRA instead of full fine-tuning, or another device",
            code="model-too-large",
        ) from error
    except Exception as error:  # whatever a library says of files that it cannot load
        raise ModelError(
            f"the weights cannot be loaded: {first_line(error)}",
            where=str(files.folder),
            why=f"{type(error).__name__} from transformers",
            fix="check that config.json and the weights belong together, or fetch the model again",
            code="model-unloadable",
        ) from error
    if quantised or stored_quantisation(config):
        same_in_evaluation(model)
    return model, judge_loading(model, info, str(files.folder))


def _tokenizer_findings(model: Any, tokenizer: Any, files: ModelFiles) -> list[Finding]:
    rows, ids = embedding_rows(model), num_ids(tokenizer)
    if ids <= rows:
        return []
    what = f"the tokenizer has ids up to {ids - 1}, but the model's embeddings end at {rows - 1}"
    if files.is_adapter and has_tokenizer(files.folder):
        raise ModelError(
            what,
            where=str(files.folder / ADAPTER_CONFIG),
            why="the adapter was trained on another base, or its base was resized",
            fix="set base_model_name_or_path to the base it was trained on",
            code="adapter-wrong-base",
        )
    return [
        Finding(
            code="tokenizer-beyond-model",
            level="warning",
            what=what,
            where=f"{files.folder}, id {rows}",
            count=ids - rows,
            why="tokens were added to the tokenizer, but the model's embeddings were not resized",
            fix="rows with these tokens cannot be trained on: use the tokenizer that came with the "
            "weights",
        )
    ]


def _useless_revision(revision: str, files: ModelFiles) -> Finding:
    return Finding(
        code="revision-unused",
        level="warning",
        what=f"--revision {revision} has no effect: {files.source} is a local folder",
        fix="omit it, or pass a Hub id",
    )
