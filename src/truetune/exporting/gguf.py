"""Write a model as one GGUF file, which gets its name only after it is verified.

input   a merged model in float32, its contract, rows of the run
does    chooses llama.cpp's pre-tokenizer by ids, writes the file, verifies it
output  WrittenGGUF
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.data.conversation import Conversation
from truetune.errors import CheckFailed
from truetune.exporting.gguf_file import require_quant, write_file
from truetune.exporting.gguf_ids import choose_pre_tokenizer
from truetune.exporting.gguf_proof import Proof, budget_of, prove, reference_of
from truetune.exporting.gguf_shape import require_family, shape_of
from truetune.exporting.gguf_vocabulary import vocabulary_of
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.run_dir import settle, write_json
from truetune.servers.llama_cpp import require_llama_cpp

PROOF = "proof.json"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class WrittenGGUF:
    """A GGUF file.

    Attributes:
        path: of the file.
        quant: its type.
        num_bytes: its size.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer.
        context: number of tokens up to which llama.cpp computes the same as the model.
        proof: the result of the comparison.
        findings: notes and warnings.
    """

    path: Path
    quant: str
    num_bytes: int
    pre_tokenizer: str
    context: int
    proof: Proof
    findings: tuple[Finding, ...]


def write_gguf(
    loaded: LoadedModel,
    contract: PromptContract,
    folder: Path,
    *,
    quant: str,
    name: str,
    conversations: Sequence[Conversation] = (),
    template: str | dict[str, str] | None = None,
    on_stage: Tell | None = None,
) -> WrittenGGUF:
    """Write a model and verify it.

    Args:
        loaded: in float32, without adapter.
        folder: an existing folder, into which the file and proof.json are written.
        name: the model name that is written into the file.
        conversations: rows on which it is verified, besides fixed prompts.
        template: the file's chat template, if it differs in wording from the contract's.
        on_stage: is called with the name of each stage.

    Raises:
        UsageError: an architecture, tokenizer or type that llama.cpp does not support.
        CheckFailed: llama.cpp computes something else from the file, which is removed.
    """
    tell = on_stage or (lambda _: None)
    require_llama_cpp("a GGUF file")
    require_quant(quant)
    model = loaded.transformers_model
    require_family(model.config.get_text_config(decoder=True))
    shape = shape_of(model)
    rows = model.get_input_embeddings().weight.shape[0]
    tell("choosing llama.cpp's pre-tokenizer by ids")
    vocabulary, found = vocabulary_of(contract, rows)
    vocabulary, _ = choose_pre_tokenizer(vocabulary, contract, folder)
    if template is not None:
        vocabulary = replace(vocabulary, template=template)
    unproved, path = folder / "unproved.gguf", folder / f"model-{quant}.gguf"
    config = model.config.get_text_config(decoder=True)
    tell("computing the model's own predictions")
    reference = reference_of(loaded, contract, conversations, shape.context)
    # Whether a file of few bits is written rightly does not show in what the bits cost: the same
    # file in float32 says it to seven digits.
    kinds = ["f32", quant] if quant != "f32" and small_enough(model, folder) else [quant]
    try:
        for kind in kinds:
            tell(f"writing {kind} and verifying it with llama.cpp")
            write_file(unproved, model, shape, vocabulary, kind, name)
            proof = prove(unproved, contract, reference, budget_of(kind, config))
            require_proved(proof, "the GGUF file does not match the model and was removed")
            if kind != quant:
                unproved.unlink()
        unproved.replace(path)
    finally:
        unproved.unlink(missing_ok=True)
    findings = (*shape.findings, *found, *proof.findings)
    return finished(
        path,
        quant,
        vocabulary.pre,
        shape.context,
        proof,
        findings,
        proved_in_float32=kinds[0] == "f32",
    )


def require_proved(proof: Proof, what: str) -> None:
    """Raise CheckFailed if llama.cpp computes something else from a file."""
    if not proof.holds:
        raise CheckFailed(
            what,
            [f for f in proof.findings if f.level == "error"],
            fix="see each finding; truetune export RUN --to merged writes a model for other "
            "servers",
        )


def finished(
    path: Path,
    quant: str,
    pre: str,
    context: int,
    proof: Proof,
    findings: tuple[Finding, ...],
    **more: Any,
) -> WrittenGGUF:
    """Write proof.json beside a verified file."""
    facts = {
        "file": path.name,
        "sha256": settle(path),
        "quant": quant,
        "pre_tokenizer": pre,
        "context": context,
        **more,
        **proof.as_dict(),
        "findings": [finding.as_dict() for finding in findings],
    }
    write_json(path.with_name(PROOF), facts)
    return WrittenGGUF(path, quant, path.stat().st_size, pre, context, proof, findings)


# Bytes of a file in float32 that is written for the proof alone.
_MOST_TWIN = 16 * 2**30


def small_enough(model: Any, folder: Path) -> bool:
    """Whether a file in float32 may be written only for verification."""
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return size <= min(_MOST_TWIN, shutil.disk_usage(folder).free // 2)
