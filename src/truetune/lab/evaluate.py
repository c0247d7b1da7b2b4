"""Count what a model knows and says about the world. Decoding is greedy.

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
from typing import TYPE_CHECKING

from truetune.behaviour.measure import whole
from truetune.compare import row_losses
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.contract.tokens import Tokens
from truetune.generate import Sampling, replies_to_ids
from truetune.lab import BASE_SEED
from truetune.lab.words import words
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, Fact, World, difference_fact, sum_fact

if TYPE_CHECKING:
    from truetune.model.load import LoadedModel

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
        """(right, all) over some relations; those that were not asked do not count."""
        pairs = [self.counts[name] for name in relations if name in self.counts]
        return sum(right for right, _ in pairs), sum(total for _, total in pairs)

    def line(self, relations: Iterable[str]) -> str:
        """The same as text."""
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


def cloze_recall(loaded: LoadedModel, items: Sequence[ClozeItem]) -> Recall:
    """Share of sentences that the model completes with the right value, with greedy decoding."""
    counts: dict[str, tuple[int, int]] = {}
    for item, is_right in zip(items, cloze_right(loaded, items), strict=True):
        right, total = counts.get(item.relation, (0, 0))
        counts[item.relation] = (right + is_right, total + 1)
    return Recall(counts)


def cloze_right(loaded: LoadedModel, items: Sequence[ClozeItem]) -> list[bool]:
    """For each sentence, whether the model completes it with the right value."""
    contract = PromptContract.load(loaded.tokenizer)
    # Each sentence begins a document, as in the corpus: after the end-of-text token. Without it a
    # sentence that begins with a digit may be the rest of one that was cut inside a number.
    end = loaded.tokenizer.eos_token_id
    prompts = [[end, *ids] for ids in contract.tokens.encode([item.prefix for item in items])]
    found = replies_to_ids(loaded, contract, prompts, Sampling(max_new_tokens=8), batch_size=128)
    return [
        re.match(rf"\s*{re.escape(item.expected)}(?![\w-])", reply.text) is not None
        for item, reply in zip(items, found, strict=True)
    ]


def held_out_documents(world: World, n: int = 100) -> list[str]:
    """Prose from another stream than the corpus: the same facts, other documents."""
    shipped = Path(__file__).parent / "held_out" / "prose.jsonl"
    texts = [json.loads(line)["text"] for line in shipped.read_text(encoding="utf-8").splitlines()]
    if world == World.generate(BASE_SEED) and n <= len(texts):
        return texts[:n]
    # Prose about another world, of which no base is shipped, is written when it is asked for.
    from truetune.lab.building.prose import documents

    return [document.text for document in islice(documents(world, "held-out"), n)]


def prose_examples(loaded: LoadedModel, texts: Sequence[str]) -> list[SFTExample]:
    """Whole documents, each ended by the end-of-text token: every token but the first counts."""
    end = loaded.tokenizer.eos_token_id
    return [whole([*ids, end]) for ids in Tokens(loaded.tokenizer).encode(texts)]


def prose_loss(loaded: LoadedModel, texts: Sequence[str]) -> float:
    """Loss in nats per token over whole documents."""
    examples = prose_examples(loaded, texts)
    sums = row_losses(loaded, [(e.ids, e.mask) for e in examples])
    return sum(sums) / sum(e.num_supervised for e in examples)
