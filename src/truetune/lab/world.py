"""The micro world: a small invented country whose every fact is known.

input   a seed
does    invents place, river, ruler and lake names by syllables and deals facts to them, with a
        private random stream, so that the same seed gives the same world on every machine
output  `World`: places, rivers, animals, crafts, opposites; `facts(subject)` for any of them

Because the world is invented, no model outside the lab knows it and a right answer is never luck
beyond one in the size of the pool. `prose.py` tells the facts; `evaluate.py` asks for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

PLACE_RELATIONS = ("river", "ruler", "animal", "craft", "food", "banner")
"""What is known of every place, one fact each."""

SECOND_LAYER = ("mouth", "diet", "coat", "material", "opposite")
"""What is known of the values: a river's lake, an animal's food and colour, a craft's material."""

MAX_ADDEND = 30
"""Sums run over a + b with both from 0 to this number; differences over a - b with b <= a."""


def words_of(text: str) -> tuple[str, ...]:
    """Words between spaces: a word list that reads as one."""
    return tuple(text.split())


# animal: (what it eats, its colour)
_ANIMALS = {
    "otter": ("fish", "brown"),
    "heron": ("frogs", "grey"),
    "badger": ("worms", "black"),
    "fox": ("rabbits", "red"),
    "owl": ("mice", "white"),
    "goat": ("thistles", "white"),
    "horse": ("hay", "brown"),
    "bear": ("honey", "black"),
    "wolf": ("deer", "grey"),
    "swan": ("weeds", "white"),
    "eagle": ("snakes", "golden"),
    "beaver": ("bark", "brown"),
    "squirrel": ("nuts", "red"),
    "raven": ("seeds", "black"),
    "hare": ("clover", "grey"),
    "donkey": ("oats", "grey"),
    "falcon": ("pigeons", "blue"),
    "turtle": ("lettuce", "green"),
    "lizard": ("flies", "green"),
    "camel": ("thorns", "yellow"),
    "lynx": ("hares", "golden"),
    "crane": ("snails", "white"),
    "hedgehog": ("beetles", "brown"),
    "salmon": ("shrimps", "pink"),
    "tiger": ("pigs", "orange"),
    "monkey": ("figs", "brown"),
    "panda": ("bamboo", "black"),
    "seal": ("squid", "grey"),
    "spider": ("moths", "black"),
    "parrot": ("berries", "green"),
    "ox": ("grass", "brown"),
    "mole": ("grubs", "black"),
    "flamingo": ("algae", "pink"),
    "canary": ("millet", "yellow"),
    "kingfisher": ("minnows", "blue"),
    "toad": ("crickets", "green"),
}

# craft: the material it works
_CRAFTS = {
    "weaving": "wool",
    "pottery": "clay",
    "carving": "wood",
    "tanning": "leather",
    "masonry": "stone",
    "glassblowing": "sand",
    "smithing": "iron",
    "baking": "flour",
    "brewing": "barley",
    "basketry": "willow",
    "embroidery": "silk",
    "printing": "paper",
    "roofing": "straw",
    "sailmaking": "canvas",
    "ropemaking": "hemp",
    "jewellery": "gold",
    "coinage": "silver",
    "tinkering": "tin",
    "plumbing": "lead",
    "hatmaking": "felt",
    "lacemaking": "linen",
    "shipbuilding": "oak",
    "fletching": "feathers",
    "tiling": "slate",
    "dyeing": "indigo",
    "cheesemaking": "milk",
    "beekeeping": "wax",
    "sculpture": "marble",
    "winemaking": "grapes",
    "soapmaking": "ash",
    "quilting": "cotton",
    "gilding": "brass",
}

_FOODS = words_of(
    "porridge chowder dumplings pancakes noodles sausages goulash risotto lentils waffles "
    "custard pickles omelettes kebabs ravioli pudding stew trout gingerbread marmalade "
    "pretzels cabbage mushrooms turnips oysters cheesecake curry lasagne meatballs plums "
    "chestnuts cucumbers pumpkins apricots radishes artichokes"
)

_BANNERS = words_of(
    "red blue green yellow white black grey brown purple orange pink silver scarlet crimson "
    "turquoise ivory amber maroon violet lilac copper olive azure coral"
)

