"""`truetune.audit`: check the batches that another library's trainer will train on.

    truetune.audit(trainer).raise_for_errors()
    trainer.train()

input   a transformers or TRL Trainer; or batches with a tokenizer (and model, generation config)
does    collates rows as the trainer would and judges ids, labels and stop ids by their effect;
        runs the model where ids are not enough
output  AuditReport; everything else is left unchanged, random states included
"""

from __future__ import annotations

import time
from typing import Any

from truetune.auditing.batches import batch_findings, held_out_findings
from truetune.auditing.masks import mask_findings
from truetune.auditing.measure import measured_findings
from truetune.auditing.model import head_rows, model_findings
from truetune.auditing.read import IGNORED, Reading, read_batches
from truetune.auditing.report import AuditReport
from truetune.auditing.seq2seq import seq2seq_findings
from truetune.auditing.served import has_conversations, served_findings, stop_findings
from truetune.auditing.state import tokenizer_untouched, untouched
from truetune.auditing.subject import (
    Subject,
    is_trainer,
    parts_of_loader,
    subject_of_batches,
    subject_of_trainer,
    touched_by_reading,
)
from truetune.checks.labels.facts import LabelFacts, LossOn
from truetune.checks.labels.judge import label_findings
from truetune.checks.labels.table import TokenTable
from truetune.contract.frame import Frame
from truetune.findings import LEVELS, Finding, counted, merged

# Rows read unless the caller says otherwise; a defect on 0.1 % of the rows is then missed once in
# 150 audits ((1 - 0.001) ** 5000).
MAX_ROWS = 5_000


def audit(
    source: Any,
    tokenizer: Any = None,
    model: Any = None,
    generation_config: Any = None,
    *,
    evaluation: Any = None,
    max_rows: int | None = MAX_ROWS,
) -> AuditReport:
    """Check what a training run will learn, before it starts.

    Args:
        source: a transformers or TRL `Trainer`; or a DataLoader or other iterable that yields
            batches with `input_ids` and `labels`, each (B, T) and unshifted.
        tokenizer: required for batches; a trainer has its own.
        model: the model, if `source` is batches; its embeddings, dtypes and stop ids are checked
            too.
        generation_config: the generation config that the server will read; by default the model's,
            as the trainer will save it.
        evaluation: the held-out batches, if `source` is batches; their rows must not occur in
            training.
        max_rows: rows to read, spread evenly over the data; None reads all.

    Returns:
        The report; `report.raise_for_errors()` raises `CheckFailed` if it contains an error.

    Raises:
        UsageError: there is no tokenizer, the batches are not language-model batches, or reading
            them would consume them.
    """
    started = time.perf_counter()
    with untouched(touched_by_reading(source)) as snapshot:
        if is_trainer(source):
            subject = subject_of_trainer(source, tokenizer, model, generation_config)
        else:
            subject = subject_of_batches(source, tokenizer, model, generation_config, evaluation)
        for item in (subject.train, *subject.evaluation.values()):
            for part in parts_of_loader(item):
                snapshot.add(part)
        snapshot.add(subject.tokenizer)
        with tokenizer_untouched(subject.tokenizer):
            findings, reading = _judge(subject, max_rows)
    return AuditReport(
        tuple(_weighed(findings, len(reading.rows))),
        _summary(reading, subject, time.perf_counter() - started),
    )


