"""All counts of a base at once: what `truetune lab evaluate` prints and the model card says.

input   a model folder
does    opens it as any user would; recall in plain, development and blind wordings, all sums
        as the corpus has them, loss on held-out prose
output  `Measurement`, as values and as a table
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.lab.blind import BLIND
from truetune.lab.development import DEVELOPMENT, PLAIN
from truetune.lab.evaluate import (
    ClozeItem,
    Recall,
    cloze_items,
    cloze_recall,
    held_out_documents,
    prose_loss,
)
from truetune.lab.telling import difference_fact, sum_fact, tell
from truetune.lab.world import MAX_ADDEND, World

SETS = {"plain": PLAIN, "development": DEVELOPMENT, "blind": BLIND}
"""Wordings held out of the corpus, by name: of its own kind; such as it was mended by; by another
hand, neither with sight of the other, which ask for somebody else's English as well."""

_ARITHMETIC = ("sum", "difference")


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
        facts = [name for name in relations if name not in _ARITHMETIC]
        sums = [name for name in relations if name in _ARITHMETIC]
        rows = [["recall", *self.recall]]
        for label, chosen in (
            *((name, [name]) for name in relations),
            ("all facts", facts),
            ("all sums and differences", sums),
            ("all", [*relations]),
        ):
            if chosen:
                rows.append([label, *(found.told(chosen) for found in self.recall.values())])
        return rows

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
    folder: str | Path,
    *,
    sets: Sequence[str] = tuple(SETS),
    seed: int = 7,
    num_items: int | None = None,
    device: str = "cpu",
) -> Measurement:
    """Measure a saved model in float32, greedily: the same folder gives the same counts.

    Args:
        folder: a base, or what was made of one.
        sets: names in `SETS`.
        seed: of the world that the model has read about.
        num_items: cloze items of each set, and sums, to ask: a fixed random choice; all where None.
    """
    from truetune.model.load import load_model

    world = World.generate(seed)
    loaded = load_model(folder, device=device, dtype="float32", purpose="inference")
    model, tokenizer = loaded.model, loaded.tokenizer

    def asked(items: list[ClozeItem]) -> list[ClozeItem]:
        if num_items is None or num_items >= len(items):
            return items
        return random.Random(seed).sample(items, num_items)

    recall = {
        name: cloze_recall(model, tokenizer, asked(cloze_items(world, wordings=SETS[name])))
        for name in sets
    }
    sums = _count_sums(model, tokenizer, asked(_plain_sums()))
    return Measurement(recall, sums, prose_loss(model, tokenizer, held_out_documents(world)))


def _plain_sums() -> list[ClozeItem]:
    """Every sum and difference that the corpus tells, cut before its value."""
    items = []
    for a in range(MAX_ADDEND + 1):
        for b in range(MAX_ADDEND + 1):
            facts = [(sum_fact(a, b), "{a} plus {b} is {v}", max(a, b))]
            if b <= a:
                facts.append((difference_fact(a, b), "{a} minus {b} is {v}", a))
            for fact, wording, largest in facts:
                upto = next(top for top in (9, 20, MAX_ADDEND) if largest <= top)
                prefix = tell(fact, wording).removesuffix(fact.value).rstrip()
                items.append(ClozeItem(prefix, fact.value, f"{fact.relation} {upto}"))
    return items


def _count_sums(
    model: Any, tokenizer: Any, items: Sequence[ClozeItem]
) -> dict[str, tuple[int, int]]:
    counts = cloze_recall(model, tokenizer, items).counts
    found = {}
    for relation in _ARITHMETIC:
        right = total = 0
        for top in (9, 20, MAX_ADDEND):
            more = counts.get(f"{relation} {top}", (0, 0))
            right, total = right + more[0], total + more[1]
            found[f"{relation}s of numbers up to {top}"] = (right, total)
    return found
