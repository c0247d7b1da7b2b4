"""A run, a model or an adapter as a folder for MLX: merged where it is an adapter, written by
mlx_lm, proved with it, and only then given its name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.exporting.mlx import WrittenMLX, require_mlx, write_mlx
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.model.merge import Onto
from truetune.model.source import locate
from truetune.model.tokenizer import load_tokenizer
from truetune.run.export_gguf import rows_of
from truetune.run.pipeline import export
from truetune.run_dir import named_at_last, opened, scratch


def export_mlx(
    source: str,
    output: Path | str,
    *,
    quant: str = "bf16",
    base: str | None = None,
    onto: Onto = "auto",
    device: str = "cpu",
    listener: Listener | None = None,
) -> WrittenMLX:
    """Write a folder for MLX.

    Args:
        source: a run, a model or adapter folder, or a Hub id.
        output: must not exist.
        quant: see `mlx.QUANTS`.
        base, onto, device: of an adapter, see `merge_adapter`.

    Raises:
        TruetuneError: it cannot be written, or mlx_lm makes something else of it; nothing is left
            behind.
    """
    listener = listener or Listener()
    require_mlx(quant)
    folder = opened(source)
    with named_at_last(Path(output)) as unnamed, scratch() as place:
        files = locate(folder, weights=True)
        whole = files.folder
        if files.is_adapter:
            made = export(
                source, place / "merged", base=base, onto=onto, device=device, listener=listener
            )
            whole = made.folder
        listener.stage("loading the weights")
        loaded = load_model(str(whole), dtype="float32", device=device, purpose="inference")
        written = write_mlx(
            whole,
            loaded,
            PromptContract.load(load_tokenizer(whole)),
            unnamed,
            quant=quant,
            conversations=rows_of(source),
            on_stage=listener.stage,
        )
        for finding in written.findings:
            listener.finding(finding)
    return replace(written, folder=Path(output))
