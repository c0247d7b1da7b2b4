"""Measure everything about a base at once: a model folder -> `Measurement`, as values and as a
table."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import UsageError
from truetune.lab import BASE_SEED, base_path
from truetune.lab.evaluate import (
    ClozeItem,
    Recall,
    cloze_item,
    cloze_items,
    cloze_recall,
    held_out_documents,
    prose_loss,
)
from truetune.lab.world import MAX_ADDEND, World, difference_fact, sum_fact
from truetune.run_dir import opened

# Wordings held out of the corpus: of its own kind; such as it was mended by; by another hand,
# neither with sight of the other, which ask for somebody else's English as well.
SETS = ("plain", "development", "blind")

_ARITHMETIC = ("sum", "difference")
_TOPS = (9, 20, MAX_ADDEND)


@dataclass(frozen=True)
class Measurement:
    """What a model knows.

    Attributes:
        recall: on each set of held-out wordings, by its name.
        sums: (right, all) of "a plus b is" and "a minus b is", as the corpus has it too.
        prose_loss: nats per token on documents from another stream than the corpus.
    """

    recall: dict[str, Recall]
    sums: dict[str, tuple[int, int]]
    prose_loss: float

    def __repr__(self) -> str:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join([*(line.rstrip() for line in lines), "", *self.lines()])

    def table(self) -> list[list[str]]:
        """Rows of text: a heading, the relations, then facts, sums and all together."""
        relations = dict.fromkeys(name for found in self.recall.values() for name in found.counts)
        rows = {name: [name] for name in relations}
        rows["all facts"] = [name for name in relations if name not in _ARITHMETIC]
        rows["all sums and differences"] = [name for name in relations if name in _ARITHMETIC]
        rows["all"] = [*relations]
        return [["recall", *self.recall]] + [
            [label, *(found.line(chosen) for found in self.recall.values())]
            for label, chosen in rows.items()
            if chosen
        ]

    def lines(self) -> list[str]:
        """The other counts, a line each."""
        counts = [f"{name}: {right} of {total}" for name, (right, total) in self.sums.items()]
        return [*counts, f"loss on held-out prose: {self.prose_loss:.3f} nats per token"]

    def facts(self) -> dict[str, Any]:
        """For programs: every count as {"right", "of"}."""

        def counts(found: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
            return {name: {"right": right, "of": total} for name, (right, total) in found.items()}

        return {
            "recall": {name: counts(found.counts) for name, found in self.recall.items()},
            "sums": counts(self.sums),
            "prose_loss": self.prose_loss,
        }


def measure(
    model: str | Path | None = None,
    *,
    wordings: str = "all",
    seed: int = BASE_SEED,
    num_items: int | None = None,
    device: str = "cpu",
) -> Measurement:
    """Measure a saved model in float32, greedily: the same folder gives the same counts.

    Args:
        model: a base, or a run made of one; the embedded base where None.
        wordings: a name in `SETS`, or all.
        seed: of the world that the model has read about.
        num_items: cloze items of each set, and sums, to ask: a fixed random choice; all where None.

    Raises:
        TruetuneError: unknown wordings, or a model that cannot be opened.
    """
    from truetune.model.load import load_model

    if wordings not in ("all", *SETS):
        raise UsageError(
            f"unknown wordings: {wordings}",
            where="wordings",
            fix=f"use one of {', '.join(SETS)}, or all",
            code="wordings-unknown",
        )
    folder = base_path() if model is None else opened(os.fspath(model))
    world = World.generate(seed)
    loaded = load_model(folder, device=device, dtype="float32", purpose="inference")

    def recall(items: Sequence[ClozeItem]) -> Recall:
        if num_items is not None and num_items < len(items):
            items = random.Random(seed).sample(items, num_items)
        return cloze_recall(loaded, items)

    return Measurement(
        {
            name: recall(cloze_items(world, wordings=name))
            for name in (SETS if wordings == "all" else (wordings,))
        },
        _sums_up_to(recall(_plain_sums())),
        prose_loss(loaded, held_out_documents(world)),
    )


def _plain_sums() -> list[ClozeItem]:
    """Every sum and difference that the corpus tells, cut before its value."""
    items = []
    for a in range(MAX_ADDEND + 1):
        for b in range(MAX_ADDEND + 1):
            facts = [(sum_fact(a, b), "{a} plus {b} is {v}", max(a, b))]
            if b <= a:
                facts.append((difference_fact(a, b), "{a} minus {b} is {v}", a))
            for fact, wording, largest in facts:
                top = next(top for top in _TOPS if largest <= top)
                items.append(cloze_item(fact, wording, f"{fact.relation} {top}"))
    return items


def _sums_up_to(found: Recall) -> dict[str, tuple[int, int]]:
    """Each count with those of the smaller numbers."""
    return {
        f"{relation}s of numbers up to {top}": found.of(
            f"{relation} {smaller}" for smaller in _TOPS if smaller <= top
        )
        for relation in _ARITHMETIC
        for top in _TOPS
    }
