"""Where a run happened: versions, machine, command; and what it cannot run on."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from truetune.errors import UsageError

_PACKAGES = ("truetune", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


def environment() -> dict[str, Any]:
    """Facts for env.json. The command is kept; environment variables are not: they hold secrets."""
    import torch

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def refuse_many_processes() -> None:
    """One process trains; several would each train on their own and write the same files.

    Raises:
        UsageError: started by a launcher with more than one process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if size > 1:
        raise UsageError(
            f"truetune was started as {size} processes, and trains in one",
            why="WORLD_SIZE is set, as torchrun and accelerate launch do",
            fix="start it without a launcher",
            code="many-processes",
        )
