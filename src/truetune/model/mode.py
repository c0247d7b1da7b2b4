"""Put a model into evaluation mode temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from truetune.system.lazy import torch


@contextlib.contextmanager
def mode_kept(model: torch.nn.Module) -> Iterator[None]:
    """Whatever is done inside, every module's own flag comes back: a part that somebody froze in
    evaluation mode stays there."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with mode_kept(model), torch.no_grad():
        model.eval()
        yield
