"""How right the estimate of a micro-batch's memory is: each case in a process of its own.

    python bench/memory.py

Prints the estimate, the growth of the process's peak over two steps (Linux counts it in
/proc/self/status), and their quotient.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from workloads import make_model

CASES = {
    "0.5b-6l LoRA bfloat16, 1,024 tokens": ("0.5b-6l", "lora", "bfloat16", 1024),
    "0.5b-6l LoRA bfloat16, 3,072 tokens": ("0.5b-6l", "lora", "bfloat16", 3072),
    "60m full float32, 1,024 tokens": ("60m", "full", "float32", 1024),
    "60m full bfloat16, 3,072 tokens": ("60m", "full", "bfloat16", 3072),
    "embedded full float32, 3,072 tokens": ("embedded", "full", "float32", 3072),
}


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def one(name: str, models: Path) -> None:
    from truetune import SFTExample, SFTTrainer
    from truetune.compute import footprint
    from truetune.engine.optimizer import optimizer_bytes
    from truetune.model import LoraSettings, add_lora, load_model

    model, method, dtype, tokens = CASES[name]
    purpose: Any = method
    loaded = load_model(make_model(model, models), purpose=purpose, device="cpu", dtype=dtype)
    if method == "lora":
        loaded = add_lora(loaded, LoraSettings(), seed=0)
    chosen = random.Random(0)
    rows = [
        SFTExample([chosen.randrange(2000) for _ in range(129)], [0] * 65 + [1] * 64)
        for _ in range(tokens // 128)
    ]
    trainer = SFTTrainer(
        loaded.model,
        examples=rows,
        max_seq_len=129,
        pad_id=0,
        batch_size=len(rows),
        micro_batch_tokens=tokens,
        max_steps=2,
        max_lr=1e-4,
        autocast_dtype=loaded.compute_dtype,
    )
    made = footprint(trainer.route, trainer._autocast)
    parameters = [p for _, p in trainer.named_trainable]
    estimate = made.of(tokens) + optimizer_bytes("adamw", parameters)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    for _ in range(2):  # the optimiser's state is there from the second one on
        trainer.train_step()
    grown = status("VmHWM") - before
    mb = 2**20
    sys.stdout.write(
        f"| {name} | {estimate / mb:,.0f} | {grown / mb:,.0f} | {estimate / grown:.2f} |\n"
    )
    sys.stderr.write(f"{made} {optimizer_bytes('adamw', parameters)}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--models", type=Path, default=Path("/tmp/truetune-bench"))
    given = parser.parse_args()
    given.models.mkdir(parents=True, exist_ok=True)
    if given.case:
        one(given.case, given.models)
        return
    sys.stdout.write("| case | estimate MB | measured MB | quotient |\n|---|---|---|---|\n")
    sys.stdout.flush()
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--models", str(given.models)]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
