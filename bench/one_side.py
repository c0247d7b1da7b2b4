"""One side of a benchmark in a process of its own: trains a few steps and prints what it took.

    python bench/one_side.py SIDE JOB --given FILE --models DIR [--memory-mb N]

FILE is what workloads.py made of the job. Prints one line of JSON: seconds of each step after the
warm-up, of the whole training, peak memory of the process, losses. The sides differ in nothing but
what their functions say; the model's weights, the rows and their order are the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import JOBS, Given, Job, Row, make_model

# "wall": what a user waits; "cpu": seconds of this process on a core, which others on the machine
# do not lengthen (with one thread the two are equal on a quiet machine).
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter


def device_clock() -> float:
    """What passes until the device is done."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


# Tokens of the 0.5B whose activations TRL and transformers can keep on a machine of 24 GB: 7 MB
# each. A packed step with more is recomputed.
KEPT_TOKENS = {"0.5b": 2200}


@dataclass
class Measured:
    """What a side reports.

    Attributes:
        seconds: of every step, the warm-up first; from the end of one to the end of the next.
        losses: by step, from 1 on, as far as the side logged them.
        whole: seconds from the loaded model to the end of training, without imports.
        how: what it could not do as the other sides do, for the table.
    """

    seconds: list[float]
    losses: dict[int, float]
    whole: float
    how: str = ""


def longest(rows: list[Row]) -> int:
    return max(len(ids) for ids, _ in rows)


def in_steps(job: Job, rows: list[Row]) -> list[list[Row]]:
    n = job.rows_a_step
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def labels(row: Row) -> list[int]:
    return [t if m else -100 for t, m in zip(*row, strict=True)]


def truetune(job: Job, folder: Path, rows: list[Row], **changes: Any) -> Measured:
    """The library with its defaults, as its command line trains."""
    import torch

    from truetune import SFTExample, SFTTrainer
    from truetune.compute.batch import RowOrder
    from truetune.model.load import load_model
    from truetune.model.lora import LoraSettings, add_lora

    # As the plan has it for all weights on a GPU.
    halves = not job.lora and job.device != "cpu"
    changes = {"optim": "adamw_bf16" if halves else "adamw", **changes}
    loaded = load_model(
        folder,
        purpose="lora" if job.lora else "full",
        device=job.device,
        dtype=job.dtype,
        load_in="4bit" if job.quantised else "as-trained",
        bf16_weights=halves,
    )
    torch.manual_seed(0)
    started = clock()
    if job.lora:
        loaded = add_lora(loaded, LoraSettings(r=16, alpha=32, dropout=0.05), seed=0)
    # Laid out so that step s trains rows s * n to (s + 1) * n, as on the other sides.
    order = RowOrder(len(rows), job.rows_a_step, 0)
    examples: list[Any] = [None] * len(rows)
    for step, wanted in enumerate(in_steps(job, rows)):
        for place, row in zip(order.rows(step), wanted, strict=True):
            examples[place] = SFTExample(*row)
    ends: list[float] = []
    losses: dict[int, float] = {}

    def note(facts: Any) -> None:
        ends.append(clock())
        losses[facts.step] = facts.loss

    trainer = SFTTrainer(
        loaded.model,
        examples=examples,
        max_seq_len=longest(rows),
        pad_id=0,
        batch_size=job.rows_a_step,
        max_steps=len(rows) // job.rows_a_step,
        max_lr=job.learning_rate,
        lr_scheduler_type=job.schedule,
        warmup_steps=job.warmup_steps,
        autocast_dtype=loaded.compute_dtype,
        on_step=note,
        **changes,
    )
    ready = clock()
    trainer.train()
    return Measured(between(ready, ends), losses, clock() - started)


def between(start: float, ends: list[float]) -> list[float]:
    return [end - before for before, end in zip([start, *ends[:-1]], ends, strict=True)]


