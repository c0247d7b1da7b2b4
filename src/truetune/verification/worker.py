"""The fresh process: opens a saved model like any other program, and reports what it finds.

input   a request (JSON on standard input): artifact, conversations, rows, maybe a reference
does    nothing that training did in memory is here: only files
output  a reply (JSON on standard output)
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
from typing import Any

from truetune.compare import Measured, Reading, agreement, distance, measure, read
from truetune.contract.contract import PromptContract
from truetune.contract.encode import Encoded
from truetune.errors import InputError, TruetuneError, UnfaithfulTemplate
from truetune.generate import Sampling, replies
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import trainable_share
from truetune.model.merge import round_by_chance
from truetune.model.tokenizer import load_tokenizer
from truetune.verification.record import (
    PADDING,
    behaviour_of,
    cut_rows,
    machine_of,
    probes_from,
    template_digest,
)
from truetune.verification.rows import conversation_from

# Where a folder comes without rows: whatever is served, it must answer prompts like these.
_PROMPTS = ("What is 17 + 25?", "Write one sentence about a river.", "\u4f60\u597d \U0001f600")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request with plain values."""
    if request.get("reference"):
        return _against_reference(request)
    loaded, contract = _open(request["artifact"], request)
    found = {
        **_facts(loaded, contract, request),
        "tokenizer": behaviour_of(contract),
        "template": template_digest(contract.tokenizer.chat_template),
    }
    if request.get("probes"):
        return found | _reread(loaded, request)
    rows = cut_rows(request["rows"] or _own_rows(contract), found["parameters"])
    measured = measure(loaded, rows, keep_logits=False)
    return found | {"finite": _finite(measured)}


def _reread(loaded: LoadedModel, request: dict[str, Any]) -> dict[str, Any]:
    """The trained model's readings, taken again."""
    probes = probes_from(request["probes"])
    reference = Reading.from_dict(request["reading"])
    limit = loaded.model.get_input_embeddings().weight.shape[0]
    if any(max(probe.ids) >= limit for probe in probes):
        raise InputError(
            f"the model has {limit:,} embeddings, fewer than it was trained with",
            fix="restore the config.json and the weights that were saved",
            code="verify-failed",
        )
    reading = read(loaded, probes, reference.top)
    machine = machine_of(loaded.device)
    floor = None
    if machine != request["machine"]:
        # Another machine rounds in another way: what two computations differ by here counts too.
        again = distance(reading, read(loaded, probes, reading.top, padding=PADDING))
        floor = {"mean": again.mean, "largest": again.largest}
    return {
        "reading": reading.as_dict(),
        "floor": floor,
        "machine": machine,
        "finite": bool(reading.logprobs.isfinite().all()),
    }


def _against_reference(request: dict[str, Any]) -> dict[str, Any]:
    """Two models on the same rows, one after the other."""
    loaded, contract = _open(request["reference"], request)
    rows = cut_rows(request["rows"] or _own_rows(contract), trainable_share(loaded.model)[1])
    reference = measure(loaded, rows)
    reference_replies = _replies(loaded, contract, request)
    # What rounding costs where nothing is wrong, whatever made the merged model.
    rounded = round_by_chance(loaded, request["dtype"])
    floor = agreement(reference, measure(loaded, rows)) if rounded else None
    del loaded
    gc.collect()
    loaded, contract = _open(request["artifact"], request)
    measured = measure(loaded, rows)
    own = _replies(loaded, contract, request)
    return {
        **_facts(loaded, contract, request),
        "finite": _finite(measured),
        "num_rows": len(rows),
        "agreement": dataclasses.asdict(agreement(reference, measured)),
        "floor": dataclasses.asdict(floor) if floor else None,
        "same_replies": [a == b for a, b in zip(reference_replies, own, strict=True)],
    }


def _facts(
    loaded: LoadedModel, contract: PromptContract, request: dict[str, Any]
) -> dict[str, Any]:
    """What does not depend on the weights' values."""
    encoded = contract.encode_all(
        [conversation_from(value) for value in request["conversations"]],
        loss_on=request["loss_on"],
    )
    return {
        "contract": contract.as_dict(),
        "encoded": [
            [[list(ids), list(mask)] for ids, mask in row] if isinstance(row, Encoded) else None
            for row in encoded
        ],
        "parameters": trainable_share(loaded.model)[1],
        "base": loaded.base if loaded.is_adapter and loaded.fingerprint else None,
    }


def _own_rows(contract: PromptContract) -> list[tuple[list[int], list[int]]]:
    """Prompts of our own, every position measured."""
    try:
        ids = [contract.prompt_ids([{"role": "user", "content": text}]) for text in _PROMPTS]
    except UnfaithfulTemplate:
        ids = [list(contract.tokenizer.encode(text)) for text in _PROMPTS]
    return [(row, [1] * len(row)) for row in ids if len(row) > 1]


def _open(what: dict[str, Any], request: dict[str, Any]) -> tuple[LoadedModel, PromptContract]:
    """As the model was trained if a run says how (`way_of`), else as it would be served."""
    folder, way = what["folder"], request.get("way") or {}
    contract = PromptContract.of_record(load_tokenizer(folder), request["contract"])
    loaded = load_model(
        folder,
        base=what.get("base"),
        load_in=what.get("load_in", "as-trained"),
        device=request["device"],
        dtype=way.get("dtype", "auto"),
        purpose=way.get("purpose", "inference"),
        bf16_weights=way.get("bf16_weights", False),
        tokenizer=contract.tokenizer,
    )
    return loaded, contract


def _replies(
    loaded: LoadedModel, contract: PromptContract, request: dict[str, Any]
) -> list[tuple[int, ...]]:
    """Greedy answers to some of the conversations' prompts."""
    chats = [conversation_from(value) for value in request["conversations"]]
    prompts = []
    for chat in chats[: request.get("num_replies", 0)]:
        turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if turns:
            prompts.append(dataclasses.replace(chat, messages=chat.messages[: turns[-1]]))
    sampling = Sampling(max_new_tokens=request.get("max_new_tokens", 32))
    return [reply.ids for reply in replies(loaded, contract, prompts, sampling)] if prompts else []


def _finite(measured: Measured) -> bool:
    return all(math.isfinite(value) for row in measured.logprobs for value in row)


def main() -> None:
    """Answer the one request on standard input."""
    # What a library prints must not end up in the reply.
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        found = answer(json.load(sys.stdin.buffer))
    except TruetuneError as error:
        found = {"error": error.words}
    with reply:
        reply.write(json.dumps(found).encode("utf-8"))


if __name__ == "__main__":
    main()
