"""How right the estimate of a micro-batch's memory is: each case in a process of its own.

    python bench/memory.py [--write]

Prints the estimate, the growth of the process's peak over three steps (Linux counts it in
/proc/self/status), and their ratio; --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import ROOT, make_model

BEGIN, END = "<!-- made by bench/memory.py -->", "<!-- end of memory -->"
HEAD = (
    "(`0.5b-6l` and `0.5b-2l` are the 0.5B architecture with six and with two layers; `0.5b-6l` "
    "has a vocabulary of 32 k.)\n\n"
    "| case | estimate MB | measured MB | ratio |\n|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Case:
    """One micro-batch.

    Attributes:
        tokens: that go through the model at once.
        model: of `make_model`.
        method: "lora" or "full".
        dtype: of frozen weights and of the computation.
        row: tokens of a row.
        shared: tokens with which all rows begin.
        recomputed: activations are computed twice.
        optim: the optimizer.
    """

    tokens: int
    model: str = "0.5b-6l"
    method: str = "lora"
    dtype: str = "bfloat16"
    row: int = 128
    shared: int = 0
    recomputed: bool = False
    optim: str = "adamw"


CASES = {
    "0.5b-6l LoRA bfloat16, 1,024 tokens": Case(1024),
    "0.5b-6l LoRA bfloat16, 3,072 tokens": Case(3072),
    "the same, one row": Case(3072, row=3072),
    "the same, rows of 48": Case(3072, row=48),
    "the same, 32 rows under a prompt of 1,024": Case(3072, row=64, shared=1024),
    "the same, recomputed, 1,024 tokens": Case(1024, recomputed=True),
    "the same, recomputed, 3,072 tokens": Case(3072, recomputed=True),
    "0.5b-2l (vocabulary of 152 k) LoRA bfloat16, 1,024 tokens": Case(1024, "0.5b-2l"),
    "60m full float32, 1,024 tokens": Case(1024, "60m", "full", "float32"),
    "60m full float32, 3,072 tokens": Case(3072, "60m", "full", "float32"),
    "60m full bfloat16, 3,072 tokens": Case(3072, "60m", "full"),
    "60m full adamw_bf16, 3,072 tokens": Case(3072, "60m", "full", optim="adamw_bf16"),
    "60m full float32, recomputed, 3,072 tokens": Case(
        3072, "60m", "full", "float32", recomputed=True
    ),
    "60m full bfloat16, recomputed, 3,072 tokens": Case(3072, "60m", "full", recomputed=True),
    "embedded full float32, 3,072 tokens": Case(3072, "embedded", "full", "float32"),
}


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def rows_of(case: Case) -> list[Any]:
    from truetune import SFTExample

    chosen = random.Random(0)
    prompt = [chosen.randrange(2000) for _ in range(case.shared)]
    half = case.row // 2
    rows = []
    for _ in range((case.tokens - case.shared) // case.row):
        own = [chosen.randrange(2000) for _ in range(case.row + 1)]
        rows.append(
            SFTExample(prompt + own, [0] * (case.shared + half) + [1] * (case.row + 1 - half))
        )
    return rows


def one(name: str, models: Path) -> None:
    from truetune import SFTTrainer
    from truetune.compute.memory import footprint
    from truetune.engine.memory import give_freed_pages_back
    from truetune.engine.optimizer import optimizer_bytes
    from truetune.model.load import load_model
    from truetune.model.lora import LoraSettings, add_lora, enable_gradient_checkpointing

    case = CASES[name]
    purpose: Any = case.method
    loaded = load_model(
        make_model(case.model, models),
        purpose=purpose,
        device="cpu",
        dtype=case.dtype,
        bf16_weights=case.optim == "adamw_bf16",
    )
    if case.method == "lora":
        loaded = add_lora(loaded, LoraSettings(), seed=0)
    if case.recomputed:
        enable_gradient_checkpointing(loaded.model)
    rows = rows_of(case)
    longest = max(len(row.ids) for row in rows)
    trainer = SFTTrainer(
        loaded.model,
        examples=rows,
        max_seq_len=longest,
        pad_id=0,
        batch_size=len(rows),
        micro_batch_tokens=case.tokens,
        max_steps=3,
        max_lr=1e-4,
        optim=case.optim,
        autocast_dtype=loaded.compute_dtype,
    )
    made = footprint(trainer.route, trainer._autocast, longest=longest)
    (batch,) = trainer.batcher.micro_batches(0)
    moments = optimizer_bytes(case.optim, [p for _, p in trainer.named_trainable])
    estimate = made.of(batch.num_computed) + moments
    # What probes and estimate have left lying would be taken again, and not be seen to grow.
    give_freed_pages_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    for _ in range(3):  # the optimizer's state is there from the second one on
        trainer.train_step()
    grown = status("VmHWM") - before
    mb = 2**20
    sys.stdout.write(
        f"| {name} | {estimate / mb:,.0f} | {grown / mb:,.0f} | {estimate / grown:.2f} |\n"
    )
    sys.stderr.write(f"{made} {moments} {batch.num_computed}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--models", type=Path, default=Path("/tmp/truetune-bench"))
    given = parser.parse_args()
    given.models.mkdir(parents=True, exist_ok=True)
    if given.case:
        one(given.case, given.models)
        return
    table = HEAD
    sys.stdout.write(table)
    for name in CASES:
        sys.stdout.flush()
        command = [sys.executable, __file__, "--case", name, "--models", str(given.models)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        line = done.stdout or f"| {name} | | {(done.stderr.splitlines() or ['?'])[-1]} | |\n"
        sys.stdout.write(line)
        table += line
    if given.write:
        page = ROOT / "docs" / "performance.md"
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
