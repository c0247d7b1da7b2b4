"""A run, a model or an adapter as a GGUF file: merged where it is an adapter, written, proved
against llama.cpp, and only then given its name.
"""

from __future__ import annotations

from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.data.conversation import Conversation
from truetune.errors import UsageError
from truetune.exporting.gguf import WrittenGGUF, write_gguf
from truetune.exporting.gguf_file import require_quant
from truetune.exporting.gguf_shape import require_family
from truetune.findings import Finding
from truetune.listener import Listener
from truetune.model.architecture import causal_config
from truetune.model.load import LoadedModel, load_model
from truetune.model.merge import Onto, merge_adapter
from truetune.model.source import locate
from truetune.model.tokenizer import load_tokenizer, locate_base
from truetune.run_dir import named_at_last, opened
from truetune.servers.llama_cpp import require_llama_cpp
from truetune.verification.artifact import run_of
from truetune.verification.rows import read_rows


def export_gguf(
    source: str,
    output: Path | str,
    *,
    quant: str = "f16",
    base: str | None = None,
    onto: Onto = "auto",
    device: str = "cpu",
    listener: Listener | None = None,
) -> WrittenGGUF:
    """Write a GGUF file into a new folder.

    Args:
        source: a run, a model or adapter folder, or a Hub id.
        output: the folder; must not exist.
        quant: see `gguf_file.QUANTS`.
        base, onto, device: of an adapter, see `merge_adapter`.

    Raises:
        TruetuneError: it cannot be written, or llama.cpp makes something else of it; nothing is
            left behind.
    """
    listener = listener or Listener()
    require_llama_cpp("a GGUF file")
    require_quant(quant)
    _require_folder(Path(output))
    folder = opened(source)
    files = locate(folder, weights=False)
    whole = locate_base(files, weights=False, instead=base) if files.is_adapter else files
    require_family(causal_config(whole).get_text_config(decoder=True))
    with named_at_last(Path(output)) as unnamed:
        loaded, findings = merged_or_whole(folder, base, onto, device, listener)
        for finding in findings:
            listener.finding(finding)
        unnamed.mkdir()
        made = write_gguf(
            loaded,
            PromptContract.load(load_tokenizer(folder)),
            unnamed,
            quant=quant,
            name=Path(source).name,
            conversations=rows_of(source),
            on_stage=listener.stage,
        )
        for finding in made.findings:
            listener.finding(finding)
    return WrittenGGUF(
        Path(output) / made.path.name,
        made.quant,
        made.num_bytes,
        made.pre_tokenizer,
        made.proof,
        (*findings, *made.findings),
    )


def merged_or_whole(
    folder: str, base: str | None, onto: Onto, device: str, listener: Listener
) -> tuple[LoadedModel, tuple[Finding, ...]]:
    """A model in float32 without adapter, and what is to be told of its merging."""
    if locate(folder, weights=False).is_adapter:
        listener.stage("merging")
        merged = merge_adapter(folder, base=base, onto=onto, device=device)
        return merged.loaded, merged.findings
    listener.stage("loading the weights")
    return load_model(folder, dtype="float32", device=device, purpose="inference"), ()


def rows_of(source: str) -> list[Conversation]:
    """The rows that a run kept, held-out ones where it has any; none of another folder."""
    run = run_of(source)
    return [row.conversation for row in read_rows(run)] if run else []


def _require_folder(output: Path) -> None:
    if output.suffix.lower() == ".gguf":
        raise UsageError(
            f"{output} names a file, but an export is a folder",
            why="the folder holds the GGUF file and its verification",
            fix=f"-o {output.with_suffix('')}",
            code="export-folder",
        )
