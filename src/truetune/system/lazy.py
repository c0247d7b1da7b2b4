"""torch, imported when it is first used: what needs no torch waits seconds for nothing.

`from truetune.system.lazy import torch` stands at the top of a module that may be loaded before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Lazy:
        """A module by its name; each use finds what the module has now."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch = _Lazy("torch")
