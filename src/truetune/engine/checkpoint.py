"""Trainer state on disk: what a resumed run needs beside the weights.

    CHECKPOINT/  trainer_state.safetensors   optimizer moments by parameter name, random state of
                                             each process
                 trainer_state.json          step, settings, sha256 of every file and of itself
                                             (written last)
                 weights, tokenizer, ...     written by the model room before

The rows of a step depend on its number alone, so no data position is stored beside the step.
Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from truetune.compute.batch import Limits
from truetune.engine.memory import get_random_state, set_random_state
from truetune.errors import CheckpointError
from truetune.findings import Finding
from truetune.run_dir import STEP, read_sealed, settle, sha256, write_sealed
from truetune.system.lazy import torch

if TYPE_CHECKING:
    from truetune.engine.trainer import SFTTrainer

STATE_TENSORS = "trainer_state.safetensors"
STATE_FACTS = "trainer_state.json"
# Code books and scales of 8-bit moments: not of their parameter's shape.
_CODES = ("qmap1", "qmap2", "absmax1", "absmax2")


def gather_states(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """Gather the state that differs between processes: random state and limits. All processes must
    call this."""
    limits = asdict(trainer.limits) if trainer.limits else None
    return trainer.group.gather({"random": get_random_state(), "limits": limits})


def save_state(
    trainer: SFTTrainer,
    folder: Path,
    *,
    run: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Write the trainer's state into a checkpoint that already holds the weights.

    Args:
        run: what must be equal when the run resumes (data, batch size, schedule...).
        states: of `gather_states`; None if there is one process.
        hashes: sha256 by name of files that are on the disk already, as `save_model` reports them.
    """
    from safetensors.torch import save_file

    states = gather_states(trainer) if states is None else states
    save_file(_tensors(trainer, states), folder / STATE_TENSORS)
    known = dict(hashes or {})
    files = {
        name: {"bytes": path.stat().st_size, "sha256": known.get(name) or settle(path)}
        for name, path in _files(folder).items()
    }
    limits = [state["limits"] for state in states]
    facts = {"step": trainer.step, "run": dict(run), "limits": limits, "files": files}
    write_sealed(folder / STATE_FACTS, facts)


def _files(folder: Path) -> dict[str, Path]:
    """What a checkpoint holds beside its facts, by name; hidden files are the file system's."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: path
        for name, path in found.items()
        if not path.is_dir() and name != STATE_FACTS and not path.name.startswith(".")
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """Step and run of a checkpoint, every byte of its files checked.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    try:
        facts, whole = read_sealed(folder / STATE_FACTS)
        written = {name: str(file["sha256"]) for name, file in facts["files"].items()}
        int(facts["step"]), dict(facts["run"]), list(facts["limits"])
        differing = [] if whole else [STATE_FACTS]
        there = _files(folder)
        missing = sorted(written.keys() - there.keys())
        differing += [
            name
            for name, path in there.items()
            if name in written and sha256(path) != written[name]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"the checkpoint is incomplete: {error}") from error
    if missing:
        raise _damaged(folder, f"the checkpoint is incomplete: it lacks {', '.join(missing)}")
    if differing:
        raise _damaged(
            folder,
            f"files of the checkpoint were changed after they were written: {', '.join(differing)}",
            "the disk lost or corrupted data, or the files were changed",
        )
    if added := sorted(there.keys() - written.keys()):
        raise _damaged(
            folder,
            f"the checkpoint contains files that were not written with it: {', '.join(added)}",
            "they were added later, and a library might load them",
        )
    return facts


def _damaged(folder: Path, what: str, why: str = "") -> CheckpointError:
    return CheckpointError(
        what,
        where=str(folder),
        why=why,
        fix="remove that folder and resume again: the run continues from the previous "
        "checkpoint, or from the start",
        code="checkpoint-damaged",
    )


class Checkpoint(NamedTuple):
    """A checkpoint whose files were checked, and its `read_facts`."""

    folder: Path
    facts: dict[str, Any]


def last_good(folders: Sequence[Path]) -> tuple[Checkpoint | None, list[Finding]]:
    """The last of a run's checkpoints, or the one before it where that one is damaged.

    Args:
        folders: oldest first.

    Returns:
        None if there is no checkpoint; a warning for each one that is damaged.

    Raises:
        CheckpointError: all of them are.
    """
    damage: list[CheckpointError] = []
    for folder in reversed(folders):
        try:
            good = Checkpoint(folder, read_facts(folder))
            _require_own_name(good)
        except CheckpointError as error:
            damage.append(error)
            continue
        return good, [_passed_over(error, good) for error in damage]
    if damage:
        raise damage[0]
    return None, []


def _require_own_name(checkpoint: Checkpoint) -> None:
    """Refuse a folder whose name is not its step: two complete folders may have exchanged their
    names."""
    folder, step = checkpoint.folder, checkpoint.facts["step"]
    named = folder.name.removeprefix(STEP)
    if not named.isdecimal() or int(named) != step:
        raise _damaged(
            folder,
            f"the checkpoint is of step {step}, which differs from its folder's name",
            "the folder was renamed, or copied from elsewhere",
        )


def _passed_over(error: CheckpointError, good: Checkpoint) -> Finding:
    return Finding(
        "checkpoint-damaged",
        "warning",
        f"{error.what}; the run continues from step {good.facts['step']} instead",
        where=error.where,
        why=error.why or "the disk was full, or files were removed",
        fix="nothing to do: the steps in between are repeated with identical results; if it "
        "happens again, test the machine's disk and memory",
    )


def load_state(
    trainer: SFTTrainer,
    folder: Path,
    *,
    run: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Continue where a checkpoint stopped; the model must hold its weights already.

    Args:
        facts: of `read_facts`, where the folder was checked before.

    Raises:
        CheckpointError: it is damaged, or belongs to a run with other data or settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = facts or read_facts(folder)
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
                    f"{name} was trained with shape {tuple(value.shape)}, but now has "
                    f"{tuple(parameter.shape)}"
                )
            # AdamW keeps its step counter where the fused kernel wants it: beside the parameter.
            # bitsandbytes counts in an int of Python.
            counter = not value.ndim and not value.is_floating_point()
            trainer.optimizer.state[parameter][field] = (
                int(value) if counter else value.to(parameter.device)
            )
    own = f"rng/{trainer.group.rank}/"
    set_random_state([v for k, v in sorted(tensors.items()) if k.startswith(own)])
