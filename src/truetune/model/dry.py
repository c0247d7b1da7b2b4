"""Try loading a model's weights without allocating memory for them.

input   a model folder with weights
does    has transformers load it onto the meta device, where tensors have names and shapes only;
        reads a piece of every tensor of the files
output  DryLoad: what is missing, unexpected or of another shape; tensors that are broken
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from truetune.model.architecture import causal_config
from truetune.model.source import ModelFiles
from truetune.model.weights import first_rows, look_at_numbers, read_headers, weight_files
from truetune.model.whole import without_memory
from truetune.system.lazy import torch


@dataclass(frozen=True)
class DryLoad:
    """How the weight files and the config fit together.

    Attributes:
        missing: weights of the model that no file has: loading fills them with random numbers.
        unexpected: tensors of the files that the model has no place for.
        reshaped: (name, shape in the file, shape in the model).
        not_finite: tensors that hold NaN or infinity.
        zero: matrices that hold nothing but zeros.
        head_differs: the config ties the head to the embedding, and the files hold a head that is
            another table.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    not_finite: tuple[str, ...]
    zero: tuple[str, ...]
    head_differs: bool


def dry_load(files: ModelFiles) -> DryLoad | None:
    """Load without memory; None if that says nothing (a quantised model needs its library).

    Raises:
        ModelError: no weights, or damaged ones.
    """
    config = causal_config(files)
    stored = read_headers(weight_files(files))
    loaded = without_memory(files, config)
    if loaded is None:
        return None
    model, info = loaded
    missing = set(info["missing_keys"]) - set(model.all_tied_weights_keys)
    unexpected = set(info["unexpected_keys"])
    odd = unexpected | {name for name, _, _ in info["mismatched_keys"]}
    broken, zero = look_at_numbers(weight_files(files))
    return DryLoad(
        tuple(sorted(missing)),
        tuple(sorted(unexpected)),
        tuple((name, tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]),
        broken,
        tuple(name for name in zero if name not in odd),
        _tables_differ(files, _declared_ties(model, config), set(stored)),
    )


def _declared_ties(model: Any, config: Any) -> Mapping[str, str]:
    """name -> the table that it shares, as the config says; loading unties those that differ."""
    ties = getattr(type(model), "_tied_weights_keys", None)
    tied = config.get_text_config(decoder=True).tie_word_embeddings
    return ties if tied and isinstance(ties, Mapping) else {}


def _tables_differ(files: ModelFiles, tied: Mapping[str, str], stored: set[str]) -> bool:
    """Whether two tables that are said to be one are in the files with other numbers."""
    from safetensors import safe_open

    for name, other in tied.items():
        if not {name, other} <= stored:
            continue
        pieces = []
        for wanted in (name, other):
            for path in weight_files(files):
                with safe_open(path, framework="pt") as file:
                    if wanted in file.keys():  # noqa: SIM118
                        pieces.append(first_rows(file.get_slice(wanted)))
        if len(pieces) == 2 and (
            pieces[0].shape != pieces[1].shape or not torch.equal(pieces[0], pieces[1])
        ):
            return True
    return False
