"""Find out why a step had no finite loss or gradient, by computing its examples again, one by one.

input   the model as it was when the step stopped, before any weight moved
does    looks for weights that are no numbers, then for examples that have no loss alone, then
        whether those have one in float32
output  a sentence for the error, a fix, and the examples that caused it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from truetune.compare import row_losses
from truetune.contract.example import SFTExample
from truetune.model.load import LoadedModel
from truetune.system.lazy import torch


@dataclass(frozen=True)
class Cause:
    """Why, and what helps.

    Attributes:
        why, fix: as errors have them.
        rows: indices of the examples that are to blame; () if all are, or none alone.
    """

    why: str
    fix: str
    rows: tuple[int, ...] = ()


def find_cause(loaded: LoadedModel, examples: Mapping[int, SFTExample], step: int) -> Cause:
    """Tell the causes apart.

    Args:
        examples: of the step, by index.
        step: whose loss is no number; 1 for the first.
    """
    weights = _broken_weights(loaded)
    losses = {row: _loss(loaded, example) for row, example in examples.items()}
    guilty = tuple(row for row, loss in losses.items() if not math.isfinite(loss))
    if weights and step == 1:
        return Cause(
            f"{_some(weights)} contained values that were not finite before the first step",
            "download or save the model again: its weights are damaged",
            guilty,
        )
    if weights and len(guilty) == len(losses):
        return Cause(
            f"{_some(weights)} contain values that are not finite: an earlier step was too large, "
            "or the file contained them in places that no earlier row used",
            "lower --learning-rate, and inspect the model's weights",
        )
    if not guilty:
        return Cause(
            "every example of the step has a finite loss alone, so the gradient overflowed: the "
            "learning rate of the previous steps was too high, or two rows together are extreme",
            "lower --learning-rate, or add warm-up steps",
        )
    if not weights and _finite_in_float32(loaded, [examples[row] for row in guilty]):
        return Cause(
            f"{loaded.compute_dtype} overflows on {len(guilty)} of the step's {len(losses)} "
            "examples; in float32 their loss is finite",
            "use --dtype float32",
            guilty,
        )
    if len(guilty) < len(losses):
        held = f"; {_some(weights)} contain values that are not finite" if weights else ""
        return Cause(
            f"{len(guilty)} of the step's {len(losses)} examples do not have a finite loss when "
            f"computed alone; the others do{held}",
            "inspect these rows and the embeddings of their tokens, or remove the rows",
            guilty,
        )
    return Cause(
        "no example of the step has a finite loss: the previous steps were too large",
        "lower --learning-rate; the last checkpoint is intact",
    )


def _broken_weights(loaded: LoadedModel) -> list[str]:
    named = loaded.model.named_parameters()
    return [name for name, p in named if p.dtype.is_floating_point and not bool(p.isfinite().all())]


def _loss(loaded: LoadedModel, example: SFTExample) -> float:
    return row_losses(loaded, [(example.ids, example.mask)])[0]


def _finite_in_float32(loaded: LoadedModel, examples: list[SFTExample]) -> bool:
    """False as well if it cannot be asked: the weights themselves are of fewer bits."""
    held = {p.dtype for p in loaded.model.parameters() if p.dtype.is_floating_point}
    if loaded.compute_dtype is None or held != {torch.float32}:
        return False
    exact = replace(loaded, compute_dtype=None)
    return all(math.isfinite(_loss(exact, example)) for example in examples)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
    return names[0] + more
