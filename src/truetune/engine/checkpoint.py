"""Trainer state on disk: what a resumed run needs beside the weights.

    CHECKPOINT/  trainer_state.safetensors   optimiser moments by parameter name, random state of
                                             each process
                 trainer_state.json          step, settings, size of every file (written last)
                 weights, tokenizer, ...     written by the model room before

The rows of a step depend on its number alone, so no data position is stored beside the step.
Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.compute import Limits
from truetune.engine.memory import get_random_state, set_random_state
from truetune.errors import CheckpointError
from truetune.run import write_json

if TYPE_CHECKING:
    import torch

    from truetune.engine.trainer import SFTTrainer

STATE_TENSORS = "trainer_state.safetensors"
STATE_FACTS = "trainer_state.json"
# Code books and scales of 8-bit moments: not of their parameter's shape.
_CODES = ("qmap1", "qmap2", "absmax1", "absmax2")


def gather_states(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """What each process of the run has of its own: random state and limits. All must call."""
    limits = asdict(trainer.limits) if trainer.limits else None
    return trainer.group.gather({"random": get_random_state(), "limits": limits})


def save_state(
    trainer: SFTTrainer,
    folder: Path,
    *,
    run: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the trainer's state into a checkpoint that already holds the weights.

    Args:
        run: what must be equal when the run resumes (data, batch size, schedule...).
        states: of `gather_states`; None where there is one process.
    """
    from safetensors.torch import save_file

    states = gather_states(trainer) if states is None else states
    save_file(_tensors(trainer, states), folder / STATE_TENSORS)
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    limits = [state["limits"] for state in states]
    facts = {"step": trainer.step, "run": dict(run), "limits": limits, "files": sizes}
    write_json(folder / STATE_FACTS, facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """Step and run of a checkpoint, its files checked by size.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    try:
        facts = json.loads((folder / STATE_FACTS).read_text(encoding="utf-8"))
        written = {name: int(size) for name, size in facts["files"].items()}
        sizes = {name: (folder / name).stat().st_size for name in written}
        int(facts["step"]), dict(facts["run"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint is incomplete: {error}",
            where=str(folder),
            fix="remove that folder and resume again: the checkpoint before it is used",
        ) from error
    damaged = sorted(name for name, size in sizes.items() if size != written[name])
    if damaged:
        raise CheckpointError(
            f"files of the checkpoint have another size than when written: {', '.join(damaged)}",
            where=str(folder),
            why="the disk was full, or the files were changed",
            fix="remove that folder and resume again: the checkpoint before it is used",
        )
    return facts


def load_state(trainer: SFTTrainer, folder: Path, *, run: Mapping[str, Any]) -> None:
    """Continue where a checkpoint stopped; the model must hold its weights already.

    Raises:
        CheckpointError: it is damaged, or belongs to a run with other data or settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = read_facts(folder)
    # As JSON holds it: a tuple comes back as a list.
    now = json.loads(json.dumps(dict(run), default=str))
    differing = {
        key: (facts["run"].get(key), value)
        for key, value in now.items()
        if facts["run"].get(key) != value
    }
    if differing:
        listed = "; ".join(
            f"{key}: {old!r} then, {new!r} now" for key, (old, new) in differing.items()
        )
        raise CheckpointError(
            f"the checkpoint belongs to a run with other settings: {listed}",
            where=str(folder),
            fix="resume with the same data and settings, or start a new run",
        )
    try:
        tensors = load_file(folder / STATE_TENSORS)
        _restore(trainer, tensors)
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint's trainer state cannot be used: {error}", where=str(folder)
        ) from error
    if limits := facts["limits"][trainer.group.rank]:
        # Lowered where memory ran out: the same cut, so that the same numbers are drawn and added.
        trainer.batcher.limits = Limits(**limits)  # type: ignore[attr-defined]
    trainer.step = facts["step"]


def _tensors(trainer: SFTTrainer, states: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    import torch

    tensors = {
        f"rng/{rank}/{i:04d}": drawn
        for rank, state in enumerate(states)
        for i, drawn in enumerate(state["random"])
    }
    for name, parameter in trainer.named_trainable:
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            # bitsandbytes shares its code books between parameters; safetensors shares nothing.
            tensors[f"optimizer/{key}/{name}"] = tensor.clone() if key in _CODES else tensor
    return tensors


def _restore(trainer: SFTTrainer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(trainer.named_trainable)
    stored = {key.split("/", 2)[2] for key in tensors if key.startswith("optimizer/")}
    if stored and stored != set(parameters):
        odd = sorted(stored ^ set(parameters))[:3]
        raise ValueError(f"its trainable parameters are not this run's, e.g. {', '.join(odd)}")
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, field, name = key.split("/", 2)
            parameter = parameters[name]
            if field not in _CODES and value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} was trained as {tuple(value.shape)}, and is {tuple(parameter.shape)}"
                )
            # AdamW keeps its step counter where the fused kernel wants it: beside the parameter.
            # bitsandbytes counts in an int of Python.
            counter = not value.ndim and not value.is_floating_point()
            trainer.optimizer.state[parameter][field] = (
                int(value) if counter else value.to(parameter.device)
            )
    own = f"rng/{trainer.group.rank}/"
    set_random_state([v for k, v in sorted(tensors.items()) if k.startswith(own)])
