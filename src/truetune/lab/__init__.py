"""The lab: a micro world, a base model that was trained on nothing else, and measurements of both.

    world.py        what is true                        seed -> World
    evaluate.py     what a model knows and says         model, questions -> counts
    measure.py      all counts of a base at once        model -> Measurement
    quickstart.py   the base before and after fine-tuning
    reasoning.py    questions whose answer takes a step
    experiments/    claims about fine-tuning, one a module; catalogue.py names them
    bench.py        arms of an experiment, trained
    asked.py        what is counted of an arm
    experiment.py   expectations and verdicts; results.py runs, page.py shows
    words.py        the YAML files of word lists, as tuples of lines
    held_out/       wordings and prose that the corpus does not hold
    base/           the shipped model
    building/       what made it: corpus, tokenizer, pretraining, model card

Because the world is known, every claim about fine-tuning can be counted here.
"""

from __future__ import annotations

from pathlib import Path

from truetune.model.source import EMBEDDED_FOLDER

# Seed of the world that the shipped base has read about.
BASE_SEED = 7


def base_path() -> Path:
    """Folder of the shipped base model, as `from_pretrained` takes it."""
    return EMBEDDED_FOLDER
