"""What vLLM or SGLang loads: the adapter as it is where they can, else the merged model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.contract.stops import own_stop_ids
from truetune.exporting.copied import copy_files
from truetune.listener import Listener
from truetune.model.fingerprint import read_fingerprint
from truetune.model.merge import Onto
from truetune.model.served_adapter import adapter_line, model_line, stored_dtype, why_merge
from truetune.model.source import ADAPTER_CONFIG, locate, read_json
from truetune.model.tokenizer import load_tokenizer, locate_base, open_tokenizer
from truetune.run.export_whole import WholeExport, export_plain
from truetune.run.pipeline import ExportResult, export
from truetune.run_dir import named_at_last, opened, write_text

_TEMPLATE = "chat_template.jinja"
# What an adapter consists of; a checkpoint's state of training stays where it is.
_FILES = (
    *("adapter_config.json", "adapter_model*.safetensors", "generation_config.json", _TEMPLATE),
    *("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class ServedExport:
    """A folder for a server.

    Attributes:
        folder: the folder of the adapter or of the merged model.
        line: the command that serves it.
        reasons: why the adapter was merged; () if the server loads the adapter itself.
        merged: how the model was merged and verified; None if it was not.
        whole: how a model that needs no merging was copied.
    """

    folder: Path
    line: str
    reasons: tuple[str, ...]
    merged: ExportResult | None
    whole: WholeExport | None = None


def export_served(
    source: str,
    output: Path | str,
    server: str,
    *,
    base: str | None = None,
    onto: Onto = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    check: bool = True,
    listener: Listener | None = None,
) -> ServedExport:
    """Write what a server loads into a new folder.

    Args:
        source: a run, or a model or adapter folder.
        output: must not exist.
        server: one of `served_adapter.SERVERS`.
        base, onto, dtype, device, check, listener: as of `pipeline.export`, where it is merged.

    Raises:
        TruetuneError: it cannot be merged, or what was merged is not the adapter's; nothing is left
            behind.
    """
    listener = listener or Listener()
    folder = opened(source)
    files = locate(folder, weights=False)
    if not files.is_adapter:
        copied = export_plain(
            source, output, dtype=dtype, device=device, check=check, listener=listener
        )
        assert isinstance(copied, WholeExport)
        line = model_line(server, str(copied.folder), stored_dtype(copied.folder))
        return ServedExport(copied.folder, line, (), None, copied)
    config = read_json(files.folder / ADAPTER_CONFIG)
    below = locate_base(files, weights=False, instead=base)
    tokenizer = load_tokenizer(folder)
    contract = PromptContract.load(tokenizer)
    trained = read_fingerprint(files.folder)
    ends = own_stop_ids(str(below.folder), None, tokenizer)
    missing = [i for i in contract.stop_ids if i not in ends]
    reasons = why_merge(
        config,
        quantised=trained is not None and trained.quantised is not None,
        new_tokens=tokenizer.get_vocab() != open_tokenizer(below).get_vocab(),
        stops=[contract.tokens.named(missing)] if missing else [],
    )
    if reasons:
        made = export(
            source,
            output,
            base=base,
            onto=onto,
            dtype=dtype,
            device=device,
            check=check,
            listener=listener,
        )
        line = model_line(server, str(made.folder), stored_dtype(made.folder))
        return ServedExport(made.folder, line, tuple(reasons), made)
    with named_at_last(Path(output)) as unnamed:
        for finding in copy_files(files, unnamed, _FILES):
            listener.finding(finding)
        if not (unnamed / _TEMPLATE).is_file():
            template = contract.saved_template()
            text = template if isinstance(template, str) else template["default"]
            write_text(unnamed / _TEMPLATE, text)
    line = adapter_line(server, str(output), below.address, below.revision, int(config["r"]))
    return ServedExport(Path(output), line, (), None)
