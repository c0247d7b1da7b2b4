"""The lab: a micro world, prose about it, and a base model that has read nothing else.

    world.py      what is true                     seed -> World
    plain_wordings.py   the ways to say it at first   wordings a relation
    wordings.py, frames.py   all the ways to say it   patterns a relation, and around it
    development.py, blind.py   the ways in which the corpus never says it: for recall
    telling.py    one fact in one wording          Fact -> clause
    prose.py      the corpus                       World -> documents
    tokenizer.py  2,032 byte-level entries         texts -> tokenizer folder
    pretrain.py   the embedded base                seed -> model folder
    card.py       its model card and checksums     model folder -> README.md, SHA256SUMS
    evaluate.py   what a model knows and says      model -> counts
    measure.py    all counts of a base at once     model -> Measurement
    instructions.jsonl   hand-written questions and answers, all true in the world of seed 7
    base/         the shipped model

Because the world is known, every claim about fine-tuning can be counted here. Importing the lab
imports no torch.
"""

from __future__ import annotations

from pathlib import Path

BASE_SEED = 7
"""Seed of the world that the shipped base has read about."""


def base_path() -> Path:
    """Folder of the shipped base model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "base"
