"""The child process in which mlx_lm writes a folder and reads it back.

input   a question (JSON on standard input)
does    converts a model folder, or loads a converted one on the CPU
output  JSON on standard output: prompts as ids, stop tokens, log-probabilities; or an error
"""

from __future__ import annotations

import os
from typing import Any

from truetune.system.child import answer_json


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Do what was requested: `write` before `read` if both are present."""
    # Compiled kernels need a compiler, and are no part of what is compared.
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    import mlx.core as mx
    from mlx_lm import convert, load

    mx.set_default_device(mx.cpu)
    if asked.get("source"):
        convert(asked["source"], asked["folder"], **asked["how"])
    model, tokenizer = load(asked["folder"])[:2]
    prompts = [
        [int(i) for i in tokenizer.apply_chat_template(
            case["messages"], tools=case["tools"], add_generation_prompt=True, tokenize=True,
            return_dict=False, **case["arguments"],
        )]
        for case in asked["cases"]
    ]  # fmt: skip
    return {
        "prompts": prompts,
        "stops": sorted(int(i) for i in tokenizer.eos_token_ids),
        **_predictions(mx, model, asked["probes"], asked["top"]),
    }


def _predictions(mx: Any, model: Any, probes: Any, top: Any) -> dict[str, Any]:
    """For each position, the log-probabilities of the requested tokens and the likeliest token."""
    kept, greedy = [], []
    wanted = iter(top)
    for ids, positions in probes:
        logits_TV = model(mx.array([ids]))[0].astype(mx.float32)
        for at in positions:
            row_V = logits_TV[at]
            log_V = row_V - mx.logsumexp(row_V)
            kept.append(log_V[mx.array(next(wanted))].tolist())
            greedy.append(int(mx.argmax(row_V)))
    return {"logprobs": kept, "greedy": greedy}


if __name__ == "__main__":
    answer_json(answer)
