"""Verification put to the test: healthy runs that must pass, tampered ones that must not.

    python -m bench.verify_matrix --seeds 20    healthy runs: method x type x device x model x seed
    python -m bench.verify_matrix --quick       two seeds of the small models
    python -m bench.verify_matrix --tamper      each tampering: with manifest, without, by behaviour
    ... --write                                 and the table of docs/verification.md; tamperings
                                                stand in docs/reliability.md

A run is trained as by `truetune train` and verified; for every fifth seed again with other kernels
(one thread more, oneDNN off), which stands for another machine. For the first seed of each cell a
fresh process verifies, as after every run; for the others its part is computed in this process:
what it is given are files and JSON alone. Each run is a line of docs/verification_runs.jsonl (or of
`--results FILE`), and a run that stands there is not made again: the matrix can be stopped, and
goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import platform
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
sys.path.insert(0, str(HERE.parent))

from bench.page import put  # noqa: E402

PAGE = HERE.parent / "docs" / "verification.md"
RELIABILITY = HERE.parent / "docs" / "reliability.md"
# A run of the healthy matrix is a line with its date here, so that several machines and days can
# fill it.
RUNS = HERE.parent / "docs" / "verification_runs.jsonl"

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
# The last three: learned positions, scaled logits, and one whose rows are not packed.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "granite", "bloom")
LARGE = "tied 0.5B"
MODELS = ("embedded base", *FAMILIES, LARGE)
# Method, type, device, model, seed.
Key = tuple[str, str, str, str, int]
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
    fresh: bool = False
    date: str = ""


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
    from tiny_families import settings_of
    from tiny_models import write_model

    # It gets its name when it is whole.
    unfinished = Path(tempfile.mkdtemp(dir=place))
    if name == LARGE:
        write_half_billion(unfinished)
    else:
        write_model(unfinished, name, dtype="bfloat16", **settings_of(name))
    return unfinished.rename(folder)


def write_half_billion(folder: Path) -> None:
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
        "max_steps": 1 if model == LARGE else 3,
        "batch_size": 2 if model == LARGE else 4,
        "learning_rate": RATES.get(method, 5e-3),
        # Such a rate makes weights worse, which is the point here.
        "on_collapse": "continue",
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


def verified(run: Path, device: str, *, fresh: bool = False) -> Any:
    """The verdict; computed in this process where it need not be a fresh one."""
    from truetune.verification import artifact

    if fresh:
        return artifact.verify(str(run), device=device)
    with mock.patch.object(artifact, "ask", ask_here):
        return artifact.verify(str(run), device=device)


def ratio_of(verdict: Any) -> float:
    numbers = next(check.numbers for check in verdict.checks if check.name == "logits")
    return max(
        numbers["mean"] / numbers["tolerance"]["mean"],
        numbers["largest"] / numbers["tolerance"]["largest"],
    )


def healthy(
    place: Path,
    method: str,
    dtype: str,
    device: str,
    model: str,
    seed: int,
    *,
    fresh: bool = False,
) -> Cell:
    """Train, verify as asked and with other kernels."""
    began = time.perf_counter()
    run = train(place, method, dtype, device, model, seed)
    here = verified(run, device, fresh=fresh)
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
        fresh,
        time.strftime("%Y-%m-%d"),
    )


def cells(models: list[str], seeds: int, devices: list[str]) -> Iterator[Key]:
    """Small models first, all cells of a seed before the next one."""
    small = [model for model in models if model != LARGE]
    for group in (small, [LARGE] if LARGE in models else []):
        for seed, model, device in itertools.product(range(seeds), group, devices):
            for method, dtype in itertools.product(METHODS, DTYPES):
                if method == "adamw_bf16" and dtype == "float32":
                    continue
                yield method, dtype, device, model, seed


@dataclass(frozen=True)
class Tampered:
    """One tampering: which checks caught it. With the manifest, with the record alone, and by
    behaviour and structure without any hash."""

    name: str
    kind: str
    manifest: list[str]
    record: list[str]
    behaviour: list[str]
    date: str


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
        unequal_norms(home / "llama")
        run = train(home, method, dtype, "cpu", "llama", 0)
        run.rename(home / "run")
        (home / "llama").rename(home / "base")
        made[kind] = home
    return made


def unequal_norms(folder: Path) -> None:
    """A model that was trained has norms that differ from each other."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor += 0.2 * torch.randn(tensor.shape).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


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
        # Settings and added files alone: no hash differs.
        alike = record and dataclasses.replace(record, rows=rows)
        with mock.patch("truetune.verification.files._changed", return_value=False):
            return check_record(run, alike, rows)

    def hashes_alone(request: Any) -> Any:
        raise VerifyError("not opened", code="model-too-large")

    from truetune.verification.fresh import VerifyError

    base = str(copy / "base") if kind == "adapter" else None
    manifest = caught(ask=hashes_alone)
    (copy / "run/manifest.json").unlink()
    record = caught(ask=hashes_alone)
    behaviour = caught(check_record=structure)
    # What opening shows counts for every way: it follows the hashes.
    date = time.strftime("%Y-%m-%d")
    return Tampered(name, kind, manifest or behaviour, record or behaviour, behaviour, date)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds of the small models")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--from-seed", type=int, default=0, help="leave out earlier ones")
    parser.add_argument("--models", nargs="*", default=None, choices=MODELS)
    parser.add_argument("--methods", nargs="*", default=None, choices=list(METHODS))
    parser.add_argument("--dtypes", nargs="*", default=None, choices=DTYPES)
    parser.add_argument("--tamper", nargs="?", const="", default=None, metavar="PART")
    parser.add_argument("--minutes", type=float, default=None, help="start no run after these")
    parser.add_argument("--write", action="store_true", help="the table of docs/verification.md")
    parser.add_argument("--results", type=Path, default=None, help="where each run is a line")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    work = Path(tempfile.gettempdir()) / "truetune-bench"
    work.mkdir(exist_ok=True)
    if options.tamper is not None:
        tamper_table(options, options.results or work / "verify_tampering.jsonl")
    else:
        healthy_table(options, options.results or RUNS, work / "verify")


