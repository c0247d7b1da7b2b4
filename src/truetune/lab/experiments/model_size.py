"""Train a base of six layers and one of three on the same rows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from truetune.lab import base_path
from truetune.lab.asked import ask, ending_loss, prose, questions, recall, rows
from truetune.lab.bench import Arm, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment
from truetune.lab.world import World

_SIZES = (5, 20, 50)
_KEPT = (0, 2, 5)
_DOCUMENTS = 1200
_PRETRAINING = {"learning_rate": 1e-3, "max_steps": 400, "batch_size": 4}


def three_layers(folder: Path) -> None:
    """The base without every other of its layers, before it is trained further."""
    from safetensors.torch import load_file, save_file

    base = base_path()
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = len(_KEPT)
    kept = {}
    for name, weight in load_file(base / "model.safetensors").items():
        found = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
        if found is None:
            kept[name] = weight
        elif int(found[2]) in _KEPT:
            kept[f"{found[1]}{_KEPT.index(int(found[2]))}{found[3]}"] = weight
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)


def _small() -> Arm:
    """Three layers, trained on fresh prose through the pipeline, as any text is."""
    from truetune.lab.building.prose import documents

    texts = [
        {"text": document.text}
        for document in islice(documents(World.generate(), "lab/small"), _DOCUMENTS)
    ]
    return Arm("3 layers", rows=texts, recipe=_PRETRAINING, build=three_layers)


def arms(seed: int) -> Sequence[Arm]:
    small = _small()
    return (
        Arm("6 layers"),
        small,
        *(Arm(f"6 layers, {n} rows", rows=rows(n, seed)) for n in _SIZES),
        *(Arm(f"3 layers, {n} rows", rows=rows(n, seed), start=small) for n in _SIZES),
    )


def measure(tuned: Tuned) -> dict[str, Column]:
    heard = ask(tuned)
    return {
        "in form": Column.share(
            s.stopped and s.text.strip().startswith(f"The {q.fact.relation} of {q.fact.subject} is")
            for s, q in zip(heard.said, questions(), strict=True)
        ),
        "right": Column.share(heard.right),
        "recall in prose": recall(tuned),
        "prose": prose(tuned),
        "training loss": ending_loss(tuned),
    }


EXPERIMENT = Experiment(
    number=16,
    name="model-size",
    title="Two sizes of base",
    claim="Larger models need fewer examples.",
    source="the course's exercise on model size",
    exercises=("Model size",),
    setup="the rows are questions about places, answered in one sentence. The smaller base is the "
        "shipped one without every other layer, trained further on 1,200 fresh documents (400 "
        "steps of 4, at 1e-3). *In form* is the share of replies that end, and that begin with "
        "*The*, the requested relation, *of* and the place. Any value counts, so that a base that "
        "knows less has no disadvantage",
    expected="with 20 rows, and also with 5, the base with six layers answers in the right form "
        "more than 10 points more often than the base with three; with 50 rows, the two are "
        "within 10 points",
    refuted="a difference below 10 points with 20 rows, or one that is still above 10 points with "
        "50",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "5 rows: the larger is ahead",
            "in form", "6 layers, 5 rows", "3 layers, 5 rows", above=0.1,
        ),
        Expectation(
            "20 rows: the larger is ahead",
            "in form", "6 layers, 20 rows", "3 layers, 20 rows", above=0.1,
        ),
        Expectation(
            "50 rows: the two are equal",
            "in form", "6 layers, 50 rows", "3 layers, 50 rows", above=-0.1, below=0.1,
        ),
    ),
    shown=("in form", "right", "recall in prose", "prose"),
    remark="A lead of the larger base was not found. With 5 rows, the opposite was found: the "
        "smaller base is ahead by 2, 21 and 17 points in the three seeds. With 20 rows, it is "
        "ahead by 2, 9 and 10; the interval of the larger one's lead, from -15 to 1, lies below "
        "10, and so refutes a lead by 10 points; it includes 0, and so shows no lead of the "
        "smaller one either. With 50 rows, the two are level. The smaller base knows less (83 "
        "instead of 98 % of the sentences), but 5 rows lack something else: they hardly show that "
        "the answer depends on the requested relation. The replies of seed 2 were read: 74 of 100 "
        "replies of the larger base and 53 of the smaller state a relation other than the "
        "requested one, and nearly all of these statements are true. 84 replies of the larger base "
        "are about the animal, as are two of its five rows. There are three possible reasons. The "
        "larger base fits so few rows more closely (training loss 0.002 instead of 0.003), and "
        "with them what they happen to have in common. The smaller base was trained further just "
        "before, and the larger one was not, so this experiment cannot distinguish size from "
        "recent training. And three and six layers are of the same order of size, while the claim "
        "is about several orders.",
)  # fmt: skip
