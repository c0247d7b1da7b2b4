"""The corpus: a world and a stream's name -> an endless, deterministic stream of `Document`s.

It contains no questions or answers: no '?', no chat marker. Facts are drawn from shuffled decks, so
that every fact occurs equally often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from truetune.lab.building.telling import Telling, clause, tell
from truetune.lab.building.wordings import carried, wordings
from truetune.lab.words import words
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, Fact, World, difference_fact, sum_fact

T = TypeVar("T")

_CONNECTORS = (", and ", "; ", ", while ", ", and also ", ", but ")
_JOINED_SHARE = 0.3
_NUMBERS = range(MAX_ADDEND + 1)

# What a paragraph is made of: a fact to tell, or a clause that tells none.
Piece = Telling | str


@dataclass(frozen=True)
class Document:
    """A few paragraphs, and the facts in them."""

    text: str
    tells: tuple[Telling, ...]


def documents(world: World, stream: str = "rich", *, plain: bool = False) -> Iterator[Document]:
    """An endless stream of documents; equal arguments give the same documents.

    Args:
        stream: names the private random stream.
        plain: in the few wordings of the plain course.
    """
    rng = random.Random(f"{world.seed}/{stream}")
    writer = _PlainWriter(world, rng) if plain else _RichWriter(world, rng)
    while True:
        yield writer.document()


def _deck(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Deals items in random order, all of them before any comes again."""
    while True:
        yield from reversed(rng.sample(items, len(items)))


def _take(deck: Iterator[T], count: int) -> list[T]:
    return list(islice(deck, count))


class _PlainWriter:
    """Writes one document after another from one random stream, plainly."""

    REVERSED_SHARE = 0.25
    FRAME_SHARE = 0.2

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.ways = self._ways()
        self.places = _deck(world.places, rng)
        self.place_facts = _deck(world.place_facts, rng)
        self.by_relation = {
            relation: _deck([f for f in world.all_facts if f.relation == relation], rng)
            for relation in (*PLACE_RELATIONS, "opposite")
        }
        self.nature = _deck(
            [f for f in world.all_facts if f.relation in ("mouth", "diet", "coat", "material")], rng
        )
        self.sums = _deck(self._as_often(sum_fact(a, b) for a in _NUMBERS for b in _NUMBERS), rng)
        self.differences = _deck(
            self._as_often(difference_fact(a, b) for a in _NUMBERS for b in range(a + 1)), rng
        )
        kinds = [self._portraits] * 9 + [self._gazette] * 4 + [self._comparison] * 3
        self.kinds = _deck([*kinds, *[self._relation_list] * 2, *self._other_kinds()], rng)

    def document(self) -> Document:
        paragraphs: list[str] = []
        tells: list[Telling] = []
        for pieces in next(self.kinds)():
            paragraphs.append(self._paragraph(pieces))
            tells += [piece for piece in pieces if isinstance(piece, Telling)]
        return Document("\n\n".join(paragraphs), tuple(tells))

    def _paragraph(self, pieces: Sequence[Piece]) -> str:
        sentences: list[str] = []
        is_open = False  # a sentence takes in one more clause at most; a title takes none
        for piece in pieces:
            if isinstance(piece, str):
                sentences.append(piece)
                is_open = not piece.endswith(".")
            elif is_open and self.rng.random() < _JOINED_SHARE:
                sentences[-1] += self.rng.choice(_CONNECTORS) + self._joined(piece)
                is_open = False
            else:
                sentences.append(tell(piece.fact, piece.wording, piece.frame))
                is_open = True
        return " ".join(sentence.rstrip(".") + "." for sentence in sentences)

    # -- what the rich course does otherwise -------------------------------------------------------

    def _ways(self) -> dict[str, Any]:
        return words("building/rich") | words("building/plain")  # fillers and titles serve both

    def _as_often(self, facts: Iterable[Fact]) -> list[Fact]:
        return list(facts)

    def _other_kinds(self) -> list[Callable[[], Iterator[list[Piece]]]]:
        return [self._nature, self._words, *[self._numbers] * 3]

    def _one_of(self, kind: str, relation: str | None = None) -> str:
        patterns = self.ways[kind]
        return self.rng.choice(patterns if relation is None else patterns[relation])

    def _wording(self, relation: str) -> str:
        is_reversed = self.rng.random() < self.REVERSED_SHARE
        return self._one_of("reversed" if is_reversed else "forward", relation)

    def _told(self, fact: Fact) -> Telling:
        wording = self._wording(fact.relation)
        if fact.relation in PLACE_RELATIONS and self.rng.random() < self.FRAME_SHARE:
            return Telling(fact, wording, self._one_of("frames"))
        return Telling(fact, wording)

    def _joined(self, piece: Telling) -> str:
        if not piece.frame and piece.wording.startswith(("{s}", "{v}")):
            # A word at the head keeps its capital, name or not: so the shipped base has read it.
            return tell(piece.fact, piece.wording)
        return clause(piece.fact, piece.wording, piece.frame)

    def _rounded_off(self, pieces: list[Piece], place: str) -> list[Piece]:
        if self.rng.random() < 0.4:
            pieces.insert(0, self._one_of("lead_ins").format(s=place))
        if self.rng.random() < 0.3:
            pieces.append(self._one_of("fillers"))
        return pieces

    def _numbers(self) -> Iterator[list[Piece]]:
        for _ in range(3):
            yield self._mixed(7, 4)

    def _mixed(self, num_sums: int, num_differences: int) -> list[Piece]:
        facts = [*_take(self.sums, num_sums), *_take(self.differences, num_differences)]
        self.rng.shuffle(facts)
        return [self._told(f) for f in facts]

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
        return self._rounded_off(pieces, place)

    def _portraits(self) -> Iterator[list[Piece]]:
        for place in _take(self.places, self.rng.randint(3, 5)):
            yield self._about(place)

    def _gazette(self) -> Iterator[list[Piece]]:
        facts = _take(self.place_facts, self.rng.randint(24, 36))
        while facts:
            size = self.rng.randint(5, 9)
            yield [self._told(f) for f in facts[:size]]
            facts = facts[size:]

    def _comparison(self) -> Iterator[list[Piece]]:
        places = _take(self.places, self.rng.randint(2, 3))
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
        facts = _take(self.by_relation[relation], self.rng.randint(14, 22))
        plural = {"craft": "crafts", "food": "foods"}.get(relation, relation + "s")
        title = self.rng.choice(self.ways["titles"]).format(what=f"the {plural} of the country")
        yield [title, *(self._told(f) for f in facts)]

    def _nature(self) -> Iterator[list[Piece]]:
        for _ in range(3):
            yield [self._told(f) for f in _take(self.nature, self.rng.randint(6, 9))]

    def _words(self) -> Iterator[list[Piece]]:
        facts = _take(self.by_relation["opposite"], self.rng.randint(16, 26))
        title = self.rng.choice(self.ways["titles"]).format(what="words and their opposites")
        yield [title, *(self._told(f) for f in facts)]