def known(results: Path) -> list[dict[str, Any]]:
    """The runs that were made so far."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def keep(found: Any, results: Path) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(found)) + "\n")


def healthy_table(options: argparse.Namespace, results: Path, place: Path) -> None:
    """Healthy runs that are still missing, and what all of them came to."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = options.models or [m for m in MODELS if not options.quick or m in FAMILIES]
    began = time.perf_counter()
    had = {(r["method"], r["dtype"], r["device"], r["model"], r["seed"]) for r in known(results)}
    place.mkdir(exist_ok=True)
    for cell in cells(names, 2 if options.quick else options.seeds, devices):
        method, dtype, *_, seed = cell
        if method not in (options.methods or METHODS) or dtype not in (options.dtypes or DTYPES):
            continue
        if cell in had or seed < options.from_seed:
            continue
        if options.minutes is not None and time.perf_counter() - began >= 60 * options.minutes:
            break
        found = healthy(place, *cell, fresh=seed == 0)
        print(
            f"{found.model:<14}{found.method:<12}{found.dtype:<10}{found.device:<6}"
            f"{found.seed:>3}  {'passed' if found.passed else 'ALARM':<8}"
            f"{'bit-equal' if found.bit_equal else f'{found.ratio:.2g}':<12}"
            f"{found.other_ratio:<10.2g}{found.seconds:.1f} s",
            flush=True,
        )
        for failure in found.failures:
            print("    ", failure, flush=True)
        keep(found, results)
    table = matrix(known(results))
    print(table)
    if options.write:
        put(table, "<!-- made by bench.verify_matrix -->", "<!-- end of matrix -->", PAGE)


