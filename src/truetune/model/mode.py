"""Put a model into evaluation mode temporarily, and draw numbers that leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

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


def random_state_kept() -> AbstractContextManager[Any]:
    """Inside, seeds may be set: outside, random numbers go on as before. Of the CPU and the device
    in use; torch's default opens every GPU of the machine, and warns of it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    kept: AbstractContextManager[Any] = torch.random.fork_rng(devices=devices)
    return kept
