"""Run directories as training leaves them, written by hand: no model, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

EVIL = "<script>alert(1)</script>\u202e\x1b[31m\"'&</style><img src=x onerror=alert(2)>"


def finding(code: str, level: str, what: str, **other: Any) -> dict[str, Any]:
    empty = {"where": "", "count": 1, "why": "", "fix": "", "rows": []}
    return {"code": code, "level": level, "what": what, **empty, **other}


def steps(count: int, *, diverging: bool = False) -> Iterable[dict[str, Any]]:
    for step in range(1, count + 1):
        part = step / count
        loss = 3 * math.exp(-3 * part) + 0.1 + 0.05 * math.sin(step)
        norm = 5 * math.exp(-part) * (40**part if diverging else 1)
        yield {
            "step": step,
            "loss": loss,
            "learning_rate": 2e-4 * (1 - part),
            "grad_norm": norm,
            "tokens": 400,
            "supervised_tokens": 140,
            "seconds": 0.3,
        }


def vitals(step: int, part: float, *, broken: bool = False) -> dict[str, Any]:
    """The probes of a step; `part` of the run is done."""
    return {
        "step": step,
        "probe": True,
        "trained_loss": 3 * math.exp(-3 * part) + 0.1,
        "held_out_loss": 3.1 * math.exp(-2.5 * part) + 0.3,
        "keep_loss": 0.8 + (4 * part if broken else 0.15 * part),
        "stop_loss": 6 * math.exp(-4 * part),
        "stop_rate": max(0.0, 0.9 - 1.2 * part) if broken else min(1.0, 1.4 * part),
        "reply_tokens": 20 + (70 * part if broken else -8 * part),
        "repetition": min(1.0, 1.3 * part) if broken else 0.0,
        "role_leak": 0.5 * part if broken else 0.0,
        "open_thinking": 0.0,
        "empty": 0.0,
        "copied": 0.0,
        "other_language": 0.0,
        "prompts": 8,
        "seconds": 0.5,
    }


def sample(step: int, number: int, answer: str, *, stopped: bool, text: str) -> dict[str, Any]:
    return {
        "step": step,
        "where": f"rows.jsonl:{number}",
        "messages": [{"role": "user", "content": f"Question {number}? {text}"}],
        "answer": answer,
        "stopped": stopped,
        "expected": f"Answer {number}. {text}",
    }


def lengths() -> dict[str, Any]:
    damage = {
        "limit": 100,
        "rows": 10,
        "cut": 4,
        "stops": 4,
        "answers": 4,
        "gone": 1,
        "thoughts": 2,
        "with_thoughts": 4,
        "tokens_kept": 0.9,
    }
    return {
        "p50": 50,
        "p95": 150,
        "p99": 190,
        "longest": 200,
        "examples": 10,
        "keeps_99_percent": 192,
        "limit": damage,
        "limits": [damage],
        "histogram": [{"from": 1, "to": 100, "rows": 6}, {"from": 101, "to": 200, "rows": 4}],
    }


def counts(examples: int) -> dict[str, Any]:
    return {
        "examples": examples,
        "tokens": 24 * examples,
        "supervised_tokens": 9 * examples,
        "longest": 31,
        "truncated_prompts": 0,
        "split_texts": 0,
        "sha256": "a" * 64,
    }


def files(text: str = "plain", *, healthy: bool = True, adapter: bool = False) -> dict[str, Any]:
    """Name -> content of a finished run of 100 steps with probes each 10.

    Args:
        text: stands wherever a stranger's text may.
        healthy: else the run collapsed at step 60 and was stopped.
        adapter: LoRA, else all weights.
    """
    last = 100 if healthy else 60
    marks = range(0, last + 1, 10)
    metrics = [*steps(last, diverging=not healthy)]
    metrics += [vitals(step, step / last, broken=not healthy) for step in marks]
    if healthy:
        metrics += [{"step": step, "eval_loss": 2 - step / 100} for step in marks if step]
    metrics.sort(key=lambda line: line["step"])
    found = [finding("stop-added", "note", f"added to the stop set: '<|end|>' (4), {text}")]
    if not healthy:
        found.append(
            finding(
                "replies-repeat",
                "error",
                f"88% of the replies to 8 fixed prompts go round in a circle at step 60 {text}",
                why="the model collapses into its likeliest words",
                fix="a third of the --learning-rate",
            )
        )
    values = {
        "model": (f"bases/tiny {text}", "command line"),
        "data": ("rows.jsonl", "command line"),
        "lora": (adapter, "command line" if adapter else "default"),
        "lora_r": (32 if adapter else 16, "default"),
        "qlora": (False, "default"),
        "learning_rate": (2e-4, "default: a base of 5 M parameters"),
        "max_steps": (100, "command line"),
        "seed": (42, "default"),
    }
    said = "and on and on " * 40 if not healthy else "Answer."
    contents: dict[str, Any] = {
        "recipe.yaml": {n: {"value": v, "origin": o} for n, (v, o) in values.items()},
        "contract.json": {
            "fingerprint": "f" * 64,
            "template": {"origin": "built-in chatml-lite", "source": f"{{{{ x }}}} {text}"},
            "template_kwargs": {"enable_thinking": False},
            "stop": [{"id": 0, "token": "<|endoftext|>"}, {"id": 4, "token": "<|end|>"}],
            "tokenizer": {"class": "Tokenizer", "size": 2032},
        },
        "data.json": {
            "schema": "messages",
            "files": [
                {"path": "rows.jsonl", "sha256": "b" * 64, "num_rows": 110, "num_bytes": 9000}
            ],
            "rows_read": 110,
            "train": counts(100),
            "held_out": counts(6),
            "dropped": [
                {"where": f"rows.jsonl:{n}", "code": "rows-overlong", "what": f"{n} tokens {text}"}
                for n in range(4)
            ],
            "lengths": lengths(),
            "pictures": [
                {
                    "where": "rows.jsonl:7",
                    "sequences": 1,
                    "tokens": 10,
                    "supervised": 3,
                    "pieces": [
                        {"kind": "prompt", "ids": [2, 5], "texts": ["<|user|>", f"Hi {text}\n"]},
                        {"kind": "supervised", "ids": [6, 7], "texts": ["Hel", "lo"]},
                        {"kind": "stop", "ids": [4], "texts": ["<|end|>"]},
                    ],
                }
            ],
        },
        "env.json": {
            "command": ["truetune", "train", text],
            "python": "3.11.7",
            "versions": {"truetune": "0.1.0", "torch": "2.13.0"},
            "choices": [{"name": "device", "value": "cpu", "reason": "no GPU"}],
            "check": "passed",
        },
        "metrics.jsonl": metrics,
        "samples.jsonl": [
            sample(
                step,
                number,
                f"a base goes on {text}" if not step else f"{said} {step} {text}",
                stopped=bool(step) and healthy,
                text=text,
            )
            for step in marks
            for number in range(1, 4)
        ],
        "findings.jsonl": found,
    }
    folder = "adapter" if adapter else "model"
    if adapter:
        contents["adapter/adapter_config.json"] = {
            "base_model_name_or_path": f"bases/tiny {text}",
            "revision": None,
            "peft_type": "LORA",
        }
    else:
        contents["model/config.json"] = {"architectures": ["LlamaForCausalLM"]}
    contents[f"{folder}/model.safetensors"] = "weights"
    if healthy:
        contents["verify.json"] = {
            "passed": True,
            "artifact": folder,
            "checks": [
                {"name": name, "state": "passed", "what": f"{name} {text}", "numbers": {}}
                for name in ("record", "opens", "contract", "rows", "logits")
            ],
        }
        contents["manifest.json"] = {"finished": True, "artifact": folder, "files": {}}
    return contents


def write_run(folder: Path, contents: Mapping[str, Any]) -> Path:
    """A run directory of such files."""
    for name, value in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, str):
            text = value
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(line) + "\n" for line in value)
        elif name.endswith(".yaml"):
            text = yaml.safe_dump(value)
        else:
            text = json.dumps(value)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return folder
