"""Verification put to the test: healthy runs that must pass, tampered ones that must not.

    python -m bench.verify_matrix            healthy runs: method x type x device x model x seed
    python -m bench.verify_matrix --quick    two seeds of the small models
    python -m bench.verify_matrix --tamper   each tampering, with manifest, without, by behaviour

A run is trained as by `truetune train` and verified; for every fifth seed again with other kernels
(one thread more, oneDNN off), which stands for another machine. The fresh
process's part is computed in this one: what it is given are files and JSON alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path.insert(0, str(TESTS))

# Method to its settings; `adamw_bf16` computes in bfloat16 whatever is asked.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "adamw_bf16": {"optim": "adamw_bf16"},
    "LoRA": {"lora": True},
    "DoRA": {"lora": True, "dora": True},
    "QLoRA": {"qlora": True},
    "new tokens": {"lora": True, "add_token": ["<|think|>"]},
}
DTYPES = ("float32", "bfloat16")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3")
MODELS = ("embedded base", "tied 0.5B", *FAMILIES)
# Large steps, so that the trained weights are far from those that were loaded.
RATES = {"full": 1e-3, "adamw_bf16": 1e-3}


@dataclass(frozen=True)
class Cell:
    """One healthy run, verified."""

    method: str
    dtype: str
    device: str
    model: str
    seed: int
    passed: bool
    failures: list[str]
    bit_equal: bool
    # Divergence over what was allowed, here and with other kernels.
    ratio: float
    other_ratio: float
    seconds: float


def ask_here(request: Any) -> dict[str, Any]:
    """The fresh process's answer, given by this one."""
    from truetune.errors import TruetuneError
    from truetune.verification import worker
    from truetune.verification.fresh import VerifyError

    try:
        found = worker.answer(json.loads(json.dumps(request)))
    except TruetuneError as error:
        parts = {"where": error.where, "why": error.why, "fix": error.fix, "code": error.code}
        raise VerifyError(error.what, **parts) from error
    answered: dict[str, Any] = json.loads(json.dumps(found))
    return answered