def _judge(subject: Subject, max_rows: int | None) -> tuple[list[Finding], Reading]:
    most = max_rows or 2**62
    pad = subject.tokenizer.pad_token_id
    ends = {subject.tokenizer.eos_token_id, *subject.served}
    reading = read_batches(
        subject.train,
        name=subject.name,
        pad_id=pad,
        max_rows=most,
        ends=ends,
        origin=subject.origin,
    )
    held_out = {
        name: read_batches(loader, name=name, pad_id=pad, max_rows=most, ends=ends)
        for name, loader in subject.evaluation.items()
    }
    findings = [finding for each in (reading, *held_out.values()) for finding in _failed(each)]
    if not reading.rows:
        return findings, reading
    if subject.is_seq2seq:
        findings += seq2seq_findings(subject, reading)
    else:
        facts = _facts(subject, reading)
        findings += label_findings(facts)
        findings += batch_findings(subject, reading, facts)
        findings += mask_findings(subject, reading)
        findings += stop_findings(subject, facts)
        findings += served_findings(subject, reading, facts)
        findings += measured_findings(subject, reading, facts)
        findings = _told_once(findings)
    findings += held_out_findings(reading, held_out, subject)
    findings += model_findings(subject, reading)
    return findings, reading


# Up to this share of the rows a finding on rows stands behind those on more of them.
_FEW = 0.1


def _weighed(findings: list[Finding], num_rows: int) -> list[Finding]:
    """Merge the findings, the most severe first; within a level, those on few rows come last."""
    return sorted(
        merged(findings),
        key=lambda f: (LEVELS.index(f.level), bool(f.rows) and f.count < _FEW * num_rows),
    )


def _told_once(findings: list[Finding]) -> list[Finding]:
    """Remove findings that another finding explains: control tokens that the data shows, and
    supervision of every token where a mask says otherwise."""
    control = [f for f in findings if f.code == "control-token-in-content"]
    masks = any(f.code == "mask-ignored" for f in findings)
    left_out = [*control[:-1], *(f for f in findings if masks and f.code == "loss-on-everything")]
    return [f for f in findings if not any(f is other for other in left_out)]


def _facts(subject: Subject, reading: Reading) -> LabelFacts:
    rows = reading.rows
    names = [row.name for row in rows]
    table = TokenTable.of_documents((row.documents() for row in rows), names)
    stops = tuple(dict.fromkeys([*subject.served, *subject.said]))
    return LabelFacts(
        table,
        Frame.probe(subject.tokenizer, stop_ids=stops),
        head_rows=head_rows(subject.model),
        loss_on=_declared(subject.args),
        max_length=getattr(subject.args, "max_length", None),
        compared=has_conversations(subject, reading),
    )


def _declared(args: Any) -> LossOn | None:
    """Return which tokens the trainer was asked to train, if it was asked."""
    asked = getattr(args, "assistant_only_loss", False) or getattr(
        args, "completion_only_loss", False
    )
    return "assistant" if asked else None


def _failed(reading: Reading) -> list[Finding]:
    """Return one finding per kind of error, with the rows of the batches that could not be
    built."""
    kinds: dict[str, list[str]] = {}
    for rows, error in reading.failures:
        kinds.setdefault(f"{type(error).__name__}: {str(error)[:300]}", []).append(rows)
    return [
        Finding(
            code="batch-fails",
            level="error",
            what=f"building {counted(len(places), 'batch', 'batches')} failed: {said}",
            where=places[0],
            count=len(places),
            why="the dataset or the collator raises an exception; training would stop there",
            fix="correct those rows or the collator; DataCollatorForSeq2Seq pads ids and labels",
            rows=tuple(places[:100]),
        )
        for said, places in kinds.items()
    ]


def _summary(reading: Reading, subject: Subject, seconds: float) -> dict[str, Any]:
    tokens = sum(int((row.real != 0).sum()) for row in reading.rows)
    supervised = sum(int((row.labels != IGNORED).sum()) for row in reading.rows)
    read = len(reading.rows)
    of = (
        f"{read:,} rows" if reading.total in (None, read) else f"{read:,} of {reading.total:,} rows"
    )
    return {
        "rows": read,
        "total_rows": reading.total,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "stop_ids": list(dict.fromkeys([*subject.served, *subject.said])),
        "seconds": round(seconds, 3),
        "text": f"{of}, {tokens:,} tokens, {supervised:,} supervised, {seconds:.1f} s",
    }
