"""Merge an adapter into a plain model folder.

input   an adapter folder
does    merges in float32, casts to the base's own type, writes all that a server needs: weights,
        config, tokenizer, template, generation_config with the stop tokens
output  Exported: a folder under a temporary name; the caller renames it after verification
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from truetune.contract.contract import PromptContract
from truetune.findings import Finding
from truetune.model.merge import Onto, merge_adapter
from truetune.model.quantise import LoadIn
from truetune.model.save import SaveReport, save_model
from truetune.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Exported:
    """A merged model on disk.

    Attributes:
        report: what was written and read back.
        onto: which weights the adapter was added to, in words.
        load_in: how the adapter is opened to compute the same.
        findings: notes and warnings.
    """

    report: SaveReport
    onto: str
    load_in: LoadIn
    findings: tuple[Finding, ...]


def write_merged(
    adapter: str | Path,
    folder: Path,
    *,
    base: str | Path | None = None,
    onto: Onto = "auto",
    dtype: str | None = None,
    device: str = "cpu",
) -> Exported:
    """Merge an adapter and write the result.

    Args:
        adapter: its folder.
        folder: must not exist.
        base: where the base is now; None takes the adapter's config's.
        onto: see `merge_adapter`.
        dtype: type of the written weights; None takes the base's on disk.
        device: where to add.

    Raises:
        UsageError, ModelError, SaveError: as `merge_adapter` and `save_model`; nothing is left.
    """
    contract = PromptContract.load(load_tokenizer(adapter))
    merged = merge_adapter(adapter, base=base, onto=onto, device=device)
    report = save_model(merged.loaded, contract, folder, dtype=dtype or merged.dtype)
    findings = [*merged.findings, *report.findings]
    if report.cast_error:
        findings.append(
            Finding(
                "weights-rounded",
                "note",
                f"the adapter was added in float32 and saved in {report.dtype}: the largest "
                f"rounding error is {report.cast_error:.2g}",
            )
        )
    return Exported(report, merged.onto, merged.load_in, tuple(findings))