@contextlib.contextmanager
def other_kernels() -> Iterator[None]:
    """Another machine, as far as this one can be one."""
    import torch

    from truetune.verification import record, worker

    def named(device: Any) -> dict[str, Any]:
        return {**record.machine_of(device), "name": "another"}

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with (
            torch.backends.mkldnn.flags(enabled=False),
            mock.patch.object(worker, "machine_of", named),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def model_folder(name: str, place: Path) -> Path:
    """A model of the matrix, written when it is first asked for."""
    folder = place / name.replace(" ", "-")
    if folder.exists():
        return folder
    if name == "embedded base":
        from truetune.lab import base_path

        return Path(base_path())
    from tiny_families import FAMILIES as SETTINGS
    from tiny_models import write_model

    if name == "tied 0.5B":
        return write_half_billion(folder)
    return write_model(folder, name, dtype="bfloat16", **SETTINGS[name])


def write_half_billion(folder: Path) -> Path:
    """A Qwen2 of 494 million random weights with head and embedding tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tiny_models import tiny_tokenizer

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        eos_token_id=257,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    return folder


def rows_file(place: Path, seed: int, marked: bool) -> Path:
    """Questions and answers of many lengths; with the new token in the answers where there is."""
    import random

    draw = random.Random(seed)
    path = place / f"rows-{seed}-{int(marked)}.jsonl"
    rows = []
    for i in range(24):
        words = " ".join(
            draw.choice(("red", "blue", "17", "a b")) for _ in range(draw.choice((2, 9, 30)))
        )
        mark = "<|think|>" if marked else ""
        rows.append({"prompt": f"{i}: {words}?", "completion": f"{mark}{words[:40]} {i}."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(place: Path, method: str, dtype: str, device: str, model: str, seed: int) -> Path:
    """A run of a few steps."""
    from truetune.recipe.sources import make_recipe
    from truetune.run.pipeline import train as run_pipeline

    output = Path(tempfile.mkdtemp(dir=place)) / "run"
    marked = method == "new tokens"
    settings = {
        "model": str(model_folder(model, place)),
        "data": str(rows_file(place, seed, marked)),
        "output": str(output),
        "max_steps": 1 if model == "tied 0.5B" else 3,
        "batch_size": 2 if model == "tied 0.5B" else 4,
        "learning_rate": RATES.get(method, 5e-3),
        "save_steps": 2,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "no_check": True,
        "verify": False,
        **METHODS[method],
    }
    run_pipeline(make_recipe(("bench", settings)))
    return output


def verified(run: Path, device: str) -> Any:
    """The verdict, computed in this process."""
    from truetune.verification import artifact

    with mock.patch.object(artifact, "ask", ask_here):
        return artifact.verify(str(run), device=device)


def ratio_of(verdict: Any) -> float:
    numbers = next(check.numbers for check in verdict.checks if check.name == "logits")
    return max(
        numbers["mean"] / numbers["tolerance"]["mean"],
        numbers["largest"] / numbers["tolerance"]["largest"],
    )


def healthy(place: Path, method: str, dtype: str, device: str, model: str, seed: int) -> Cell:
    """Train, verify here and with other kernels."""
    began = time.perf_counter()
    run = train(place, method, dtype, device, model, seed)
    here = verified(run, device)
    other = here
    if device == "cpu" and seed % 5 == 0:
        with other_kernels():
            other = verified(run, device)
    shutil.rmtree(run.parent)
    failures = [
        f"{c.name}: {c.what}" for v in (here, other) for c in v.checks if c.state == "failed"
    ]
    logits = next((c.numbers for c in here.checks if c.name == "logits"), {})
    return Cell(
        method,
        dtype,
        device,
        model,
        seed,
        not failures,
        failures,
        bool(logits.get("bit_equal")),
        ratio_of(here) if logits else float("nan"),
        ratio_of(other) if logits else float("nan"),
        round(time.perf_counter() - began, 1),
    )


def cells(models: list[str], seeds: int, devices: list[str]) -> Iterator[tuple[str, ...]]:
    for seed in range(seeds):
        for model in models:
            for device in devices:
                for method in METHODS:
                    for dtype in DTYPES:
                        if method == "adamw_bf16" and dtype == "float32":
                            continue
                        yield method, dtype, device, model, seed  # type: ignore[misc]


@dataclass(frozen=True)
class Tampered:
    """One tampering: which checks caught it. With the manifest, with the record alone, and by
    behaviour and structure without any hash."""

    name: str
    kind: str
    manifest: list[str]
    record: list[str]
    behaviour: list[str]


def tamperings(kinds: list[str], only: str = "") -> Iterator[tuple[str, str, Any]]:
    from bench.tampering import ADAPTER, BOTH, MODEL

    tables = {"adapter": {**BOTH, **ADAPTER}, "model": MODEL}
    for kind in kinds:
        for name, tamper in tables[kind].items():
            if only in name:
                yield kind, name, tamper


def prepared_runs(place: Path, dtype: str) -> dict[str, Path]:
    """A folder for each kind of run: the run, and the base it was made from."""
    from tiny_models import write_model

    made = {}
    for kind, method in (("adapter", "LoRA"), ("model", "full")):
        home = place / kind
        write_model(home / "llama", "llama", dtype="bfloat16")
        run = train(home, method, dtype, "cpu", "llama", 0)
        run.rename(home / "run")
        (home / "llama").rename(home / "base")
        made[kind] = home
    return made


def tampered(home: Path, place: Path, kind: str, name: str, tamper: Any) -> Tampered:
    """Tamper with a copy, and verify it in three ways."""
    from truetune.errors import TruetuneError
    from truetune.verification import artifact
    from truetune.verification.files import check_record

    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy)
    tamper(copy / "run")

    def caught(**changes: Any) -> list[str]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(artifact, "ask", ask_here))
            for target, value in changes.items():
                stack.enter_context(mock.patch.object(artifact, target, value))
            try:
                verdict = artifact.verify(str(copy / "run"), base=base, device="cpu")
            except TruetuneError as error:
                return [error.code]
        return [check.name for check in verdict.checks if check.state == "failed"]

    def structure(run: Any, record: Any, rows: str) -> Any:
        return check_record(run, record, rows, hashes=False)

    def hashes_alone(request: Any) -> Any:
        raise VerifyError("not opened", code="model-too-large")

    from truetune.verification.fresh import VerifyError

    base = str(copy / "base") if kind == "adapter" else None
    manifest = caught(ask=hashes_alone)
    (copy / "run/manifest.json").unlink()
    record = caught(ask=hashes_alone)
    behaviour = caught(check_record=structure)
    # What opening shows counts for every way: it follows the hashes.
    return Tampered(name, kind, manifest or behaviour, record or behaviour, behaviour)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds of the small models")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--models", nargs="*", default=None, choices=MODELS)
    parser.add_argument("--methods", nargs="*", default=None, choices=list(METHODS))
    parser.add_argument("--tamper", nargs="?", const="", default=None, metavar="PART")
    parser.add_argument("--minutes", type=float, default=None, help="start no run after these")
    parser.add_argument("--json", type=Path, default=None, help="append each run as a line")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    if options.tamper is not None:
        tamper_table(options)
        return
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    models = options.models or [m for m in MODELS if not options.quick or m in FAMILIES]
    began, done, alarms = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells(models, 2 if options.quick else options.seeds, devices):
            if options.methods and cell[0] not in options.methods:
                continue
            if options.minutes and time.perf_counter() - began > 60 * options.minutes:
                break
            found = healthy(Path(folder), *cell)  # type: ignore[arg-type]
            done, alarms = done + 1, alarms + (not found.passed)
            print(
                f"{found.model:<14}{found.method:<12}{found.dtype:<10}{found.device:<6}"
                f"{found.seed:>3}  {'passed' if found.passed else 'ALARM':<8}"
                f"{'bit-equal' if found.bit_equal else f'{found.ratio:.2g}':<12}"
                f"{found.other_ratio:<10.2g}{found.seconds:.1f} s",
                flush=True,
            )
            for failure in found.failures:
                print("    ", failure, flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(vars(found)) + "\n")
    print(f"{done} healthy runs, {alarms} false alarms")


def tamper_table(options: argparse.Namespace) -> None:
    """Each tampering in three ways, and which got through."""
    through: dict[str, list[str]] = {"manifest": [], "record": [], "behaviour": []}
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        homes = prepared_runs(Path(folder), "float32")
        for kind, name, tamper in tamperings(["adapter", "model"], options.tamper):
            found = tampered(homes[kind], Path(folder), kind, name, tamper)
            count += 1
            for way, names in through.items():
                if not getattr(found, way):
                    names.append(name)
            print(
                f"{found.name:<44} {','.join(found.manifest) or 'THROUGH':<18} "
                f"{','.join(found.record) or 'THROUGH':<18} "
                f"{','.join(found.behaviour) or 'THROUGH'}",
                flush=True,
            )
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(vars(found)) + "\n")
    for way, names in through.items():
        print(f"{way}: {count - len(names)} of {count} caught", *names, sep="\n    ")


if __name__ == "__main__":
    main()
