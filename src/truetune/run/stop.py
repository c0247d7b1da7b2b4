"""Let a signal end a run after the current step, or in the middle of an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from truetune.engine.parallel import Group
from truetune.engine.trainer import SFTTrainer
from truetune.system.signals import handled


@dataclass
class Stop:
    """Which signal asked a run to stop, if one did."""

    number: int | None = None


class BrokenOff(BaseException):
    """An evaluation was: the run is asked to stop."""


@contextlib.contextmanager
def interruptible(trainer: Callable[[], SFTTrainer | None], group: Group) -> Iterator[Stop]:
    """A signal ends the run after its step, or in the middle of an evaluation, which changes
    nothing and is repeated when the run goes on; a second Ctrl-C ends it at once. Of several
    processes none may leave an evaluation alone.

    Args:
        trainer: the one that works now; None while a run that goes back makes another.
    """
    stop = Stop()

    def ask(number: int) -> None:
        stop.number = number
        at_work = trainer()
        if at_work:
            at_work.stop_requested = True
            if at_work.evaluating and group.size == 1:
                raise BrokenOff

    with handled(ask):
        yield stop