def matrix(runs: list[dict[str, Any]]) -> str:
    """Methods by models: how many passed of how many, and the largest share of the tolerance."""
    groups: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        line = groups.setdefault((run["method"], run["dtype"], run["device"]), {})
        line.setdefault(run["model"], []).append(run)
    lines = [
        f"| method | type | device | {' | '.join(MODELS)} |",
        f"|---|---|---|{'---|' * len(MODELS)}",
    ]
    order = {name: place for place, name in enumerate(METHODS)}
    for (method, dtype, device), line in sorted(
        groups.items(), key=lambda item: (order[item[0][0]], item[0][1] != "float32", item[0][2])
    ):
        texts = []
        for model in MODELS:
            found = line.get(model, [])
            passed = sum(run["passed"] for run in found)
            # A share that could not be measured is not a number.
            shares = [v for r in found for v in (r["ratio"], r["other_ratio"]) if v == v]
            most = f", {max(shares):.2f}" if shares else ""
            texts.append(f"{passed} of {len(found)}{most}" if found else "not run")
        lines.append(f"| {method} | {dtype} | {device} | {' | '.join(texts)} |")
    alarms = sum(not run["passed"] for run in runs)
    dates = sorted({run["date"] for run in runs})
    lines += [
        "",
        f"{len(runs):,} healthy runs, {alarms} false alarm{'' if alarms == 1 else 's'}; "
        f"{sum(run['fresh'] for run in runs)} were verified by a fresh process and the others, to "
        "save time, by the process that trained them; "
        f"{sum(run['seed'] % 5 == 0 and run['device'] == 'cpu' for run in runs)} were verified a "
        "second time with other kernels. In each cell: runs that passed, and the largest "
        f"divergence as a share of what is allowed. Machine: {machine()}. "
        f"{' to '.join(sorted({*dates[:1], *dates[-1:]}))}.",
    ]
    return "\n".join(lines)


def machine() -> str:
    import torch

    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def tamper_table(options: argparse.Namespace, results: Path) -> None:
    """Each tampering in three ways, and which got through."""
    had = {(r["kind"], r["name"]) for r in known(results)}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        missing = [
            each for each in tamperings(["adapter", "model"], options.tamper) if each[:2] not in had
        ]
        homes = prepared_runs(Path(folder), "float32") if missing else {}
        for kind, name, tamper in missing:
            if options.minutes and time.perf_counter() - began > 60 * options.minutes:
                break
            found = tampered(homes[kind], Path(folder), kind, name, tamper)
            print(
                f"{found.name:<44} {','.join(found.manifest) or 'THROUGH':<18} "
                f"{','.join(found.record) or 'THROUGH':<18} "
                f"{','.join(found.behaviour) or 'THROUGH'}",
                flush=True,
            )
            keep(found, results)
    table = ways_table(known(results))
    print(table)
    if options.write:
        put(
            table,
            "<!-- made by bench.verify_matrix --tamper -->",
            "<!-- end of tampering -->",
            RELIABILITY,
        )


def ways_table(found: list[dict[str, Any]]) -> str:
    """What was changed, by the three ways of verifying: caught of tried; and what got through."""
    ways = ("manifest", "record", "behaviour")
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        groups.setdefault(each["name"].partition(":")[0], []).append(each)
    lines = [
        "| what was changed | tried | with the manifest | with the record | without any hash |"
    ]
    lines.append("|---|---|---|---|---|")
    for name, group in [*groups.items(), ("all", found)]:
        counts = (str(sum(bool(each[way]) for each in group)) for way in ways)
        lines.append(f"| {name} | {len(group)} | {' | '.join(counts)} |")
    lines.append("")
    for way, words in zip(ways, ("the manifest", "the record alone", "no hash"), strict=True):
        names = [each["name"] for each in found if not each[way]]
        lines.append(f"Missed with {words}: {'; '.join(names) or 'nothing'}.")
    dates = sorted({each["date"] for each in found})
    lines += ["", f"Machine: {machine()}. {' to '.join(sorted({*dates[:1], *dates[-1:]}))}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