class _RichWriter(_PlainWriter):
    """In many wordings, after openings, with insertions and *its* for the name; drills in sums."""

    REVERSED_SHARE = 0.15
    CARRIED_SHARE = 0.35
    ASIDE_SHARE = 0.15
    INSERTION_SHARE = 0.06
    THERE_SHARE = 0.4
    CORE_SUM_PATTERNS = 3  # the first ones of sums and differences: `+`, *plus is*, *plus equals*

    def _ways(self) -> dict[str, Any]:
        return words("building/rich")

    def _as_often(self, facts: Iterable[Fact]) -> list[Fact]:
        """Sums and differences of single digits, of which all others are made, four times as often
        as those beyond twenty."""
        dealt: list[Fact] = []
        for fact in facts:
            a, sign, b = fact.subject.split()
            largest = max(int(a), int(b)) if sign == "+" else int(a)
            dealt += [fact] * (4 if largest < 10 else 2 if largest <= 20 else 1)
        return dealt

    def _other_kinds(self) -> list[Callable[[], Iterator[list[Piece]]]]:
        return [self._nature] * 2 + [self._words] * 2 + [self._numbers] * 9

    def _one_of(self, kind: str, relation: str | None = None) -> str:
        return self.rng.choice(wordings(super()._one_of(kind, relation)))

    def _told(self, fact: Fact) -> Telling:
        rng = self.rng
        in_frame = fact.relation in PLACE_RELATIONS and rng.random() < self.FRAME_SHARE
        wording = self._wording(fact.relation)
        if rng.random() < self.INSERTION_SHARE:
            wording = wording.replace(" is ", f"{self._one_of('insertions')} is ", 1)
        if wording.startswith(words("building/carriers")["commands"]):
            return Telling(fact, wording)
        if in_frame:
            if rng.random() < 0.5:
                wording = self._one_of("there", fact.relation)
            return Telling(fact, wording, self._one_of("frames"))
        if rng.random() < self.ASIDE_SHARE:
            return Telling(fact, wording, self._one_of("asides"))
        return Telling(fact, wording)

    def _wording(self, relation: str) -> str:
        if self.rng.random() < self.CARRIED_SHARE:
            return self.rng.choice(carried(relation))
        return super()._wording(relation)

    def _joined(self, piece: Telling) -> str:
        return clause(piece.fact, piece.wording, piece.frame)

    def _rounded_off(self, pieces: list[Piece], place: str) -> list[Piece]:
        return super()._rounded_off(self._referring_back(pieces, place), place)

    def _referring_back(self, pieces: Sequence[Piece], place: str) -> list[Piece]:
        """Some facts of the place say *its*, where the sentence before was about it too."""
        result: list[Piece] = []
        before = ""  # what the piece before was about
        for piece in pieces:
            fact = piece.fact if isinstance(piece, Telling) else None
            if fact and fact.subject == before == place and self.rng.random() < self.THERE_SHARE:
                result.append(Telling(fact, self._one_of("there", fact.relation)))
            else:
                result.append(piece)
            before = fact.subject if fact else ""
        return result

    def _numbers(self) -> Iterator[list[Piece]]:
        yield self._drill(self.sums)
        yield self._drill(self.sums)
        yield self._drill(self.differences)
        yield self._mixed(6, 4)

    def _drill(self, deck: Iterator[Fact]) -> list[Piece]:
        """A dozen facts in one wording: what a sum is, is learned before how it may be put."""
        facts = _take(deck, self.rng.randint(10, 14))
        relation = facts[0].relation
        if self.rng.random() < 0.3:
            core = self.ways["forward"][relation][: self.CORE_SUM_PATTERNS]
            wording = self.rng.choice(wordings(self.rng.choice(core)))
        else:
            wording = self._wording(relation)
        return [Telling(f, wording) for f in facts]
