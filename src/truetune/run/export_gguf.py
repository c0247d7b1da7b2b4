"""A run, a model or an adapter as a GGUF file: merged where it is an adapter, written, proved
against llama.cpp, and only then given its name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.contract.stops import own_stop_ids
from truetune.data.conversation import Conversation
from truetune.errors import UsageError
from truetune.exporting.gguf import WrittenGGUF, write_gguf
from truetune.exporting.gguf_adapter import on_stops as on_base_stops
from truetune.exporting.gguf_adapter import require_lora, write_adapter
from truetune.exporting.gguf_file import require_quant
from truetune.exporting.gguf_shape import require_family
from truetune.exporting.ollama import MODELFILE, guarded, modelfile, on_trimmed
from truetune.exporting.ollama import go_template as make_go_template
from truetune.findings import Finding
from truetune.listener import Listener
from truetune.model.architecture import causal_config
from truetune.model.load import LoadedModel, load_model
from truetune.model.merge import Onto, merge_adapter
from truetune.model.source import ADAPTER_CONFIG, locate, read_json
from truetune.model.tokenizer import load_tokenizer, locate_base
from truetune.run_dir import named_at_last, opened, write_text
from truetune.servers.cases import cases_of
from truetune.servers.llama_cpp import require_llama_cpp, serving
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
    ollama: bool = False,
    go_template: bool = False,
    listener: Listener | None = None,
) -> WrittenGGUF:
    """Write a GGUF file into a new folder.

    Args:
        source: a run, a model or adapter folder, or a Hub id.
        output: the folder; must not exist.
        quant: see `gguf_file.QUANTS`.
        base, onto, device: of an adapter, see `merge_adapter`.
        ollama: write a Modelfile beside it.
        go_template: with the template as Go text, for older versions of Ollama.

    Raises:
        TruetuneError: it cannot be written, or llama.cpp makes something else of it; nothing is
            left behind.
    """
    listener = listener or Listener()
    folder = _required(source, output, quant, base)
    with named_at_last(Path(output)) as unnamed:
        loaded, findings = merged_or_whole(folder, base, onto, device, listener)
        for finding in findings:
            listener.finding(finding)
        unnamed.mkdir()
        contract = PromptContract.load(load_tokenizer(folder))
        rows = rows_of(source)

        def write(template: str | dict[str, str] | None = None) -> WrittenGGUF:
            return write_gguf(
                loaded,
                contract,
                unnamed,
                quant=quant,
                name=Path(source).name,
                conversations=rows,
                template=template,
                on_stage=listener.stage,
            )

        if ollama:
            made = write(guarded(contract.saved_template()))
            if fixed := made.proof.template_kwargs:
                made = write(guarded(contract.saved_template(), fixed))
            made = _with_modelfile(made, loaded, contract, rows, listener, go_template=go_template)
        else:
            made = write()
        for finding in made.findings:
            listener.finding(finding)
    return replace(made, path=Path(output) / made.path.name, findings=(*findings, *made.findings))


def export_adapter(
    source: str,
    output: Path | str,
    *,
    quant: str = "f16",
    base: str | None = None,
    device: str = "cpu",
    listener: Listener | None = None,
) -> WrittenGGUF:
    """Write an adapter as a GGUF file into a new folder, with the chat template beside it.

    Args:
        source, output, base, device: as of `export_gguf`.
        quant: see `gguf_adapter.QUANTS`.

    Raises:
        TruetuneError: it cannot be written, or llama.cpp makes something else of it; nothing is
            left behind.
    """
    listener = listener or Listener()
    folder = _required(source, output, quant, base)
    files = locate(folder, weights=False)
    if not files.is_adapter:
        raise UsageError(
            f"{source} is not an adapter",
            where="--adapter",
            why="it has no adapter_config.json",
            fix="omit --adapter to write the complete model",
            code="gguf-adapter",
        )
    require_lora(read_json(files.folder / ADAPTER_CONFIG), quant)
    contract = PromptContract.load(load_tokenizer(folder))
    with named_at_last(Path(output)) as unnamed:
        listener.stage("loading the weights")
        below = locate_base(files, weights=True, instead=base).folder
        whole, loaded = (
            load_model(at, base=on, dtype="float32", device=device, purpose="inference")
            for at, on in ((str(below), None), (folder, base))
        )
        unnamed.mkdir()
        made = write_adapter(
            whole,
            loaded,
            contract,
            unnamed,
            quant=quant,
            name=Path(source).name,
            conversations=rows_of(source),
            on_stage=listener.stage,
        )
        template = contract.saved_template()
        text = template if isinstance(template, str) else template["default"]
        write_text(unnamed / TEMPLATE, text)
        findings = (
            *on_base_stops(contract, own_stop_ids(str(below), None, contract.tokenizer)),
            *made.findings,
        )
        for finding in findings:
            listener.finding(finding)
    return replace(made, path=Path(output) / made.path.name, findings=findings)


# What llama-server is given beside an adapter: the base's file holds the base's template.
TEMPLATE = "chat_template.jinja"


def _required(source: str, output: Path | str, quant: str, base: str | None) -> str:
    """The folder of what is exported, when all that can be known without weights is right."""
    require_llama_cpp("a GGUF file")
    require_quant(quant)
    _require_folder(Path(output))
    folder = opened(source)
    files = locate(folder, weights=False)
    whole = locate_base(files, weights=False, instead=base) if files.is_adapter else files
    require_family(causal_config(whole).get_text_config(decoder=True))
    return folder


def _with_modelfile(
    made: WrittenGGUF,
    loaded: LoadedModel,
    contract: PromptContract,
    rows: list[Conversation],
    listener: Listener,
    *,
    go_template: bool,
) -> WrittenGGUF:
    """Write the Modelfile beside a file, with the template as Go text where that is wanted."""
    template = None
    if go_template:
        listener.stage("rendering the template by Go")
        cases = cases_of(contract, rows, longest=min(made.context, 1024) - 1)
        with serving(made.path) as server:
            template = make_go_template(server, contract, cases)
    generation = loaded.transformers_model.generation_config.to_dict()
    text = modelfile(made.path.name, contract, generation, made.context, template)
    write_text(made.path.with_name(MODELFILE), text)
    return replace(made, findings=(*made.findings, *(on_trimmed(template) if template else ())))


def merged_or_whole(
    folder: str, base: str | None, onto: Onto, device: str, listener: Listener
) -> tuple[LoadedModel, tuple[Finding, ...]]:
    """A model in float32 without adapter, and findings about its merging."""
    if locate(folder, weights=False).is_adapter:
        listener.stage("merging")
        merged = merge_adapter(folder, base=base, onto=onto, device=device)
        return merged.loaded, merged.findings
    listener.stage("loading the weights")
    return load_model(folder, dtype="float32", device=device, purpose="inference"), ()


def rows_of(source: str) -> list[Conversation]:
    """The rows that a run kept, held-out ones if it has any; none of another folder."""
    run = run_of(source)
    return [row.conversation for row in read_rows(run)] if run else []


def _require_folder(output: Path) -> None:
    if output.suffix.lower() == ".gguf":
        raise UsageError(
            f"{output} is the name of a file, but an export is a folder",
            why="the folder holds the GGUF file and its verification",
            fix=f"choose a folder, for example -o {output.with_suffix('')}",
            code="export-folder",
        )
