"""Prose about the world: the pretraining corpus and the held-out documents.

input   a `World` and a stream name
does    draws documents of a few hundred tokens: portraits of places, mixed gazettes, comparisons,
        lists of one relation, rivers and animals, words, sums; wordings and order shuffled
output  an endless, deterministic stream of `Document`s; cloze sentences in held-out wordings

Nothing here asks or answers: no '?', no chat marker. Facts are dealt from shuffled decks, so every
fact is told equally often.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from truetune.lab.wordings import FILLERS, FORWARD, LEAD_INS, REPORTS, REVERSED, TITLES
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, Fact, World, words_of

T = TypeVar("T")

_ONES = words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = words_of("_ _ twenty thirty forty fifty sixty")
_CONNECTORS = (", and ", "; ", ", while ", ", and also ", ", but ")
_REVERSED_SHARE = 0.25
_REPORT_SHARE = 0.2
_JOINED_SHARE = 0.3


@dataclass(frozen=True)
class Telling:
    """A fact in one wording; `wording` is the template, `report` a frame around it or ''."""

    fact: Fact
    wording: str
    report: str = ""


Piece = Telling | str
"""What a paragraph is made of: a fact to tell, or a clause that tells none."""


@dataclass(frozen=True)
class Document:
    """A few paragraphs, and what they tell."""

    text: str
    tells: tuple[Telling, ...]


def documents(world: World, stream: str = "train") -> Iterator[Document]:
    """An endless stream of documents; the same world and stream name give the same documents."""
    writer = _Writer(world, random.Random(f"{world.seed}/{stream}"))
    while True:
        yield writer.document()


def number_word(n: int) -> str:
    """English for 0..69."""
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def sum_fact(a: int, b: int) -> Fact:
    """a + b as a fact."""
    return Fact(f"{a} + {b}", "sum", str(a + b))


def difference_fact(a: int, b: int) -> Fact:
    """a - b as a fact (b <= a)."""
    return Fact(f"{a} - {b}", "difference", str(a - b))


def tell(fact: Fact, wording: str, report: str = "") -> str:
    """The clause, capitalised, without a full stop."""
    if report:
        clause = _lowered(tell(fact, wording), wording)
        return report.format(s=fact.subject, clause=clause)
    if fact.relation not in ("sum", "difference"):
        text = wording.format(s=fact.subject, v=fact.value)
        return text[0].upper() + text[1:]
    a, _, b = fact.subject.split()
    word_a, word_b, word_v = (number_word(int(n)) for n in (a, b, fact.value))
    return wording.format(
        a=a, b=b, v=fact.value, A=word_a.capitalize(), b_word=word_b, v_word=word_v
    )


def _lowered(text: str, template: str) -> str:
    """The clause as it stands inside a sentence: names keep their capital."""
    if template[0] == "{" and not template.startswith("{A}"):
        return text
    return text[0].lower() + text[1:]


def held_out_prefix(fact: Fact, wording: str) -> str:
    """A held-out wording cut just before its value (no trailing space).

    Raises:
        ValueError: the corpus uses the wording, or the value is not its last word.
    """
    if wording in FORWARD[fact.relation] or not wording.endswith("{v}"):
        raise ValueError(f"not a held-out wording of {fact.relation}: {wording!r}")
    return tell(fact, wording).removesuffix(fact.value).rstrip()


class _Deck(Generic[T]):
    """Deals items in random order, all of them before any comes again."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self._items, self._rng = list(items), rng
        self._left: list[T] = []

    def deal(self, count: int = 1) -> list[T]:
        hand: list[T] = []
        while len(hand) < count:
            if not self._left:
                self._left = self._rng.sample(self._items, len(self._items))
            hand.append(self._left.pop())
        return hand


