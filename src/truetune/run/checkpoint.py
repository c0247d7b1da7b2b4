"""A checkpoint on disk: weights as an artifact that transformers or peft opens, beside them the
trainer's state; the folder gets its name when all of it is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.engine.checkpoint import save_state
from truetune.engine.trainer import SFTTrainer
from truetune.errors import SaveError, TruetuneError
from truetune.model.load import LoadedModel
from truetune.model.save import save_model
from truetune.run_dir import flush_folder


def write_checkpoint(
    folder: Path,
    trainer: SFTTrainer,
    loaded: LoadedModel,
    contract: PromptContract,
    identity: dict[str, Any],
    states: Any,
    again: str,
) -> None:
    """Write it, or nothing.

    Args:
        folder: which does not exist yet.
        identity: what must be equal for it to be continued exactly.
        states: of all processes, see `gather_states`.
        again: the command that goes on from the checkpoint before.

    Raises:
        SaveError: the disk is full, or the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        report = save_model(loaded, contract, partial)
        hashes = {file.name: file.sha256 for file in report.files}
        save_state(trainer, partial, run=identity, states=states, hashes=hashes)
        os.replace(partial, folder)
        flush_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, TruetuneError) or not isinstance(error, Exception):
            raise
        # safetensors has an exception of its own for a full disk.
        raise SaveError(
            f"the checkpoint could not be saved: {error}",
            where=str(folder),
            why=f"{type(error).__name__} while writing; earlier checkpoints are intact",
            fix=f"free some space, then {again}",
        ) from error
