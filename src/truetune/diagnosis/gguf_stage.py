"""A GGUF file as a stage of a diagnosis, as llama.cpp serves it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from truetune.diagnosis.folder import as_held, on_replies, shown_ids, too_far
from truetune.diagnosis.gguf_cause import compare_file, quant_of
from truetune.diagnosis.measured import (
    Replies,
    Stage,
    served_replies,
    unopened,
)
from truetune.diagnosis.work import AGAIN, Work, parted
from truetune.errors import TruetuneError
from truetune.exporting.gguf_proof import (
    Apart,
    apart_of,
    budget_of,
    compare_served,
)
from truetune.findings import Finding
from truetune.servers.cases import read_server
from truetune.servers.llama_cpp import LlamaCpp, serving


def file_stage(work: Work, path: Path) -> Stage:
    """Compare a GGUF file, as llama.cpp serves it."""
    quant = "q4_0"
    apart = replies = None
    try:
        with serving(path) as server:
            quant = quant_of(str(server.props().get("model_ftype", "")))
            *_, findings = compare_served(server, work.contract, work.reference)
            with contextlib.suppress(TruetuneError):
                apart, replies = _predictions(work, server)
    except TruetuneError as error:
        return unopened("gguf", str(path), error)
    compared = compare_file(
        path, work.whole, work.contract, (lambda: work.unmerged) if work.is_adapter else None
    )
    budget = budget_of(quant, work.config)
    if not compared.wrong and not compared.unread:
        budget = as_held(budget)
    over = "" if apart is None else too_far(apart, budget, work.effect)
    if apart is None:
        over = "llama.cpp returned no predictions for the rows' ids"
    cause = "; ".join([*compared.wrong, *compared.other][:4])
    if over:
        findings.append(parted("gguf", str(path), over, "", AGAIN["gguf"]))
    if any(f.level == "error" for f in findings):
        findings = [_because(f, cause) if f.level == "error" else f for f in findings]
        if over and not cause and not compared.unread and quant.startswith("q"):
            # What the type costs can be more than the model bears, although nothing is damaged.
            findings[-1] = replace(findings[-1], why=_FEW_BITS, fix=_MORE_BITS)
    elif compared.wrong:
        what = (
            "its tensors, settings or tokens are not the model's, although its predictions on "
            "these rows are close"
        )
        findings.append(
            parted("gguf", str(path), what, "; ".join(compared.wrong[:4]), AGAIN["gguf"])
        )
    if more := work.cutting(compared.ends):
        findings.append(
            parted(
                "gguf",
                str(path),
                f"replies end on {work.contract.tokens.named(more)}, which is not a stop token of "
                "training",
                f"the file names {shown_ids(compared.ends)} as end tokens, but training used "
                f"{shown_ids(work.contract.stop_ids)}",
                AGAIN["gguf"],
            )
        )
    findings += on_replies(work, "gguf", str(path), replies, findings)
    return Stage(
        "gguf",
        str(path),
        apart,
        replies,
        tuple(findings),
        note=compared.unread,
        numbers=work.numbers(replies),
    )


_FEW_BITS = "every tensor is the model's after rounding: the type has too few bits for this model"


_MORE_BITS = "use more bits: truetune export RUN --to gguf --quant q8_0 -o DIR"


def _predictions(work: Work, server: LlamaCpp) -> tuple[Apart, Replies]:
    wanted = work.reference.reading
    read = read_server(server, work.reference.probes, wanted.top)
    return apart_of(wanted, read), served_replies(server, work.contract, work.cases)


def _because(finding: Finding, cause: str) -> Finding:
    why = "\n".join(text for text in (cause, finding.why) if text)
    return replace(finding, why=why, fix=AGAIN["gguf"])
