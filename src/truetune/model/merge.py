"""Merge an adapter into its base: in float32, never into quantised weights.

input   an adapter folder
does    opens the base as it is stored, or rounded to the bits it was trained on and in plain layers
        again; adds the adapter in float32, new rows included; unties a head that the adapter
        changed on one side only
output  Merged: a plain model in float32, to be saved in the base's own type
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truetune.errors import ModelError, UsageError
from truetune.findings import Finding
from truetune.model.architecture import causal_config
from truetune.model.fingerprint import read_fingerprint
from truetune.model.load import LoadedModel, load_model
from truetune.model.quantise import NAMES, LoadIn, stored_quantisation
from truetune.model.source import locate
from truetune.model.tokenizer import locate_base
from truetune.system.lazy import torch
from truetune.system.quiet import quiet

Onto = Literal["auto", "original", "dequantised"]


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        loaded: float32, without adapter.
        onto: which weights the adapter was added to, in words.
        load_in: how the adapter is opened to compute the same.
        dtype: torch name of the type to save in: the base's on disk.
        findings: notes.
    """

    loaded: LoadedModel
    onto: str
    load_in: LoadIn
    dtype: str
    findings: tuple[Finding, ...]


def merge_adapter(
    source: str | Path,
    *,
    base: str | Path | None = None,
    onto: Onto = "auto",
    device: str = "cpu",
) -> Merged:
    """Merge an adapter into its base, in memory.

    Args:
        source: adapter folder or Hub id.
        base: where the base is now; None takes the adapter's config's.
        onto: original: the weights as they are stored. dequantised: rounded to the bits that the
            adapter was trained on, then in float32 again. auto: what the adapter was trained on.
        device: where to add; float32 weights must fit there.

    Raises:
        UsageError: no adapter, or `dequantised` where nothing is quantised.
        ModelError: it cannot be loaded, its base is different, or the sum is not finite.
    """
    files = locate(source, weights=True)
    if not files.is_adapter:
        raise UsageError(
            f"{source} is not an adapter: there is nothing to merge",
            why="it has no adapter_config.json; a run with full fine-tuning is already a complete "
            "model",
            fix="use the model as it is",
            code="merge-no-adapter",
        )
    stored = stored_quantisation(causal_config(locate_base(files, weights=True, instead=base)))
    trained = read_fingerprint(files.folder)
    bits = trained.quantised if trained else None
    load_in = _choose(onto, bits is not None, stored, str(files.folder))
    loaded = load_model(
        source, base=base, device=device, dtype="float32", purpose="inference", load_in=load_in
    )
    findings = _untie(loaded)
    config = loaded.transformers_model.config
    try:
        with quiet():
            model = loaded.model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"the merged weights are not finite: {error}",
            where=str(files.folder),
            why="the adapter holds NaN or infinite numbers",
            fix="merge an earlier checkpoint of the run",
            code="merge-not-finite",
        ) from error
    model.requires_grad_(False)
    dtype = loaded.base_dtype
    if stored:
        dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    if load_in == "dequantised":
        rounded = NAMES[bits] if bits else f"the weights in the files ({stored})"
        words = f"the base rounded to {rounded} and dequantised, as the adapter was trained"
        if bits == "4bit":
            # The layers of 4 bits compute with the same weights; those of 8 bits round their
            # inputs as well, which no merged model can.
            load_in = "as-trained"
    else:
        words = "the base's original weights"
        if bits:
            findings.append(_trained_on_other(NAMES[bits]))
    plain = dataclasses.replace(
        loaded, model=model, is_adapter=False, quantised=None, fingerprint=None
    )
    return Merged(plain, words, load_in, dtype, tuple(findings))


# Significant bits of a number.
_BITS = {"bfloat16": 8, "float16": 11}


def round_by_chance(loaded: LoadedModel, dtype: str) -> bool:
    """Move the weights that an adapter is added to by as much as a merged model's are rounded:
    by chance one in 24 a unit in the last place up and one down, which has the variance of
    rounding. In place; whether there was any such weight, and any such rounding.

    Args:
        dtype: that the merged weights are saved in.
    """
    if dtype not in _BITS:
        return False
    draw = torch.Generator().manual_seed(0)
    moved = False
    with torch.no_grad():
        for module in loaded.model.modules():
            weight = _plain(module).weight if _has_lora(module) else None
            if weight is None or not weight.is_floating_point():
                continue
            unit = torch.exp2(torch.frexp(weight.float()).exponent.float() - _BITS[dtype])
            drawn = torch.rand(weight.shape, generator=draw).to(weight.device)
            steps = (drawn < 1 / 24).float() - (drawn > 23 / 24).float()
            weight.copy_(weight.float() + unit * steps)
            moved = True
    return moved


def _choose(onto: Onto, trained_quantised: bool, stored: str | None, where: str) -> LoadIn:
    if onto == "original" and stored:
        raise UsageError(
            f"the base has no original weights: its files are quantised ({stored})",
            where=where,
            fix="use --onto dequantised, or pass the unquantised base with --base",
            code="merge-no-original",
        )
    quantised = trained_quantised or stored is not None
    if onto == "dequantised" and not quantised:
        raise UsageError(
            "--onto has no effect: the adapter was trained on the original weights, which are not "
            "quantised",
            where=where,
            fix="omit --onto",
            code="merge-not-quantised",
        )
    return "as-stored" if onto == "original" or not quantised else "dequantised"


def _trained_on_other(bits: str) -> Finding:
    return Finding(
        "merged-onto-other-weights",
        "warning",
        f"the adapter was trained on {bits}, but merged onto the original weights",
        why="the adapter also learned to correct rounding errors, so the merged model is not the "
        "one that was trained",
        fix="use --onto dequantised, unless the merge onto the original weights scores better",
    )


def _untie(loaded: LoadedModel) -> list[Finding]:
    """Give the head a matrix of its own where the adapter changes one side of a tied pair.

    Merged in place, the update of one side would move the other as well. New rows are the same on
    both sides, and stay tied.
    """
    model = loaded.transformers_model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return []
    inner, outer = _plain(embedding), _plain(head)
    if inner.weight is not outer.weight:
        return []
    if not any(_has_lora(module) for module in (embedding, head)):
        return []
    outer.weight = torch.nn.Parameter(outer.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    text_config = model.config.get_text_config(decoder=True)
    text_config.tie_word_embeddings = False
    note = Finding(
        "head-untied",
        "note",
        "the output head and the input embedding are separate matrices in the merged model",
        where="config.json (tie_word_embeddings: false)",
        why="they were tied, and the adapter changes only one of them",
    )
    return [note]


def _plain(module: Any) -> Any:
    """The layer under peft's wrappers."""
    while True:
        if hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        elif hasattr(module, "original_module"):
            module = module.original_module
        else:
            return module


def _has_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