class _Writer:
    """Writes one document after another from one random stream."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.places = _Deck(world.places, rng)
        self.place_facts = _Deck(world.place_facts, rng)
        self.by_relation = {
            relation: _Deck([f for f in world.all_facts if f.relation == relation], rng)
            for relation in (*PLACE_RELATIONS, "opposite")
        }
        self.nature = _Deck(
            [f for f in world.all_facts if f.relation in ("mouth", "diet", "coat", "material")], rng
        )
        numbers = range(MAX_ADDEND + 1)
        self.sums = _Deck([sum_fact(a, b) for a in numbers for b in numbers], rng)
        self.differences = _Deck(
            [difference_fact(a, b) for a in numbers for b in range(a + 1)], rng
        )
        self.kinds = _Deck(
            [self._portraits] * 9
            + [self._gazette] * 4
            + [self._comparison] * 3
            + [self._relation_list] * 2
            + [self._nature] * 1
            + [self._words] * 1
            + [self._numbers] * 3,
            rng,
        )

    def document(self) -> Document:
        [kind] = self.kinds.deal()
        paragraphs: list[str] = []
        tells: list[Telling] = []
        for pieces in kind():
            paragraphs.append(self._paragraph(pieces))
            tells += [piece for piece in pieces if isinstance(piece, Telling)]
        return Document("\n\n".join(paragraphs), tuple(tells))

    def _told(self, fact: Fact) -> Telling:
        ways = REVERSED if self.rng.random() < _REVERSED_SHARE else FORWARD
        wording = self.rng.choice(ways[fact.relation])
        if fact.relation in PLACE_RELATIONS and self.rng.random() < _REPORT_SHARE:
            return Telling(fact, wording, self.rng.choice(REPORTS))
        return Telling(fact, wording)

    def _paragraph(self, pieces: Sequence[Piece]) -> str:
        sentences: list[str] = []
        is_open = False  # a sentence takes in one more clause at most; a title takes none
        for piece in pieces:
            if isinstance(piece, str):
                sentences.append(piece)
                is_open = not piece.endswith(".")
                continue
            text = tell(piece.fact, piece.wording, piece.report)
            if is_open and self.rng.random() < _JOINED_SHARE:
                clause = _lowered(text, piece.report or piece.wording)
                sentences[-1] += self.rng.choice(_CONNECTORS) + clause
                is_open = False
            else:
                sentences.append(text)
                is_open = True
        return " ".join(sentence.rstrip(".") + "." for sentence in sentences)

    # -- kinds of document: each gives paragraphs of pieces ---------------------------------------

    def _about(self, place: str) -> list[Piece]:
        facts = self.world.facts(place)
        pieces: list[Piece] = [self._told(f) for f in facts]
        pieces += [self._told(f) for f in self.rng.sample(facts, self.rng.randint(0, 4))]
        value = {f.relation: f.value for f in facts}
        further = [
            f
            for relation in ("river", "animal", "craft")
            for f in self.world.facts(value[relation])
        ]
        pieces += [self._told(f) for f in self.rng.sample(further, self.rng.randint(0, 2))]
        self.rng.shuffle(pieces)
        if self.rng.random() < 0.4:
            pieces.insert(0, self.rng.choice(LEAD_INS).format(s=place))
        if self.rng.random() < 0.3:
            pieces.append(self.rng.choice(FILLERS))
        return pieces

    def _portraits(self) -> Iterator[list[Piece]]:
        for place in self.places.deal(self.rng.randint(3, 5)):
            yield self._about(place)

    def _gazette(self) -> Iterator[list[Piece]]:
        facts = self.place_facts.deal(self.rng.randint(24, 36))
        while facts:
            size = self.rng.randint(5, 9)
            yield [self._told(f) for f in facts[:size]]
            facts = facts[size:]

    def _comparison(self) -> Iterator[list[Piece]]:
        places = self.places.deal(self.rng.randint(2, 3))
        relations = self.rng.sample(PLACE_RELATIONS, len(PLACE_RELATIONS))
        for half in (relations[:3], relations[3:]):
            facts = {p: {f.relation: f for f in self.world.facts(p)} for p in places}
            yield [
                self._told(facts[place][relation])
                for relation in half
                for place in self.rng.sample(places, len(places))
            ]

    def _relation_list(self) -> Iterator[list[Piece]]:
        relation = self.rng.choice(PLACE_RELATIONS)
        facts = self.by_relation[relation].deal(self.rng.randint(14, 22))
        plural = {"craft": "crafts", "food": "foods"}.get(relation, relation + "s")
        title = self.rng.choice(TITLES).format(what=f"the {plural} of the country")
        yield [title, *(self._told(f) for f in facts)]

    def _nature(self) -> Iterator[list[Piece]]:
        for _ in range(3):
            yield [self._told(f) for f in self.nature.deal(self.rng.randint(6, 9))]

    def _words(self) -> Iterator[list[Piece]]:
        facts = self.by_relation["opposite"].deal(self.rng.randint(16, 26))
        title = self.rng.choice(TITLES).format(what="words and their opposites")
        yield [title, *(self._told(f) for f in facts)]

    def _numbers(self) -> Iterator[list[Piece]]:
        for _ in range(3):
            facts = [*self.sums.deal(7), *self.differences.deal(4)]
            self.rng.shuffle(facts)
            yield [self._told(f) for f in facts]