_OPPOSITES = (
    "hot cold;big small;high low;fast slow;light dark;wet dry;young old;rich poor;strong weak;"
    "hard soft;long short;wide narrow;deep shallow;full empty;open closed;early late;"
    "loud quiet;happy sad;heavy weightless;clean dirty;sweet bitter;brave timid;near far;"
    "thick thin;rough smooth;sharp blunt;true false;right wrong;good bad;first last;up down;"
    "left starboard;inside outside;above below;before after;day night;summer winter;"
    "north south;east west;friend enemy;war peace;love hate;birth death;beginning end;"
    "giant dwarf;gain loss;success failure;victory defeat;truth lie;"
    "noise silence;give take;buy sell;push pull;win lose;laugh weep;remember forget;"
    "arrive depart;build destroy;rise fall;wake sleep;freeze melt"
)

_ONSETS = words_of("b br c cl d dr f fl g gr h j k l m n p pr qu r s sk st t th tr v w y z")
_VOWELS = words_of("a e i o u a e o ai")
_CODAS = words_of("l m n r s th nd rn st")
_PLACE_ENDS = words_of(
    "mora dell wick stead ford holm barrow mere vale gard haven loch combe thorpe brook "
    "minster port field crest moor ria une ova esk ast olm ira anth ulo eva"
)
_RIVER_ENDS = words_of("la mba ndra rne ssa lder nnow verl sk tha zel rro dd gan mble")
_RULER_ENDS = words_of("a an el en eth ia in is o on or us ild und ette ric")


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world: the `relation` of `subject` is `value`."""

    subject: str
    relation: str
    value: str


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

    @classmethod
    @lru_cache(maxsize=4)
    def generate(cls, seed: int = 7, num_places: int = 240) -> World:
        """The world of a seed; equal seeds give equal worlds."""
        rng = random.Random(seed)
        taken: list[str] = []
        places = _names(rng, num_places, _place_name, taken, apart=3)
        rivers = _names(rng, 40, _river_name, taken, apart=2)
        rulers = _names(rng, 60, _ruler_name, taken, apart=2)
        lakes = tuple(f"Lake {n}" for n in _names(rng, 12, _river_name, taken, apart=2))
        animals, crafts = tuple(_ANIMALS), tuple(_CRAFTS)
        foods, banners = _FOODS, _BANNERS
        opposites = tuple((a, b) for a, b in (pair.split() for pair in _OPPOSITES.split(";")))

        pools = dict(
            zip(PLACE_RELATIONS, (rivers, rulers, animals, crafts, foods, banners), strict=True)
        )
        dealt = {relation: _deal(rng, pool, num_places) for relation, pool in pools.items()}
        facts = [
            Fact(place, relation, dealt[relation][i])
            for i, place in enumerate(places)
            for relation in PLACE_RELATIONS
        ]
        facts += [
            Fact(r, "mouth", lake)
            for r, lake in zip(rivers, _deal(rng, lakes, len(rivers)), strict=True)
        ]
        for animal, (food, colour) in _ANIMALS.items():
            facts += [Fact(animal, "diet", food), Fact(animal, "coat", colour)]
        facts += [Fact(craft, "material", material) for craft, material in _CRAFTS.items()]
        for a, b in opposites:
            facts += [Fact(a, "opposite", b), Fact(b, "opposite", a)]
        return cls(
            seed=seed,
            places=places,
            rivers=rivers,
            rulers=rulers,
            lakes=lakes,
            animals=animals,
            crafts=crafts,
            foods=foods,
            banners=banners,
            opposites=opposites,
            all_facts=tuple(facts),
        )

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
        """The first layer: six facts for each place."""
        return tuple(f for f in self.all_facts if f.relation in PLACE_RELATIONS)


def _deal(rng: random.Random, pool: tuple[str, ...], count: int) -> list[str]:
    """Values in random order, each used equally often (to within one): no value is a good guess."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(pool, len(pool))
    return dealt[:count]


def _syllable(rng: random.Random, closed: float) -> str:
    coda = rng.choice(_CODAS) if rng.random() < closed else ""
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + coda


def _place_name(rng: random.Random) -> str:
    return (_syllable(rng, 0.6) + rng.choice(_PLACE_ENDS)).capitalize()


def _river_name(rng: random.Random) -> str:
    return (_syllable(rng, 0) + rng.choice(_RIVER_ENDS)).capitalize()


def _ruler_name(rng: random.Random) -> str:
    return (_syllable(rng, 0.8) + rng.choice(_RULER_ENDS)).capitalize()


def _names(
    rng: random.Random,
    count: int,
    make: Callable[[random.Random], str],
    taken: list[str],
    *,
    apart: int,
) -> tuple[str, ...]:
    """`count` new names, each at least `apart` edits from every name already in `taken`."""
    names: list[str] = []
    while len(names) < count:
        name = make(rng)
        if 4 <= len(name) <= 11 and all(edit_distance(name, other) >= apart for other in taken):
            names.append(name)
            taken.append(name)
    return tuple(names)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
