"""Where a run happened: versions, machine, command."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from truetune.system.lazy import torch

_PACKAGES = (
    "truetune",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "liger-kernel",
)


def environment() -> dict[str, Any]:
    """Facts for env.json. The command is kept; environment variables are not: they hold secrets."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # A wheel for CUDA names its build here alone: 2.11.0+cu130.
        "versions": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
