"""Rows that share a beginning, computed as trees and as separate rows, in turn.

    python bench/trees.py [--rounds 2] [--model 0.5b-6l] [--write]

Prints per workload the token ratio (tokens of the separate rows over tokens of the tree), the
speed-up, their quotient, and how far the gradients are apart by norm: tree from separate rows, and
each of the two from the same rows in float32 (what bfloat16 itself costs). Separate rows are packed
as well: only the sharing differs. `--only` takes workloads whose name holds a text; `--write` puts
the table into docs/performance.md, where all of them are measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from page import put
from table import spread
from workloads import SHARED, make_model

Rows = list[tuple[list[int], list[int]]]

BEGIN, END = "<!-- made by bench/trees.py -->", "<!-- end of trees -->"
HEAD = (
    "| workload | tokens, separate | tokens, tree | token ratio | speed-up | spread "
    "| speed-up / token ratio | gradients: tree to separate | separate to float32 "
    "| tree to float32 |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)

# What a user waits, or with --clock cpu the seconds on a core, which others do not lengthen.
clock = time.perf_counter


def text(n: int, seed: str) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(100, 30000) for _ in range(n)]


def conversation(reasoning: int) -> Rows:
    """Eight turns of 30 tokens of question and 60 of answer, each answered after `reasoning`
    tokens that the template strips from history: a branch a turn."""
    rows: Rows = []
    history: list[int] = text(20, "system")
    for turn in range(8):
        prompt = history + text(30, f"question {turn}")
        thought, answer = text(reasoning, f"thought {turn}"), text(60, f"answer {turn}")
        completion = thought + answer
        rows.append((prompt + completion, [0] * len(prompt) + [1] * len(completion)))
        history = prompt + answer
    return rows


def under_one_prompt(n: int) -> Rows:
    """Rows of 200 tokens, half of them an answer, under a system prompt of 1,500."""
    system = text(1500, "system")
    return [(system + text(200, f"row {r}"), [0] * 1600 + [1] * 100) for r in range(n)]


def answers_to_one_question() -> Rows:
    """Eight answers of 150 tokens to a question of 1,000."""
    question = text(1000, "question")
    return [(question + text(150, f"answer {r}"), [0] * 1000 + [1] * 150) for r in range(8)]


WORKLOADS: dict[str, Rows] = {
    "8 turns, reasoning of 40": conversation(40),
    "8 turns, reasoning of 400": conversation(400),
    "4 rows, system prompt of 1,500": under_one_prompt(4),
    "32 rows, system prompt of 1,500": under_one_prompt(32),
    "8 answers, question of 1,000": answers_to_one_question(),
}


def measured(
    model: Any, route: Any, rows: Rows, min_shared: int | None, half: bool = True
) -> tuple[float, int, Any]:
    """(seconds, tokens that went through the model, gradients); in bfloat16, or in the weights'
    own type."""
    import torch

    from truetune import SFTExample
    from truetune.compute.batch import Limits, RowOrder
    from truetune.compute.packing import PackedBatcher

    examples = [SFTExample(*row) for row in rows]
    limits = Limits(len(rows), 1700 if min_shared is None else 10**9)
    batcher = PackedBatcher(
        examples,
        max_seq_len=10**6,
        order=RowOrder(len(rows), len(rows), 0),
        limits=limits,
        min_shared=min_shared,
    )
    model.zero_grad()
    started, tokens = clock(), 0
    for batch in batcher.micro_batches(0):
        with route.scope(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = route.loss_sum(batch)
            loss.backward()
        tokens += batch.num_computed
    seconds = clock() - started
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return seconds, tokens, grads.clone()


def _model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """A LoRA model whose adapter does something, without dropout, and its route."""
    import torch

    from truetune.compute.route import find_route
    from truetune.model.load import load_model
    from truetune.model.lora import LoraSettings, add_lora

    loaded = load_model(folder, purpose="lora", device="cpu", dtype=dtype)
    model = add_lora(loaded, LoraSettings(dropout=0.0), seed=0).model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.train()
    return model, find_route(model, longest=4096)


def compared(model: Any, route: Any, rows: Rows, rounds: int, exact: Any) -> str:
    """The cells of a workload's line.

    Args:
        exact: its gradients in float32.
    """
    times: dict[int | None, list[float]] = {None: [], 16: []}
    tokens: dict[int | None, int] = {}
    grads: dict[int | None, Any] = {}
    for _ in range(rounds):
        for shared in (None, 16):
            seconds, tokens[shared], grads[shared] = measured(model, route, rows, shared)
            times[shared].append(seconds)
    ratio = tokens[None] / tokens[16]
    speed = statistics.median(times[None]) / statistics.median(times[16])
    each = [one / other for one, other in zip(times[None], times[16], strict=True)]
    apart = [
        100 * float((one - other).norm() / other.norm())
        for one, other in ((grads[16], grads[None]), (grads[None], exact), (grads[16], exact))
    ]
    return (
        f"{tokens[None]:,} | {tokens[16]:,} | {ratio:.2f} | {speed:.2f} | {spread(each)} "
        f"| {100 * speed / ratio:.0f} % | " + " | ".join(f"{part:.2f} %" for part in apart)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--model", default="0.5b-6l")
    parser.add_argument("--models", type=Path, default=Path("/tmp/truetune-bench"))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    given = parser.parse_args()
    if given.write and given.only:
        parser.error("--write takes all workloads, not those of --only")
    global clock
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    if not SHARED.is_dir():
        sys.stderr.write(f"{SHARED} is not there: {given.model} is made from a config in it\n")
        return

    import torch

    from truetune.engine.memory import keep_freed_pages

    given.models.mkdir(parents=True, exist_ok=True)
    folder = make_model(given.model, given.models)
    keep_freed_pages()  # as the loop does
    chosen = {name: rows for name, rows in WORKLOADS.items() if given.only in name}
    if not chosen:
        parser.error(f"no workload's name holds {given.only!r}: {', '.join(WORKLOADS)}")
    model, route = _model(folder, "float32")
    exact = {name: measured(model, route, rows, 16, half=False)[2] for name, rows in chosen.items()}
    del model, route
    model, route = _model(folder, "bfloat16")
    # Fetches from the system what the largest tree takes; freed pages are kept from here on.
    measured(model, route, max(chosen.values(), key=_tree_tokens), 16)
    lines = [HEAD]
    sys.stdout.write(HEAD + "\n")
    for name, rows in chosen.items():
        lines.append(f"| {name} | {compared(model, route, rows, given.rounds, exact[name])} |")
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    times = "wall-clock" if given.clock == "wall" else "processor"
    model = given.model.upper().replace("-6L", " architecture with six layers")
    lines += [
        "",
        f"The {model}, LoRA, bfloat16, {torch.get_num_threads()} threads; {times} times, median of "
        f"{given.rounds} alternating rounds.",
    ]
    sys.stdout.write("\n".join(lines[-2:]) + "\n")
    if given.write:
        put("\n".join(lines), BEGIN, END)


def _tree_tokens(rows: Rows) -> int:
    """Tokens of rows as a tree: the different beginnings."""
    beginnings = set()
    for ids, _ in rows:
        key = 0
        for token in ids:
            key = hash((key, token))
            beginnings.add(key)
    return len(beginnings)


if __name__ == "__main__":
    main()
