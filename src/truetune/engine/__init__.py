"""Optimiser, schedule, checkpoint and resume, the loop."""

from truetune.engine.checkpoint import load_state, read_facts, save_state
from truetune.engine.optimizer import OPTIMIZERS
from truetune.engine.schedule import SCHEDULER_TYPES, SchedulerType
from truetune.engine.trainer import SFTTrainer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULER_TYPES",
    "SFTTrainer",
    "SchedulerType",
    "load_state",
    "read_facts",
    "save_state",
]
