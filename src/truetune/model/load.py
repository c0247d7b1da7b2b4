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
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.findings import Finding
from truetune.model.adapter_fit import (
    refused_by_peft,
    require_bounded_adapter,
    require_counterparts,
    require_fit,
)
from truetune.model.architecture import (
    causal_config,
    embedding_rows,
    require_shapes,
    shape_mismatch,
)
from truetune.model.fingerprint import (
    Fingerprint,
    read_fingerprint,
    require_same_base,
    take_fingerprint,
)
from truetune.model.new_tokens import grow_for, use_row_layers
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
    require_quantised,
    same_in_evaluation,
    stored_quantisation,
)
from truetune.model.source import (
    ADAPTER_CONFIG,
    ModelFiles,
    first_line,
    leads_out,
    locate,
    read_json,
)
from truetune.model.tokenizer import (
    has_tokenizer,
    load_tokenizer,
    locate_base,
    num_ids,
    open_tokenizer,
)
from truetune.model.weights import (
    INDEX,
    WEIGHTS,
    TensorFacts,
    listed,
    look_at_numbers,
    main_dtype,
    read_headers,
    weight_files,
)
from truetune.system.lazy import torch

__all__ = ["Choice", "LoadedModel", "load_model", "load_tokenizer"]

# The first matrix of a LoRA pair: its rows are the rank.
_LORA_A = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")


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
    require_opener(causal_config(base_files), str(base_files.folder / "config.json"))
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
        model = _attach(model, files, base_files, whole.adapter, trainable=purpose != "inference")
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


@dataclass(frozen=True, eq=False)
class Whole:
    """A model whose files belong together, as far as config and headers say.

    Attributes:
        config: of the base.
        tokenizer: of the model.
        tensors: of the base, by name.
        adapter: tensors of the adapter; None if there is none.
        findings: notes.
    """

    config: Any
    tokenizer: Any
    tensors: dict[str, TensorFacts]
    adapter: dict[str, TensorFacts] | None
    findings: tuple[Finding, ...]


def require_whole(
    files: ModelFiles,
    base: ModelFiles,
    tokenizer: Any = None,
    *,
    trainable: bool = False,
    finite: bool = True,
) -> Whole:
    """Refuse what cannot be loaded as it is, before the weights are: training, checking and
    exporting ask here alike.

    Args:
        base: of an adapter; `files` if it is none.
        tokenizer: the model's own, where it is open already.
        trainable: to be trained further, which whole tables in an adapter cannot be.
        finite: look at the first numbers of every tensor.

    Raises:
        ModelError: no causal language model, code of its own, no or damaged weights, pickles only,
            weights that are missing, have another shape, are there twice or are not finite; an
            adapter that is not LoRA or does not fit its base.
    """
    config = causal_config(base)
    adapter = _require_adapter(files) if files.is_adapter else None
    if tokenizer is None:
        tokenizer = open_tokenizer(files if has_tokenizer(files.folder) else base)
    tensors = read_headers(weight_files(base))
    where = str(base.folder)
    require_quantised(config, tensors, str(base.folder / "config.json"))
    # Where names differ, weights may be renamed or merged on loading: transformers judges.
    dry = None if require_shapes(config, tensors, where) else without_memory(base, config)
    if dry:
        _judge_loading(*dry, where)
    if finite:
        # Old files hold masks beside the weights, with infinity in them.
        _require_finite(base, unused=dry[1]["unexpected_keys"] if dry else ())
        if files.is_adapter:
            _require_finite(files)
    if adapter is not None:
        require_fit(files, base, config, adapter, num_ids(tokenizer), trainable=trainable)
    return Whole(config, tokenizer, tensors, adapter, tuple(_linked({files.folder, base.folder})))


def _require_finite(files: ModelFiles, unused: Collection[str] = ()) -> None:
    broken = [name for name in look_at_numbers(weight_files(files))[0] if name not in unused]
    if broken:
        raise ModelError(
            f"{listed(broken)} contain NaN or infinity",
            where=str(files.folder),
            why="the training that made them diverged, or float16 overflowed",
            fix="use an earlier checkpoint, and train in bfloat16 or float32",
            code="weights-not-finite",
        )


