"""Optimiser, schedule, checkpoint and resume, the loop."""

from truetune.engine.checkpoint import (
    Checkpoint,
    gather_states,
    last_good,
    load_state,
    read_facts,
    save_state,
)
from truetune.engine.memory import give_freed_pages_back, peak_bytes
from truetune.engine.optimizer import OPTIMIZERS
from truetune.engine.parallel import Group, joined
from truetune.engine.schedule import SCHEDULER_TYPES, SchedulerType
from truetune.engine.trainer import SFTTrainer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULER_TYPES",
    "Checkpoint",
    "Group",
    "SFTTrainer",
    "SchedulerType",
    "gather_states",
    "give_freed_pages_back",
    "joined",
    "last_good",
    "load_state",
    "peak_bytes",
    "read_facts",
    "save_state",
]
