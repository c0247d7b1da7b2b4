"""Whether the files of a model belong together, before its weights are loaded.

input   the files of a whole model, or of an adapter and its base
does    reads config, tokenizer, headers and the first numbers of each tensor; has transformers
        compare names on the meta device, where tensors have no memory
output  what was read, or the error that loading would end in
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.findings import Finding, counted
from truetune.model.adapter_fit import require_adapter, require_fit
from truetune.model.architecture import causal_config, require_shapes, shape_mismatch
from truetune.model.quantise import require_quantised, stored_quantisation
from truetune.model.source import ModelFiles, leads_out, locate
from truetune.model.tokenizer import has_tokenizer, locate_base, num_ids, open_tokenizer
from truetune.model.weights import (
    INDEX,
    WEIGHTS,
    TensorFacts,
    listed,
    look_at_numbers,
    read_headers,
    weight_files,
)
from truetune.system.quiet import quiet


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
    adapter = require_adapter(files) if files.is_adapter else None
    if tokenizer is None:
        tokenizer = open_tokenizer(files if has_tokenizer(files.folder) else base)
    tensors = read_headers(weight_files(base))
    where = str(base.folder)
    require_quantised(config, tensors, str(base.folder / "config.json"))
    # Where names differ, weights may be renamed or merged on loading: transformers judges.
    dry = None if require_shapes(config, tensors, where) else without_memory(base, config)
    if dry:
        judge_loading(*dry, where)
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
                where=str(folder / names[0]),
                count=len(names),
                why="they are stored on another disk, or the folder was made by somebody who knew "
                "where other weights are stored",
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
        require_adapter(files)
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
    except Exception:  # an architecture that needs memory: errors show when it is loaded
        return None
    return model, info


def judge_loading(model: Any, info: dict[str, Any], where: str) -> list[Finding]:
    if info["mismatched_keys"]:
        wrong = [(name, tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]]
        raise shape_mismatch(wrong, where)
    missing = set(info["missing_keys"]) - set(model.all_tied_weights_keys)
    if missing:
        raise ModelError(
            f"the files lack {counted(len(missing), 'weight')} of the model: {listed(missing)}",
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
