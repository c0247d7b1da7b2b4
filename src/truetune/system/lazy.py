"""Libraries that are imported when they are first used: torch, which takes seconds to import, and
gguf, which comes with an extra.

`from truetune.system.lazy import torch` stands at the top of a module that may be loaded before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf as gguf
    import torch as torch
else:

    class _Lazy:
        """A module by its name."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            found = getattr(importlib.import_module(self._name), attribute)
            # Kept: the next use is as fast as that of a module.
            setattr(self, attribute, found)
            return found

    gguf, torch = _Lazy("gguf"), _Lazy("torch")
