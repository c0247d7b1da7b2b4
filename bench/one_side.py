"""One side of a benchmark in a process of its own: trains a few steps and prints what it took.

    python bench/one_side.py SIDE JOB --models DIR [--warm-up N] [--steps N]

Prints one line of JSON: seconds and tokens of each step after the warm-up, peak memory, losses.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads import JOBS, Job, Row, make_model

Measured = tuple[list[float], list[float]]  # seconds and loss of every step

# "wall": what a user waits; "cpu": seconds of this process on a core, which others on the machine
# do not lengthen (with one thread the two are equal on a quiet machine).
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter


def load(job: Job, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def truetune(job: Job, folder: Path, rows: list[Row], steps: int, **changes: Any) -> Measured:
    import torch

    from truetune import SFTExample, SFTTrainer
    from truetune.compute import RowOrder
    from truetune.model import LoraSettings, add_lora, load_model

    purpose: Any = "lora" if job.lora else "full"
    loaded = load_model(folder, purpose=purpose, device="cpu", dtype=job.dtype)
    if job.lora:
        loaded = add_lora(loaded, LoraSettings(r=16, alpha=32, dropout=0.05), seed=0)
    # Laid out so that step s trains rows s * n to (s + 1) * n, as on the other sides.
    order = RowOrder(len(rows), job.rows_a_step, 0)
    examples: list[Any] = [None] * len(rows)
    for step in range(len(rows) // job.rows_a_step):
        for place, row in enumerate(order.rows(step)):
            examples[row] = SFTExample(*rows[step * job.rows_a_step + place])
    seconds: list[float] = []
    losses: list[float] = []

    def note(facts: Any) -> None:
        nonlocal last
        seconds.append(clock() - last)
        losses.append(facts.loss)
        last = clock()

    trainer = SFTTrainer(
        loaded.model,
        examples=examples,
        max_seq_len=max(len(ids) for ids, _ in rows),
        pad_id=0,
        batch_size=job.rows_a_step,
        max_steps=steps,
        max_lr=1e-4,
        lr_scheduler_type="constant",
        autocast_dtype=loaded.compute_dtype,
        micro_batch_tokens=1024,
        on_step=note,
        **changes,
    )
    torch.manual_seed(0)
    last = clock()
    trainer.train()
    return seconds, losses


def padded(job: Job, folder: Path, rows: list[Row], steps: int) -> Measured:
    """truetune's own reference path."""
    return truetune(job, folder, rows, steps, packing=False)


def _times(steps: int) -> tuple[Any, list[float]]:
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(clock() - self.started)

    return Times(), seconds


def _settings(job: Job, steps: int, output: str) -> dict[str, Any]:
    """What TRL and transformers are told alike."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": job.rows_a_step,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "bf16": job.dtype == "bfloat16",
        "seed": 0,
    }


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _tokenizer(folder: Path) -> Any:
    """With a pad token that the model has: a head of 32 k rows lacks the tokenizer's own."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = AutoConfig.from_pretrained(folder).vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def trl(job: Job, folder: Path, rows: list[Row], steps: int, **changes: Any) -> Measured:
    """TRL with its defaults, but for `changes`; its loss is computed in chunks by default."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": ids, "completion_mask": mask} for ids, mask in rows])
    times, seconds = _times(steps)
    with tempfile.TemporaryDirectory() as output:
        longest = max(len(ids) for ids, _ in rows)
        trainer = SFTTrainer(
            load(job, folder),
            args=SFTConfig(
                **_settings(job, steps, output),
                max_length=max(longest, changes.pop("max_length", 0)),
                completion_only_loss=True,
                **changes,
            ),
            train_dataset=data,
            processing_class=_tokenizer(folder),
            peft_config=_lora_config() if job.lora else None,
            callbacks=[times],
        )
        trainer.train()
    return seconds, _losses(trainer)


def trl_kept(job: Job, folder: Path, rows: list[Row], steps: int) -> Measured:
    """TRL without its default of recomputing activations: faster, more memory."""
    return trl(job, folder, rows, steps, gradient_checkpointing=False)


def trl_packed(job: Job, folder: Path, rows: list[Row], steps: int) -> Measured:
    """TRL with `bfd` packing: one sequence holds as many tokens as the rows of a step.

    A step here is a packed sequence, so its rows are not those of the other sides.
    """
    tokens = sum(len(ids) for ids, _ in rows) // (len(rows) // job.rows_a_step)
    job = Job(job.model, job.lora, job.dtype, 1, job.rows)
    return trl(
        job,
        folder,
        rows,
        steps,
        packing=True,
        max_length=tokens,
        gradient_checkpointing=False,
    )


def trainer(job: Job, folder: Path, rows: list[Row], steps: int) -> Measured:
    """transformers' Trainer with its seq2seq collator, which pads labels as well."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data = Dataset.from_list(
        [
            {"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask, strict=True)]}
            for ids, mask in rows
        ]
    )
    model = load(job, folder)
    if job.lora:
        from peft import get_peft_model

        model = get_peft_model(model, _lora_config())
    times, seconds = _times(steps)
    with tempfile.TemporaryDirectory() as output:
        made = Trainer(
            model,
            args=TrainingArguments(**_settings(job, steps, output)),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(_tokenizer(folder)),
            callbacks=[times],
        )
        made.train()
    return seconds, _losses(made)


SIDES: dict[str, Callable[..., Measured]] = {
    "truetune": truetune,
    "truetune-padded": padded,
    "trl": trl,
    "trl-kept": trl_kept,
    "trl-packed": trl_packed,
    "trainer": trainer,
}


def matmul_limit(dtype: str) -> float:
    """Floating-point operations a second of a matrix product of the 0.5B's size."""
    import torch

    a = torch.randn(1024, 896).to(getattr(torch, dtype))
    b = torch.randn(896, 4864).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(12):
        started = clock()
        a @ b
        best = min(best, clock() - started)
    return 2 * 1024 * 896 * 4864 / best


def operations(job: Job, folder: Path, tokens: int, supervised: int) -> float:
    """Multiplications and additions that training needs, without attention: 2 a weight forward, 2
    for the gradient of its input, 2 for its own where it is trained (Kaplan et al. 2020); the head
    at supervised positions only."""
    from transformers import AutoConfig

    from truetune.model.architecture import meta_model

    model = meta_model(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings().weight
    tables = {head, model.get_input_embeddings().weight}
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p not in tables)
    return float((4 if job.lora else 6) * (body * tokens + head.numel() * supervised))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    global clock
    clock = CLOCKS[given.clock]
    job = JOBS[given.job]
    folder = make_model(job.model, given.models)
    steps = given.warm_up + given.steps
    rows = job.rows(steps * job.rows_a_step)
    limit = matmul_limit(job.dtype)
    seconds, losses = SIDES[given.side](job, folder, rows, steps)
    counted = rows[given.warm_up * job.rows_a_step :]
    tokens, supervised = (
        sum(len(ids) for ids, _ in counted),
        sum(sum(mask[1:]) for _, mask in counted),
    )
    result = {
        "operations": operations(job, folder, tokens, supervised),
        "side": given.side,
        "job": given.job,
        "seconds": seconds[given.warm_up :],
        "tokens": tokens,
        "supervised": supervised,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "matmul_gflops": limit / 1e9,
        "losses": losses,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
