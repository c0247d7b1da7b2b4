"""What a model knows and says: a model and the world -> counts. Decoding is greedy.

Cloze in held-out wordings counts what a base knows; questions about places that no instruction
names, what fine-tuning brought out; loss on held-out prose, what it forgot.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from truetune.lab import BASE_SEED
from truetune.lab.words import words
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, Fact, World, difference_fact, sum_fact

INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"


@dataclass(frozen=True)
class Question:
    """A question about the world and the one value that answers it."""

    text: str
    expected: str
    fact: Fact


@dataclass(frozen=True)
class ClozeItem:
    """A sentence cut before its value."""

    prefix: str
    expected: str
    relation: str


@dataclass(frozen=True)
class Recall:
    """Right items over all: for each relation (right, all)."""

    counts: dict[str, tuple[int, int]]

    def of(self, relations: Iterable[str]) -> tuple[int, int]:
        """(right, all) over some relations; those that were not asked count nothing."""
        pairs = [self.counts[name] for name in relations if name in self.counts]
        return sum(right for right, _ in pairs), sum(total for _, total in pairs)

    def told(self, relations: Iterable[str]) -> str:
        """The same in words."""
        right, total = self.of(relations)
        return f"{right:,} of {total:,} ({right / total:.1%})" if total else "not asked"

    @property
    def right(self) -> int:
        return self.of(self.counts)[0]

    @property
    def total(self) -> int:
        return self.of(self.counts)[1]

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.total if self.total else 0.0


def load_instructions() -> list[list[dict[str, str]]]:
    """The shipped hand-written conversations, one question and one answer each."""
    lines = INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def instructed_places(world: World) -> set[str]:
    """Places that the shipped instructions name anywhere."""
    texts = (message["content"] for messages in load_instructions() for message in messages)
    return set(re.findall(r"\w+", "\n".join(texts))) & set(world.places)


def unseen_questions(world: World, n: int = 100, seed: int = 0) -> list[Question]:
    """Questions about places that never occur in the instructions.

    Each place is asked about once before any comes again. The relations take turns; the wordings
    are those of the instructions.
    """
    rng = random.Random(f"{world.seed}/questions/{seed}")
    named = instructed_places(world)
    unseen = [place for place in world.places if place not in named]
    order = rng.sample(unseen, len(unseen))
    questions = []
    for i in range(n):
        # The next round over the same places asks each of them for another relation.
        place_number, round_number = i % len(order), i // len(order)
        place = order[place_number]
        relation = PLACE_RELATIONS[(place_number + round_number) % len(PLACE_RELATIONS)]
        fact = Fact(place, relation, world.value(place, relation))
        text = rng.choice(words("questions")[relation]).format(s=place)
        questions.append(Question(text, fact.value, fact))
    return questions


def fact_correct(answer: str, expected: str) -> bool:
    """Whether the expected value stands in the answer as whole words, in the same case."""
    return re.search(rf"(?<![\w-]){re.escape(expected)}(?![\w-])", answer) is not None


def cloze_item(fact: Fact, wording: str, relation: str | None = None) -> ClozeItem:
    """A fact in a wording, cut just before its value (no trailing space).

    Raises:
        ValueError: the value is not the wording's last word.
    """
    before = wording.removesuffix("{v}").rstrip()
    if before == wording:
        raise ValueError(f"not a wording that ends with its value: {wording!r}")
    a, _, b = fact.subject.partition(" + " if fact.relation == "sum" else " - ")
    text = before.format(s=fact.subject, a=a, b=b)
    return ClozeItem(text[0].upper() + text[1:], fact.value, relation or fact.relation)


def cloze_items(
    world: World, num_sums: int = 200, seed: int = 0, wordings: str = "plain"
) -> list[ClozeItem]:
    """One held-out wording for each fact of the world, and for `num_sums` sums and differences.

    Args:
        wordings: a file of `held_out/`: plain, development or blind.
    """
    rng = random.Random(f"{world.seed}/cloze/{seed}")
    ways = words(f"held_out/{wordings}")
    facts = list(world.all_facts)
    for i in range(num_sums):
        a, b = sorted((rng.randint(0, MAX_ADDEND), rng.randint(0, MAX_ADDEND)), reverse=True)
        facts.append(difference_fact(a, b) if i % 2 else sum_fact(*rng.sample((a, b), 2)))
    return [cloze_item(fact, rng.choice(ways[fact.relation])) for fact in facts]


def cloze_recall(model: Any, tokenizer: Any, items: Sequence[ClozeItem]) -> Recall:
    """Share of sentences that the model, decoding greedily, goes on with the right value."""
    counts: dict[str, tuple[int, int]] = {}
    for item, is_right in zip(items, cloze_right(model, tokenizer, items), strict=True):
        right, total = counts.get(item.relation, (0, 0))
        counts[item.relation] = (right + is_right, total + 1)
    return Recall(counts)


def cloze_right(model: Any, tokenizer: Any, items: Sequence[ClozeItem]) -> list[bool]:
    """Of each sentence, whether it is gone on with the right value."""
    # Each sentence begins a document, as in the corpus: after the end-of-text token. Without it a
    # sentence that begins with a digit may be the rest of one that was cut inside a number.
    prompts = [tokenizer.eos_token + item.prefix for item in items]
    written = greedy(model, tokenizer, prompts, max_new_tokens=8)
    return [
        re.match(rf"\s*{re.escape(item.expected)}(?![\w-])", text) is not None
        for item, text in zip(items, written, strict=True)
    ]


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy continuations up to the end of text, in the order of the prompts."""
    import torch

    rows = [tokenizer.encode(text, add_special_tokens=False) for text in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    written: dict[int, str] = {}
    while order:
        # Prompts of one length share a batch, so that nothing is padded and no mask is needed.
        width = len(rows[order[0]])
        batch = [i for i in order[:batch_size] if len(rows[i]) == width]
        order = order[len(batch) :]
        ids = torch.tensor([rows[i] for i in batch], device=model.device)
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        for i, text in zip(batch, tokenizer.batch_decode(output[:, width:]), strict=True):
            written[i] = text.partition(tokenizer.eos_token)[0]
    return [written[i] for i in range(len(rows))]


def held_out_documents(world: World, n: int = 100) -> list[str]:
    """Prose from another stream than the corpus: the same facts, other documents."""
    shipped = Path(__file__).parent / "held_out" / "prose.jsonl"
    texts = [json.loads(line)["text"] for line in shipped.read_text(encoding="utf-8").splitlines()]
    if world == World.generate(BASE_SEED) and n <= len(texts):
        return texts[:n]
    # Prose about another world, of which no base is shipped, is written when it is asked for.
    from truetune.lab.building.prose import documents

    return [document.text for document in islice(documents(world, "held-out"), n)]


def prose_loss(model: Any, tokenizer: Any, texts: Iterable[str], batch_size: int = 8) -> float:
    """Loss in nats per token over whole documents, each ended by the end-of-text token.

    The first token of a document has no predictor and is not counted.
    """
    import torch

    eos = tokenizer.eos_token_id
    rows = [[*tokenizer.encode(text, add_special_tokens=False), eos] for text in texts]
    if not rows:
        raise ValueError("prose_loss needs at least one document")
    rows.sort(key=len)
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = len(batch[-1])
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in batch])
        targets = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in batch])
        with torch.no_grad():
            logits = model(ids.to(model.device)).logits[:, :-1].float().cpu()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
        ).item()
        count += sum(len(row) - 1 for row in batch)
    return total / count
