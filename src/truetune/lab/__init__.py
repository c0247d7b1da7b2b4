"""The lab: a micro world, prose about it, and a base model that has read nothing else.

    world.py      what is true                     seed -> World
    wordings.py   the ways to say it               templates a relation
    blind.py      the ways it is never said, for recall
    prose.py      the corpus                       World -> documents
    tokenizer.py  2,032 byte-level entries         texts -> tokenizer folder
    pretrain.py   the embedded base                seed -> model folder
    card.py       its model card and checksums     model folder -> README.md, SHA256SUMS
    evaluate.py   what a model knows and says      model -> counts
    instructions.jsonl   hand-written questions and answers, all true in the world of seed 7
    base/         the shipped model

Because the world is known, every claim about fine-tuning can be counted here. Importing the lab
imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from truetune.lab.world import Fact, World

__all__ = ["BASE_SEED", "Fact", "World", "base_path"]

BASE_SEED = 7
"""Seed of the world that the shipped base has read about."""


def base_path() -> Path:
    """Folder of the shipped base model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "base"
