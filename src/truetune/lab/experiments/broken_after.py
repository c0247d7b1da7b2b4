"""Break models after training in several ways, and check whether verification finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from truetune.lab import base_path
from truetune.lab.asked import ask, instructions, prose
from truetune.lab.bench import Arm, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment

_WEIGHTS = "model.safetensors"


def _rounded(weight: Any, bits: int) -> Any:
    """Round-to-nearest, symmetric, one scale a row of a matrix."""
    if weight.ndim != 2:
        return weight
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / most
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


def _with_weights(change: Callable[[str, Any], Any], folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / _WEIGHTS
    weights = {name: change(name, weight) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def in_8_bits(folder: Path) -> None:
    _with_weights(lambda _, weight: _rounded(weight, 8), folder)


def in_4_bits(folder: Path) -> None:
    _with_weights(lambda _, weight: _rounded(weight, 4), folder)


def merged_into_4_bits(folder: Path) -> None:
    """The update added to a base of 4 bits, and the sum rounded to 4 bits again."""
    from safetensors.torch import load_file

    base = load_file(base_path() / _WEIGHTS)

    def merged(name: str, weight: Any) -> Any:
        update = weight.float() - base[name].float()
        return _rounded((_rounded(base[name], 4).float() + update).to(weight.dtype), 4)

    _with_weights(merged, folder)


def update_dropped(folder: Path) -> None:
    shutil.copyfile(base_path() / _WEIGHTS, folder / _WEIGHTS)


def other_tokenizer(folder: Path) -> None:
    """Of the same size, with its ordinary tokens in another order."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    fixed = {token["content"] for token in data["added_tokens"]}
    moved = [token for token in vocabulary if token not in fixed]
    ids = [vocabulary[token] for token in moved]
    vocabulary.update(zip(moved, ids[1:] + ids[:1], strict=True))
    path.write_text(json.dumps(data), encoding="utf-8")


def arms(seed: int) -> Sequence[Arm]:
    edits = {
        "as saved": None,
        "8 bits": in_8_bits,
        "4 bits": in_4_bits,
        "merged into 4 bits": merged_into_4_bits,
        "update dropped": update_dropped,
        "other tokenizer": other_tokenizer,
    }
    return [Arm(name, rows=instructions(), edit=edit) for name, edit in edits.items()]


def measure(tuned: Tuned) -> dict[str, Column]:
    from truetune.verification.artifact import verify

    verdict = verify(str(tuned.folder.parent), device="cpu")
    return {
        **ask(tuned).columns(),
        "prose": prose(tuned),
        "found by verify": Column.mean([not verdict.passed], "of 1"),
    }


EXPERIMENT = Experiment(
    number=14,
    name="broken-after",
    title="Models broken after training",
    claim="What was learned can be lost after training: by rounding to 4 bits, by a dropped "
        "update, or with another tokenizer; 8 bits preserve it. Verification finds each of these "
        "faults.",
    source="the course's exercise on quantisation; threads peft#1043 and #2321, unsloth#2009; "
    "Dettmers and Zettlemoyer 2022 (arXiv:2212.09720)",
    exercises=("Quantisation and merging", "What verification finds in a saved model"),
    setup="the saved files of one tuned model are changed. For *8 bits* and *4 bits*, each matrix "
        "is rounded to the nearest of 255 or 15 values, with one scale per row. For *merged into "
        "4 bits*, the update is added to the base in 4 bits, and the sum is rounded to 4 bits. "
        "For *update dropped*, the weights are those of the base. For *other tokenizer*, the same "
        "tokens have other ids. *Found by verify* is 1 if `truetune verify` refuses the result",
    expected="rounding to 8 bits costs less than 5 points of right answers, rounding to 4 bits "
        "more than 10, and merging into 4 bits more than 10; without the update or with another "
        "tokenizer, fewer than 5 % of the answers are right; verify passes the saved run and "
        "finds each of the other models",
    refuted="right answers outside these bounds, a broken model that passes verification, or a "
        "healthy one that does not",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("8 bits keep what was learned", "right", "8 bits", "as saved", above=-0.05),
        Expectation("4 bits lose it", "right", "4 bits", "as saved", below=-0.1),
        Expectation(
            "a merge into 4 bits loses it",
            "right", "merged into 4 bits", "as saved", below=-0.1,
        ),
        Expectation("update dropped: no right answers", "right", "update dropped", below=0.05),
        Expectation("other tokenizer: no right answers", "right", "other tokenizer", below=0.05),
        Expectation("verify passes the healthy model", "found by verify", "as saved", below=0.5),
        *(
            Expectation(f"verify finds: {arm}", "found by verify", arm, above=0.5)
            for arm in (
                "8 bits", "4 bits", "merged into 4 bits", "update dropped", "other tokenizer",
            )
        ),
    ),
    shown=("right", "ended", "prose", "found by verify"),
    remark="Rounding once to 4 bits preserves what was learned here, perhaps because the errors of "
        "rounding have no common direction and short answers of a small model leave room for "
        "them. A merge into 4 bits loses it, and with it nearly every trace of the run: the "
        "update is added to a base on a 4-bit grid, the sum is rounded to that grid again, and "
        "the update is smaller than half a step of the grid. Verification refuses each of these "
        "models, and not by the hashes of the files alone. In seed 1, the predictions with 8 "
        "bits, with 4 bits, after the merge and without the update are 0.0001, 0.035, 1.1 and 1.1 "
        "nats from those of the trained model (2e-8 is allowed). With the other tokenizer, the "
        "predictions on the trained ids agree, but the ids of the rows differ.",
)  # fmt: skip
