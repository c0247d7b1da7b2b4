"""The fresh process: opens a saved model as anybody would, and tells what it found.

input   a request (JSON on standard input): artifact, conversations, rows, maybe a reference
does    nothing that training did in memory is here: only files
output  a reply (JSON on standard output)
who     verify.fresh
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from typing import Any

from truetune.compare import Measured, agreement, measure
from truetune.contract import Encoded, PromptContract
from truetune.errors import TruetuneError
from truetune.generate import Sampling, replies
from truetune.model import LoadedModel, load_model, load_tokenizer, trainable_share
from truetune.verify.rows import conversation_from


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What was asked, as plain values."""
    reference, reference_replies = None, None
    if request.get("reference"):
        loaded, contract = _open(request["reference"], request)
        reference = measure(loaded, request["rows"])
        reference_replies = _replies(loaded, contract, request)
        del loaded
        gc.collect()
    loaded, contract = _open(request["artifact"], request)
    encoded = contract.encode_all(
        [conversation_from(value) for value in request.get("conversations", [])],
        loss_on=request.get("loss_on", "assistant"),
    )
    measured = measure(loaded, request["rows"], keep_logits=reference is not None)
    found: dict[str, Any] = {
        "contract": contract.as_dict(),
        "encoded": [
            [[list(ids), list(mask)] for ids, mask in row] if isinstance(row, Encoded) else None
            for row in encoded
        ],
        "finite": _finite(measured),
        "logprobs": measured.logprobs,
        "greedy": measured.greedy,
        "dtype": loaded.base_dtype,
        "parameters": trainable_share(loaded.model)[1],
    }
    if reference is not None:
        found["agreement"] = dataclasses.asdict(agreement(reference, measured))
        own = _replies(loaded, contract, request)
        found["same_replies"] = [a == b for a, b in zip(reference_replies or [], own, strict=True)]
    return found


def _open(what: dict[str, Any], request: dict[str, Any]) -> tuple[LoadedModel, PromptContract]:
    folder = what["folder"]
    contract = PromptContract.of_record(load_tokenizer(folder), request.get("contract") or {})
    loaded = load_model(
        folder,
        base=what.get("base"),
        load_in=what.get("load_in", "as-trained"),
        device=request.get("device", "auto"),
        dtype=request.get("dtype", "auto"),
        purpose="inference",
    )
    return loaded, contract


def _replies(
    loaded: LoadedModel, contract: PromptContract, request: dict[str, Any]
) -> list[tuple[int, ...]]:
    """Greedy answers to some of the conversations' prompts."""
    chats = [conversation_from(value) for value in request.get("conversations", [])]
    prompts = []
    for chat in chats[: request.get("num_replies", 0)]:
        turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if turns:
            prompts.append(dataclasses.replace(chat, messages=chat.messages[: turns[-1]]))
    sampling = Sampling(max_new_tokens=request.get("max_new_tokens", 32))
    return [reply.ids for reply in replies(loaded, contract, prompts, sampling)] if prompts else []


def _finite(measured: Measured) -> bool:
    import math

    return all(math.isfinite(value) for row in measured.logprobs for value in row)


def main() -> None:
    """Answer the one request on standard input."""
    # What a library prints must not end up in the reply.
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        found = answer(json.load(sys.stdin.buffer))
    except TruetuneError as error:
        found = {
            "error": {
                "code": error.code,
                "what": error.what,
                "where": error.where,
                "why": error.why,
                "fix": error.fix,
            }
        }
    with reply:
        reply.write(json.dumps(found).encode("utf-8"))


if __name__ == "__main__":
    main()