def _linked(folders: Iterable[Path]) -> Iterator[Finding]:
    """Weights may lie on another disk: their numbers are checked, and they hold no text."""
    for folder in sorted(folders):
        found = (*folder.glob("*.safetensors"), folder / INDEX)
        names = sorted(p.name for p in found if p.is_symlink() and leads_out(p, folder))
        if names:
            yield Finding(
                code="weights-linked",
                level="note",
                what=f"weights are links that lead out of the model's folder: {listed(names)}",
                where=str(folder),
                count=len(names),
                why="they lie on another disk, or the folder was made by somebody who knew where "
                "other weights lie",
                fix="nothing to do if the links are your own",
            )


def require_whole_folder(
    source: str | Path,
    revision: str | None = None,
    *,
    base: str | Path | None = None,
    tokenizer: Any = None,
    trainable: bool = False,
) -> Whole | None:
    """As `require_whole`, of a folder of this machine. Nothing is fetched from the Hub: what is not
    in its cache is judged when it is loaded, and the answer is None.

    Raises:
        ModelError: see `require_whole`.
    """
    files = locate(source, revision, weights=False)
    below = locate_base(files, weights=False, instead=base) if files.is_adapter else files
    if not below.is_hub or (below.folder / WEIGHTS).is_file():
        return require_whole(files, below, tokenizer, trainable=trainable)
    if files.is_adapter:
        _require_adapter(files)
    return None


def without_memory(files: ModelFiles, config: Any) -> tuple[Any, dict[str, Any]] | None:
    """The model on the meta device, where tensors have names and shapes only, and what transformers
    says of loading it; None if that says nothing (a quantised model needs its library)."""
    from transformers import AutoModelForCausalLM

    if stored_quantisation(config):
        return None
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                files.folder,
                config=config,
                device_map="meta",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (
        Exception
    ):  # an architecture that cannot be created without memory: errors show when it is loaded
        return None
    return model, info


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
            fix="use a smaller model, LoRA instead of full training, or another device",
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
    return model, _judge_loading(model, info, str(files.folder))


def _judge_loading(model: Any, info: dict[str, Any], where: str) -> list[Finding]:
    if info["mismatched_keys"]:
        wrong = [(name, tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]]
        raise shape_mismatch(wrong, where)
    missing = set(info["missing_keys"]) - set(model.all_tied_weights_keys)
    if missing:
        raise ModelError(
            f"{len(missing)} weights are not in the files: {listed(missing)}",
            where=where,
            why="transformers would fill them with random numbers; the model was saved without "
            "them, or config.json describes another model",
            fix="fetch the model again; if only the output head is missing and it shares the "
            "input embedding, config.json needs tie_word_embeddings: true",
            code="model-weights-missing",
        )
    unused = info["unexpected_keys"]
    if not unused:
        return []
    return [
        Finding(
            code="weights-unused",
            level="warning",
            what=f"some weights in the files do not belong to the model: {listed(unused)}",
            where=where,
            count=len(unused),
            why="config.json describes a smaller model (with fewer layers?) or a different one",
            fix="compare config.json with the one that came with the weights",
        )
    ]


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
            where=str(files.folder),
            count=ids - rows,
            why="tokens were added to the tokenizer, but the model's embeddings were not resized",
            fix="rows with these tokens cannot be trained: use the tokenizer that came with the "
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


def _require_adapter(files: ModelFiles) -> dict[str, TensorFacts]:
    """Facts of the adapter's tensors, once its config and file can be read."""
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


def _attach(
    model: Any,
    files: ModelFiles,
    base: ModelFiles,
    tensors: dict[str, TensorFacts],
    *,
    trainable: bool,
) -> Any:
    from peft import PeftModel

    try:
        with quiet():
            # peft casts adapter weights to float32 itself.
            model = PeftModel.from_pretrained(model, files.folder, is_trainable=trainable)
            use_row_layers(model)
    except Exception as error:  # peft: RuntimeError, ValueError, KeyError, TypeError and own ones
        raise refused_by_peft(error, files, base) from error
    require_counterparts(model, files, base, tensors, trainable=trainable)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' tables, progress bars and warnings; findings report what matters."""
    import warnings

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
