"""Compare what was trained with what its run recorded.

input   a run, its model opened from disk
does    compares stop tokens, ids of the rows and predictions with those of training
output  findings
"""

from __future__ import annotations

from typing import Any

from truetune.compare import read
from truetune.contract.contract import PromptContract
from truetune.contract.encode import Encoded
from truetune.errors import TruetuneError
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.run_dir import CONTRACT, RunDir, parsed
from truetune.verification.files import check_files
from truetune.verification.record import machine_of, read_record
from truetune.verification.rows import read_rows
from truetune.verification.verdict import judge_reading


def recorded(run: RunDir | None, name: str, loaded: LoadedModel) -> list[Finding]:
    """Report if a saved model is not what its run trained.

    Args:
        run: None for a model without a run: nothing is known about its training.
        name: name of the stage.
        loaded: in float32.
    """
    if run is None:
        return []
    try:
        record = parsed(run.file(CONTRACT).read_text(encoding="utf-8"))
        contract = PromptContract.of_record(loaded.tokenizer, record)
        findings = _stops(name, record, contract) + _rows(name, run, contract)
        return findings + _numbers(name, run, loaded)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        return [
            _parted(
                name,
                f"the records of the run cannot be read: {error}",
                "one of its files was edited or truncated",
                "copy the run again from its source",
            )
        ]
    except TruetuneError as error:
        return [_parted(name, error.what, error.why, error.fix)]


def _stops(name: str, record: dict[str, Any], contract: PromptContract) -> list[Finding]:
    then = {int(stop["id"]) for stop in record["stop"]}
    missing = sorted(then - set(contract.stop_ids))
    if not missing:
        return []
    return [
        _parted(
            name,
            f"replies no longer end on {contract.tokens.named(missing)}",
            "generation_config.json or the template was changed after training",
            "restore the files that were saved",
        )
    ]


def _rows(name: str, run: RunDir, contract: PromptContract) -> list[Finding]:
    rows = read_rows(run)
    encoded = contract.encode_all([row.conversation for row in rows])
    wrong = [
        row.conversation.where
        for row, found in zip(rows, encoded, strict=True)
        if not isinstance(found, Encoded)
        or [(list(e.ids), list(e.mask)) for e in found.examples]
        != [(list(ids), list(mask)) for ids, mask in row.examples]
    ]
    if not wrong:
        return []
    return [
        _parted(
            name,
            f"the ids of {len(wrong)} of {len(rows)} rows differ from those used in training, "
            f"first {wrong[0]}",
            "the saved tokenizer or chat template was changed",
            "restore the files that were saved",
        )
    ]


def _numbers(name: str, run: RunDir, loaded: LoadedModel) -> list[Finding]:
    record = read_record(run)
    # Of a model that was trained in another type, `truetune verify` opens it as it was.
    if record is None or record.way.get("dtype") != "float32":
        return []
    rows = loaded.transformers_model.get_input_embeddings().weight.shape[0]
    if any(max(probe.ids) >= rows for probe in record.probes):
        return [
            _parted(
                name,
                f"the model has {rows:,} embeddings, fewer than were trained",
                "the base is different, or the embedding was truncated",
                "restore what was saved",
            )
        ]
    found = {
        "reading": read(loaded, record.probes, record.reading.top).as_dict(),
        "machine": machine_of(loaded.device),
        "floor": None,
    }
    check = judge_reading(record, found)
    if check.state != "failed":
        return []
    changed = check_files(run, None)
    files = changed.what if changed.state == "failed" else ""
    what = (
        "the adapter's weights, its config (alpha, rank, DoRA) or the base have"
        if name == "adapter"
        else "the model's weights or its config have"
    )
    return [
        _parted(
            name,
            f"its predictions differ from those of the trained model: {check.what}",
            files or f"{what} changed since it was saved",
            "truetune verify RUN compares each file; restore what was saved",
        )
    ]


def _parted(name: str, what: str, why: str, fix: str) -> Finding:
    return Finding("stage-parts", "error", f"{name}: {what}", why=why, fix=fix)
