"""Questions whose answer needs an intermediate step, and rows with and without it.

A base that knows sums of two numbers and facts of places -> sums of three numbers and questions
about places, dealt once to training and to what is asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from truetune.lab.evaluate import Question
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, Fact, World

OPEN, CLOSE = "<think>", "</think>"

# Its prompt does not open the block: the model itself has to write the marker.
TEMPLATE = "user-assistant-think"

_SUM = ("What is {a} plus {b} plus {c}?", "Add {a}, {b} and {c}.", "How much is {a} + {b} + {c}?")
_PLACE = ("What is the {r} of {s}?", "Tell me the {r} of {s}.", "{s}: which {r}?")


@dataclass(frozen=True)
class Problem:
    """A question, the worked step, the answer, and the value that must stand in it.

    Attributes:
        kind: sum or place.
        about: relation and subject of the fact that is asked for.
    """

    question: str
    thinking: str
    answer: str
    expected: str
    kind: str
    about: tuple[str, str]

    @property
    def asked(self) -> Question:
        """The question in the form in which every arm is asked."""
        relation, subject = self.about
        return Question(self.question, self.expected, Fact(subject, relation, self.expected))


def problems(
    world: World, *, num_sums: int, num_places: int, seed: int, held_out: bool
) -> list[Problem]:
    """Two-step sums and questions about places.

    Triples of numbers and places are dealt once to training and to the questions: no sum and no
    place is on both sides, whatever the seed.
    """
    dealt = random.Random(f"{world.seed}/reasoning")
    # Sums of three numbers are out of the base's reach in one step and within it in two.
    triples = [
        (a, b, c)
        for a in range(1, MAX_ADDEND)
        for b in range(1, MAX_ADDEND - a + 1)
        for c in range(1, MAX_ADDEND + 1)
    ]
    dealt.shuffle(triples)
    places = dealt.sample(world.places, len(world.places))
    cut, middle = len(triples) // 5, len(places) // 3
    triples = triples[:cut] if held_out else triples[cut:]
    places = places[:middle] if held_out else places[middle:]
    rng = random.Random(f"{world.seed}/reasoning/{seed}/{held_out}")
    chosen = [_sum(rng, *triple) for triple in rng.sample(triples, num_sums)]
    chosen += [_place(rng, world, places[i % len(places)], i) for i in range(num_places)]
    rng.shuffle(chosen)
    return chosen


def _sum(rng: random.Random, a: int, b: int, c: int) -> Problem:
    total = str(a + b + c)
    about = ("sum", f"{a} + {b} + {c}")
    question = rng.choice(_SUM).format(a=a, b=b, c=c)
    thinking = f"{a} plus {b} is {a + b}. {a + b} plus {c} is {total}."
    return Problem(question, thinking, f"The result is {total}.", total, "sum", about)


def _place(rng: random.Random, world: World, place: str, number: int) -> Problem:
    relation = PLACE_RELATIONS[(number + number // len(world.places)) % len(PLACE_RELATIONS)]
    value = world.value(place, relation)
    question = rng.choice(_PLACE).format(r=relation, s=place)
    thinking = f"The {relation} of {place} is {value}."
    return Problem(question, thinking, f"It is {value}.", value, "place", (relation, place))


def rows(chosen: Sequence[Problem], *, reasoning: bool) -> list[dict[str, str]]:
    """Triplets (problem, thinking, solution), or prompt and completion without the step."""
    if reasoning:
        return [
            {"problem": p.question, "thinking": p.thinking, "solution": p.answer} for p in chosen
        ]
    return [{"prompt": p.question, "completion": p.answer} for p in chosen]