def padded(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """truetune's own reference path."""
    return truetune(job, folder, rows, packing=False)


def unfused(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """Without the kernels of liger-kernel, which the library takes where they are installed."""
    from truetune.compute import fused

    fused.liger = lambda: ""  # type: ignore[assignment]
    return truetune(job, folder, rows)


def load(job: Job, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, job.dtype)
    settings: dict[str, Any] = {"dtype": dtype}
    if job.quantised:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def _settings(job: Job, steps: int, output: str) -> dict[str, Any]:
    """What TRL and transformers are told alike."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": job.rows_a_step,
        "max_steps": steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.schedule,
        "warmup_steps": job.warmup_steps,
        # TRL's own default, but where there are only a few steps.
        "logging_steps": 1 if steps < 10 else 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": job.device == "cpu",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "bf16": job.dtype == "bfloat16",
        "seed": 0,
    }


def _times(logged: list[Any], ends: list[float]) -> Any:
    """A class of callbacks of transformers' trainers, which note the end of each step and what was
    logged."""
    from transformers import TrainerCallback

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(clock())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logged.extend(state.log_history)

    return Times


def _trained(made: Callable[[str, Any], Any], started: float) -> Measured:
    """Build a transformers trainer, for an output folder and with a callback, and train it."""
    ends: list[float] = []
    logged: list[Any] = []
    with tempfile.TemporaryDirectory() as output:
        trainer = made(output, _times(logged, ends)())
        ready = clock()
        trainer.train()
        whole = clock() - started
    losses = {entry["step"]: entry["loss"] for entry in logged if "loss" in entry}
    return Measured(between(ready, ends), losses, whole)


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


def trl(job: Job, folder: Path, rows: list[Row], data: Any = None, **changes: Any) -> Measured:
    """TRL with its defaults, but for `changes`; its loss is computed in chunks by default."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if data is None:
        columns = [{"input_ids": ids, "completion_mask": mask} for ids, mask in rows]
        data = Dataset.from_list(columns)
    model, tokenizer = load(job, folder), _tokenizer(folder)
    adapter = _lora_config() if job.lora else None
    settings = {"max_length": longest(rows), "completion_only_loss": True, **changes}

    def made(output: str, times: Any) -> Any:
        args = {**_settings(job, len(rows) // job.rows_a_step, output), **settings}
        return SFTTrainer(
            model,
            args=SFTConfig(**args),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[times],
        )

    return _trained(made, clock())


def _keeping(job: Job) -> tuple[dict[str, Any], str]:
    """Without recomputation, in the faster of two ways: one row after the other, none padded; or
    all rows of a step at once where the model is so small that calls cost more than padding."""
    kept = {"gradient_checkpointing": False}
    # A device has the memory for all rows of a step.
    if job.rows_a_step == 1 or job.model == "embedded" or job.device != "cpu":
        return kept, ""
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": job.rows_a_step}
    return {**kept, **alone}, "one row at a time"


def trl_kept(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """TRL without its default of recomputing activations: its best setting here."""
    changes, how = _keeping(job)
    measured = trl(job, folder, rows, **changes)
    measured.how = how
    return measured


def trl_liger(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """TRL without recomputation, with the kernels of liger-kernel: its best setting on a GPU."""
    return trl(job, folder, rows, gradient_checkpointing=False, use_liger_kernel=True)


def unsloth(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """Unsloth's model in TRL's trainer, without recomputation, as its notebooks have it. Its fused
    adapters need a dropout of 0, so that it takes its other way here."""
    # Before TRL, which it changes.
    from unsloth import FastLanguageModel  # isort: skip
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=longest(rows),
        dtype=getattr(torch, job.dtype),
        load_in_4bit=job.quantised,
        full_finetuning=not job.lora,
    )
    if job.lora:
        config = _lora_config()
        model = FastLanguageModel.get_peft_model(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=[
                *("q_proj", "k_proj", "v_proj", "o_proj"),
                *("gate_proj", "up_proj", "down_proj"),
            ],
            bias="none",
            use_gradient_checkpointing=False,
            random_state=0,
        )
    data = Dataset.from_list([{"input_ids": row[0], "labels": labels(row)} for row in rows])

    def made(output: str, times: Any) -> Any:
        args = _settings(job, len(rows) // job.rows_a_step, output)
        return SFTTrainer(
            model=model,
            args=SFTConfig(**args, max_length=longest(rows), gradient_checkpointing=False),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[times],
        )

    return _trained(made, clock())


def axolotl(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """Axolotl's own training of a config: padded rows in their order, without recomputation, with
    its fused adapters where it allows them (they need a dropout of 0)."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from transformers import trainer as trainers

    noted: list[Any] = []
    ends: list[float] = []
    # It builds the trainer itself.
    trainers.DEFAULT_CALLBACKS.append(_times(noted, ends))
    with tempfile.TemporaryDirectory() as output:
        data = Path(output) / "rows.jsonl"
        lines = (
            {"input_ids": row[0], "attention_mask": [1] * len(row[0]), "labels": labels(row)}
            for row in rows
        )
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        config = {
            "base_model": str(folder),
            "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
            "dataset_prepared_path": str(Path(output) / "prepared"),
            "shuffle_merged_datasets": False,
            "curriculum_sampling": True,
            "sequence_len": longest(rows),
            "sample_packing": False,
            "micro_batch_size": job.rows_a_step,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "max_steps": len(rows) // job.rows_a_step,
            "learning_rate": job.learning_rate,
            "lr_scheduler": job.schedule,
            "warmup_steps": job.warmup_steps,
            "optimizer": "adamw_torch_fused",
            "weight_decay": 0.0,
            "bf16": job.dtype == "bfloat16",
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
            "output_dir": str(Path(output) / "out"),
        }
        if job.lora:
            config |= {
                "adapter": "qlora" if job.quantised else "lora",
                "load_in_4bit": job.quantised,
                "lora_r": 16,
                "lora_alpha": 32,
                "lora_dropout": 0.05,
                "lora_target_linear": True,
            }
        file = Path(output) / "config.yml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        cfg = load_cfg(str(file))
        rows_of_it = load_datasets(cfg=cfg)
        started = clock()
        train(cfg=cfg, dataset_meta=rows_of_it)
        whole = clock() - started
    # The first step also loads the model; it belongs to the warm-up.
    logged = {entry["step"]: entry["loss"] for entry in noted if "loss" in entry}
    return Measured(between(started, ends), logged, whole)


def trl_packed(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """TRL with `bfd` packing: the rows of a step in one sequence, packed by TRL's own function,
    step by step, so that a step trains the same rows as on the other sides."""
    from datasets import Dataset, concatenate_datasets
    from trl import pack_dataset

    steps = in_steps(job, rows)
    packed = []
    most = 0
    for step in steps:
        columns = Dataset.from_list([{"input_ids": row[0], "labels": labels(row)} for row in step])
        tokens = sum(len(ids) for ids, _ in step)
        packed.append(pack_dataset(columns, tokens, "bfd"))
        most = max(most, tokens)
    data = concatenate_datasets(packed)
    if len(data) != len(steps):
        raise AssertionError(f"{len(steps)} steps were packed into {len(data)} sequences")
    keep = most <= KEPT_TOKENS.get(job.model, most)
    measured = trl(
        job,
        folder,
        rows,
        data,
        packing=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=most,
        per_device_train_batch_size=1,
        gradient_checkpointing=not keep,
    )
    measured.how = "" if keep else "recomputed"
    return measured


def trainer(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """transformers' Trainer with its seq2seq collator, which pads labels as well: the
    language-modelling collator makes labels of all ids anew and loses the masks."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data = Dataset.from_list([{"input_ids": row[0], "labels": labels(row)} for row in rows])
    model, tokenizer = load(job, folder), _tokenizer(folder)
    if job.lora:
        from peft import get_peft_model

        model = get_peft_model(model, _lora_config())
    changes, how = _keeping(job)

    def made(output: str, times: Any) -> Any:
        args = {**_settings(job, len(rows) // job.rows_a_step, output), **changes}
        return Trainer(
            model,
            args=TrainingArguments(**args),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[times],
        )

    measured = _trained(made, clock())
    measured.how = how
    return measured


def litgpt(job: Job, folder: Path, rows: list[Row]) -> Measured:
    """LitGPT's LoRA recipe: its `fit` on its model, one row at a time, as the recipe has it."""
    import litgpt.finetune.lora as recipe
    import torch
    from lightning import Fabric
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_qwen_2_5
    from litgpt.utils import instantiate_torch_optimizer
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader

    if not job.lora:
        raise SystemExit("the recipe trains adapters alone")
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = recipe.Config.from_name(
        "Qwen2.5-0.5B",
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        n_embd=sizes["hidden_size"],
        head_size=sizes["hidden_size"] // sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        **{f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")},
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    fabric.seed_everything(0, verbose=False)
    with fabric.init_module(empty_init=False):
        model = recipe.GPT(config)
    recipe.mark_only_lora_as_trainable(model)
    weights: dict[str, Any] = {}
    copy_weights_qwen_2_5(config, {}, weights, load_file(folder / "model.safetensors"))
    missing, surplus = model.load_state_dict(weights, strict=False)
    if surplus or any("lora" not in name for name in missing):
        raise AssertionError(f"weights do not match: {missing} {surplus}")
    del weights

    started = clock()
    counts = torch.zeros(1, dtype=torch.long)
    data = [
        {
            "input_ids": torch.tensor(row[0]),
            "labels": torch.tensor(labels(row)),
            "token_counts": {"raw": counts, "raw_plus_prompt_template": counts},
        }
        for row in rows
    ]
    collate = get_sft_collate_fn(pad_id=0)
    # `fit` looks at a row of validation before it starts.
    loaders = fabric.setup_dataloaders(
        DataLoader(data, 1, collate_fn=collate), DataLoader(data[:1], 1, collate_fn=collate)
    )
    sums: list[tuple[float, int]] = []
    its_loss = recipe.chunked_cross_entropy

    def noted(logits: Any, targets: Any, **options: Any) -> Any:
        loss = its_loss(logits, targets, **options)
        if not options:  # not a validation
            sums.append((float(loss.detach()), int((targets != -100).sum())))
        return loss

    ends: list[float] = []

    class Constant(torch.optim.lr_scheduler.ConstantLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            if self.last_epoch:  # the constructor steps once
                ends.append(clock())

    model = fabric.setup_module(model)
    settings = {"lr": job.learning_rate, "weight_decay": 0.0}
    optimizer = fabric.setup_optimizers(
        instantiate_torch_optimizer(
            {"class_path": "torch.optim.AdamW", "init_args": settings},
            [p for p in model.parameters() if p.requires_grad],
        )
    )
    steps = len(rows) // job.rows_a_step
    recipe.chunked_cross_entropy = noted
    ready = clock()
    with tempfile.TemporaryDirectory() as output:
        recipe.fit(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            scheduler=Constant(optimizer, factor=1.0),
            train_dataloader=loaders[0],
            val_dataloader=loaders[1],
            devices=1,
            checkpoint_dir=folder,
            out_dir=Path(output),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=job.rows_a_step,
                micro_batch_size=1,
                epochs=2,
                max_steps=steps,
            ),
            eval=EvalArgs(interval=steps + 1, initial_validation=False, max_iters=1),
            data=None,
        )
    # Its loss is the mean of the rows' means; for the comparison each target counts once.
    losses = {}
    for step in range(steps):
        of_step = sums[step * job.rows_a_step : (step + 1) * job.rows_a_step]
        total = sum(count for _, count in of_step)
        losses[step + 1] = sum(loss * count for loss, count in of_step) / total
    return Measured(between(ready, ends), losses, clock() - started)


SIDES: dict[str, Callable[..., Measured]] = {
    "truetune": truetune,
    "truetune-padded": padded,
    "truetune-unfused": unfused,
    "trl": trl,
    "trl-kept": trl_kept,
    "trl-packed": trl_packed,
    "trl-liger": trl_liger,
    "unsloth": unsloth,
    "axolotl": axolotl,
    "trainer": trainer,
    "litgpt": litgpt,
}


def matmul_limit(dtype: str, device: str) -> float:
    """Floating-point operations a second of a matrix product of the 0.5B's size, on a GPU of the
    8B's."""
    import torch

    rows, inner, columns = (1024, 896, 4864) if device == "cpu" else (8192, 4096, 14336)
    kind: Any = {"dtype": getattr(torch, dtype), "device": device}
    a, b = torch.randn(rows, inner, **kind), torch.randn(inner, columns, **kind)
    best = float("inf")
    for _ in range(12):
        started = clock()
        a @ b
        best = min(best, clock() - started)
    return 2 * rows * inner * columns / best


def peak_mb(device: str) -> float:
    """Of the process; on a GPU what tensors took there."""
    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / (1 << 20)


def out_of_memory(error: BaseException) -> bool:
    text = str(error)
    signs = ("DefaultCPUAllocator", "bad_alloc", "CUDA out of memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--given", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--memory-mb", type=int, default=0, help="the most that it may take")
    options = parser.parse_args()
    global clock
    job = JOBS[options.job]
    clock = CLOCKS[options.clock] if job.device == "cpu" else device_clock
    if options.memory_mb and job.device == "cpu":
        # Refused by the system beyond this, so that it kills no other process.
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory_mb << 20,) * 2)
    folder = make_model(job.model, options.models)
    rows = [(ids, mask) for ids, mask in Given.read(options.given).rows]
    limit = matmul_limit(job.dtype, job.device)
    try:
        measured = SIDES[options.side](job, folder, rows)
    except (MemoryError, RuntimeError) as error:
        if options.memory_mb and out_of_memory(error):
            room = f"{options.memory_mb / 1000:.0f} GB" if job.device == "cpu" else "the GPU"
            raise SystemExit(f"does not fit in {room}") from error
        raise
    import torch

    result = {
        "seconds": measured.seconds[job.warm_up :],
        "whole": measured.whole,
        "losses": measured.losses,
        "how": measured.how,
        "peak_mb": peak_mb(job.device),
        "matmul_gflops": limit / 1e9,
        "dtype": job.dtype,
        "threads": torch.get_num_threads(),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
