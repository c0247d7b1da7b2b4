"""The micro world: a seed -> every fact of a small invented country.

The country is invented, so no model outside the lab knows it, and a lucky guess is as likely as one
in the size of the pool.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

from truetune.lab import BASE_SEED
from truetune.lab.words import words

# What is known of every place, one fact each.
PLACE_RELATIONS = ("river", "ruler", "animal", "craft", "food", "banner")

# Sums run over a + b with both from 0 to this number; differences over a - b with b <= a.
MAX_ADDEND = 30


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world: the `relation` of `subject` is `value`."""

    subject: str
    relation: str
    value: str


def sum_fact(a: int, b: int) -> Fact:
    """a + b as a fact."""
    return Fact(f"{a} + {b}", "sum", str(a + b))


def difference_fact(a: int, b: int) -> Fact:
    """a - b as a fact (b <= a)."""
    return Fact(f"{a} - {b}", "difference", str(a - b))


@dataclass(frozen=True)
class World:
    """All names and facts. Build one with `World.generate(seed)`."""

    seed: int
    places: tuple[str, ...]
    rivers: tuple[str, ...]
    rulers: tuple[str, ...]
    lakes: tuple[str, ...]
    animals: tuple[str, ...]
    crafts: tuple[str, ...]
    foods: tuple[str, ...]
    banners: tuple[str, ...]
    opposites: tuple[tuple[str, str], ...]
    all_facts: tuple[Fact, ...]

    @staticmethod
    def generate(seed: int = BASE_SEED, num_places: int = 240) -> World:
        """The world of a seed; equal seeds give equal worlds on every machine."""
        return _generated(seed, num_places)

    @cached_property
    def _by_subject(self) -> dict[str, list[Fact]]:
        index: dict[str, list[Fact]] = {}
        for fact in self.all_facts:
            index.setdefault(fact.subject, []).append(fact)
        return index

    def facts(self, subject: str) -> list[Fact]:
        """Everything known of a place, river, animal, craft or word; KeyError if unknown."""
        return list(self._by_subject[subject])

    def value(self, subject: str, relation: str) -> str:
        """The one value of a relation; KeyError if the world does not know it."""
        for fact in self._by_subject[subject]:
            if fact.relation == relation:
                return fact.value
        raise KeyError(f"{subject} has no {relation}")

    @property
    def place_facts(self) -> tuple[Fact, ...]:
        """Six facts for each place."""
        return tuple(f for f in self.all_facts if f.relation in PLACE_RELATIONS)


@lru_cache(maxsize=4)
def _generated(seed: int, num_places: int) -> World:
    rng = random.Random(seed)
    taken: list[str] = []
    places = _names(rng, num_places, 0.6, "place_ends", taken, apart=3)
    rivers = _names(rng, 40, 0, "river_ends", taken, apart=2)
    rulers = _names(rng, 60, 0.8, "ruler_ends", taken, apart=2)
    lakes = tuple(f"Lake {n}" for n in _names(rng, 12, 0, "river_ends", taken, apart=2))
    nature = [line.split() for line in words("world")["animals"]]
    materials = [line.split() for line in words("world")["crafts"]]
    pairs = [line.split() for line in words("world")["opposites"]]
    animals, crafts = (tuple(entry[0] for entry in kind) for kind in (nature, materials))
    pools = (rivers, rulers, animals, crafts, _pool("foods"), _pool("banners"))
    dealt = [_deal(rng, pool, num_places) for pool in pools]
    facts = [
        Fact(place, relation, value)
        for place, values in zip(places, zip(*dealt, strict=True), strict=True)
        for relation, value in zip(PLACE_RELATIONS, values, strict=True)
    ]
    mouths = zip(rivers, _deal(rng, lakes, len(rivers)), strict=True)
    facts += [Fact(river, "mouth", lake) for river, lake in mouths]
    for animal, food, colour in nature:
        facts += [Fact(animal, "diet", food), Fact(animal, "coat", colour)]
    facts += [Fact(craft, "material", material) for craft, material in materials]
    for a, b in pairs:
        facts += [Fact(a, "opposite", b), Fact(b, "opposite", a)]
    opposites = tuple((a, b) for a, b in pairs)
    return World(seed, places, rivers, rulers, lakes, *pools[2:], opposites, tuple(facts))


def _pool(name: str) -> tuple[str, ...]:
    """A list of single words, of which a line holds several."""
    return tuple(" ".join(words("world")[name]).split())


def _deal(rng: random.Random, pool: tuple[str, ...], count: int) -> list[str]:
    """Values in random order, each used equally often (to within one): no value is a good guess."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(pool, len(pool))
    return dealt[:count]


def _names(
    rng: random.Random, count: int, closed: float, ends: str, taken: list[str], *, apart: int
) -> tuple[str, ...]:
    """`count` new names, each at least `apart` edits from every name already in `taken`.

    A name is a syllable, with a consonant behind it in a share of `closed`, and an ending.
    """
    onsets, vowels, codas, endings = map(_pool, ("onsets", "vowels", "codas", ends))
    names: list[str] = []
    while len(names) < count:
        coda = rng.choice(codas) if rng.random() < closed else ""
        name = rng.choice(onsets) + rng.choice(vowels) + coda + rng.choice(endings)
        name = name.capitalize()
        if 4 <= len(name) <= 11 and all(edit_distance(name, other) >= apart for other in taken):
            names.append(name)
            taken.append(name)
    return tuple(names)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's, in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
