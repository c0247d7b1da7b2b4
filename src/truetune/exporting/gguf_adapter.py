"""Write a LoRA adapter as a GGUF file that llama.cpp adds to a base model, and verify it with
llama.cpp.

input   an adapter opened on its base in float32, its contract, rows of the run
does    writes both matrices of every layer under llama.cpp's names; has llama.cpp serve the base
        with it, and compares with transformers and peft
output  WrittenGGUF; the base's file is only written for the verification
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.data.conversation import Conversation
from truetune.errors import UsageError
from truetune.exporting.gguf import Tell, WrittenGGUF, finished, require_proved, small_enough
from truetune.exporting.gguf_file import new_writer, write_file, write_tensors
from truetune.exporting.gguf_ids import choose_pre_tokenizer
from truetune.exporting.gguf_proof import budget_of, prove, reference_of
from truetune.exporting.gguf_shape import Shape, as_rotated, shape_of
from truetune.exporting.gguf_vocabulary import vocabulary_of
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.system.lazy import gguf, torch

# Types in which llama.cpp takes the matrices of an adapter, and nothing is lost that matters.
QUANTS = ("f32", "f16", "bf16")


def require_lora(config: Mapping[str, Any], quant: str) -> None:
    """Refuse adapters that llama.cpp cannot represent.

    Args:
        config: the adapter's.

    Raises:
        UsageError: the adapter contains more than pairs of matrices, or the type is not one for
            adapters.
    """
    if quant not in QUANTS:
        raise UsageError(
            f"an adapter cannot be written as {quant}",
            where="--quant",
            fix=f"use one of {', '.join(QUANTS)}; the base may have any type",
            code="gguf-quant",
        )
    reasons = [
        said
        for said, there in (
            (f"its type is {config.get('peft_type')}", config.get("peft_type") != "LORA"),
            (
                "it is a DoRA adapter, whose magnitudes a GGUF adapter cannot hold",
                config.get("use_dora"),
            ),
            ("it contains embeddings of new tokens", config.get("trainable_token_indices")),
            ("it contains whole layers (modules_to_save)", config.get("modules_to_save")),
            ("it contains biases", config.get("bias", "none") != "none" or config.get("lora_bias")),
        )
        if there
    ]
    if reasons:
        raise UsageError(
            "llama.cpp cannot add this adapter to a base",
            why="; ".join(reasons),
            fix="export the merged model: truetune export RUN --to gguf -o DIR",
            code="gguf-adapter",
        )


def write_adapter(
    base: LoadedModel,
    loaded: LoadedModel,
    contract: PromptContract,
    folder: Path,
    *,
    quant: str,
    name: str,
    conversations: Sequence[Conversation] = (),
    on_stage: Tell | None = None,
) -> WrittenGGUF:
    """Write an adapter and verify it.

    Args:
        base: in float32.
        loaded: the adapter on its base, in float32.
        folder: an existing folder, into which the file and proof.json are written.
        name: the model name that is written into the file.
        conversations: rows on which it is verified, besides fixed prompts.

    Raises:
        UsageError: an architecture, tokenizer or layer that llama.cpp does not support.
        CheckFailed: llama.cpp computes something else from the file, which is removed.
    """
    tell = on_stage or (lambda _: None)
    model = base.transformers_model
    shape = shape_of(model)
    pairs = list(_pairs(loaded.model, model, shape))
    tell("choosing llama.cpp's pre-tokenizer by ids")
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary, found = vocabulary_of(contract, rows)
    vocabulary, _ = choose_pre_tokenizer(vocabulary, contract, folder)
    reference = reference_of(loaded, contract, conversations, shape.context)
    whole, path = folder / "base.gguf", folder / f"adapter-{quant}.gguf"
    unproved = folder / "unproved.gguf"
    try:
        tell("writing the base in float32, only for the verification")
        kind = "f32" if small_enough(model, folder) else "f16"
        write_file(whole, model, shape, vocabulary, kind, name)
        tell(f"writing the adapter in {quant} and verifying both with llama.cpp")
        _write(unproved, pairs, shape, quant, name)
        config = model.config.get_text_config(decoder=True)
        budget = max((budget_of(each, config) for each in (kind, quant)), key=lambda b: b.most)
        proof = prove(whole, contract, reference, budget, adapter=unproved)
        require_proved(proof, "the GGUF adapter does not match the adapter and was removed")
        unproved.replace(path)
    finally:
        whole.unlink(missing_ok=True)
        unproved.unlink(missing_ok=True)
    findings = (*shape.findings, *found, *proof.findings)
    return finished(path, quant, vocabulary.pre, shape.context, proof, findings)


def on_stops(contract: PromptContract, base_stops: Sequence[int]) -> list[Finding]:
    """Warn if the base's own GGUF file will not end replies as they were trained to end."""
    missing = [i for i in contract.stop_ids if i not in base_stops]
    if not missing:
        return []
    return [
        Finding(
            "gguf-adapter-stops",
            "warning",
            f"a GGUF file of the base does not end replies on {contract.tokens.named(missing)}",
            why="llama.cpp takes its stop tokens from the base's file, and an adapter's file has "
            "none",
            fix="export the merged model: truetune export RUN --to gguf -o DIR",
        )
    ]


Pair = tuple[str, "torch.Tensor", "torch.Tensor"]


def _pairs(adapted: Any, model: Any, shape: Shape) -> Iterator[Pair]:
    """(name in the file, A, B) of each layer; B holds whatever its scale has beyond alpha 1 of
    rank 1."""
    lost = []
    for path, module in adapted.named_modules():
        matrices = getattr(module, "lora_A", None)
        if not matrices and not getattr(module, "lora_embedding_A", None):
            continue
        own = path.removeprefix("base_model.model.") + ".weight"
        written = shape.names.get(own)
        if not matrices or written is None:
            lost.append(own)
            continue
        for key, first in matrices.items():
            a_RI = first.weight.detach().float().cpu()
            b_OR = module.lora_B[key].weight.detach().float().cpu()
            # llama.cpp's scale is alpha through rank, and the file's alpha is 1.
            b_OR = b_OR * float(module.scaling[key]) * len(a_RI)
            yield written, a_RI, as_rotated(own, b_OR, model, shape)
    if lost:
        raise UsageError(
            f"llama.cpp cannot add this adapter to {lost[0]}",
            why="it is an embedding, or shares its matrix with one",
            fix="export the merged model: truetune export RUN --to gguf -o DIR",
            code="gguf-adapter",
        )


def _write(path: Path, pairs: Sequence[Pair], shape: Shape, quant: str, name: str) -> None:
    writer = new_writer(path, shape.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
    tensors = {}
    for written, a_RI, b_OR in pairs:
        tensors[f"{written}.lora_a"], tensors[f"{written}.lora_b"] = a_RI, b_OR
    sizes = {key: tuple(value.shape) for key, value in tensors.items()}
    write_tensors(writer, path, sizes, tensors.items(), dict.fromkeys(tensors, quant.upper()))
