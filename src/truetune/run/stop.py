"""A signal ends a run after its step, or in the middle of an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from truetune.engine.parallel import Group
from truetune.engine.trainer import SFTTrainer
from truetune.system.signals import told


@dataclass
class Stop:
    """Which signal asked a run to stop, if one did."""

    number: int | None = None


class BrokenOff(BaseException):
    """An evaluation was: the run is asked to stop."""


@contextlib.contextmanager
def interruptible(trainer: Callable[[], SFTTrainer], group: Group) -> Iterator[Stop]:
    """A signal ends the run after its step, or in the middle of an evaluation, which changes
    nothing and is repeated when the run goes on; a second Ctrl-C ends it at once. Of several
    processes none may leave an evaluation alone.

    Args:
        trainer: the one that works now; a run that goes back gets another.
    """
    stop = Stop()

    def ask(number: int) -> None:
        stop.number = number
        trainer().stop_requested = True
        if trainer().evaluating and group.size == 1:
            raise BrokenOff

    with told(ask):
        yield stop
