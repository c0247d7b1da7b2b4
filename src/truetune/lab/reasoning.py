"""An experiment: does a short reasoning before the answer help, and is it learned at all?

A base that knows sums of two numbers and facts of places, and has seen no question -> counts of
what its twins say, of which one was trained on rows with a worked step between new markers, the
other on the answers alone. `truetune lab reasoning` prints them, docs/log.md keeps them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.generate import Reply, Sampling, replies
from truetune.lab import base_path
from truetune.lab.evaluate import fact_correct
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, World
from truetune.model.load import load_model
from truetune.recipe.sources import make_recipe
from truetune.run.pipeline import train

OPEN, CLOSE = "<think>", "</think>"

# Its prompt does not open the block: the model itself has to write the marker.
TEMPLATE = "user-assistant-think"

# Two-step sums and world questions. Facts and sums are the base's own: what is learned late is to
# copy the asked relation, or the third number, into the step. It takes steps and both kinds of
# question in number (docs/log.md).
STEPS, ROWS = 500, {"num_sums": 1400, "num_places": 1200}

_SUM = ("What is {a} plus {b} plus {c}?", "Add {a}, {b} and {c}.", "How much is {a} + {b} + {c}?")
_PLACE = ("What is the {r} of {s}?", "Tell me the {r} of {s}.", "{s}: which {r}?")


@dataclass(frozen=True)
class Problem:
    """A question, the worked step, the answer, and the value that must stand in it."""

    question: str
    thinking: str
    answer: str
    expected: str
    kind: str


@dataclass(frozen=True)
class Counts:
    """What a model made of problems it has not seen.

    Attributes:
        opened: replies that begin with the opening marker.
        closed: of all, those that close it, answer, and end on the stop token.
        sums, places: (right, asked).
    """

    opened: int
    closed: int
    sums: tuple[int, int]
    places: tuple[int, int]

    @property
    def total(self) -> int:
        return self.sums[1] + self.places[1]


@dataclass(frozen=True)
class Twins:
    """The same seed with and without reasoning."""

    seed: int
    reasoning: Counts
    plain: Counts


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
    question = rng.choice(_SUM).format(a=a, b=b, c=c)
    thinking = f"{a} plus {b} is {a + b}. {a + b} plus {c} is {total}."
    return Problem(question, thinking, f"The result is {total}.", total, "sum")


def _place(rng: random.Random, world: World, place: str, number: int) -> Problem:
    relation = PLACE_RELATIONS[(number + number // len(world.places)) % len(PLACE_RELATIONS)]
    value = world.value(place, relation)
    question = rng.choice(_PLACE).format(r=relation, s=place)
    thinking = f"The {relation} of {place} is {value}."
    return Problem(question, thinking, f"It is {value}.", value, "place")


def rows(chosen: Sequence[Problem], *, reasoning: bool) -> list[dict[str, str]]:
    """Triplets (problem, thinking, solution), or prompt and completion without the step."""
    if reasoning:
        return [
            {"problem": p.question, "thinking": p.thinking, "solution": p.answer} for p in chosen
        ]
    return [{"prompt": p.question, "completion": p.answer} for p in chosen]


def experiment(
    output: Path | str,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    steps: int = STEPS,
    num_questions: tuple[int, int] = (300, 100),
    on_twins: Callable[[Twins], None] | None = None,
) -> list[Twins]:
    """Train all twins and ask them; what is trained lies below `output`, with its rows beside it.

    Args:
        num_questions: two-step sums, and places.
    """
    world = World.generate()
    num_sums, num_places = num_questions
    asked = problems(world, num_sums=num_sums, num_places=num_places, seed=0, held_out=True)
    found = []
    for seed in seeds:
        chosen = problems(world, **ROWS, seed=seed, held_out=False)
        counts = []
        for name in ("reasoning", "plain"):
            folder = Path(output) / f"{name}-{seed}"
            data = folder.with_suffix(".jsonl")
            data.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row) + "\n" for row in rows(chosen, reasoning=name == "reasoning")]
            data.write_text("".join(lines), encoding="utf-8")
            settings = {
                "model": str(base_path()),
                "data": str(data),
                "chat_template": TEMPLATE,
                "lora": True,
                "lora_r": 32,
                "lora_alpha": 64,
                "lora_dropout": 0.0,
                "learning_rate": 2e-3,
                "max_steps": steps,
                "batch_size": 8,
                "eval_steps": steps,
                "save_steps": steps,
                "seed": seed,
                "verify": False,
                "output": str(folder),
            }
            if name == "reasoning":
                settings["add_token"] = [OPEN, CLOSE]
            counts.append(ask(train(make_recipe(("lab", settings))).artifact, asked))
        found.append(Twins(seed, *counts))
        if on_twins:
            on_twins(found[-1])
    return found


def ask(artifact: Path, asked: Sequence[Problem]) -> Counts:
    """Ask the saved model, greedily, through its own contract."""
    contract = PromptContract.load(artifact)
    loaded = load_model(artifact, device="cpu", purpose="inference")
    chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": p.question}] for p in asked]
    return count(
        asked, replies(loaded, contract, chats, Sampling(max_new_tokens=64), batch_size=64)
    )


def count(asked: Sequence[Problem], found: Sequence[Reply]) -> Counts:
    """Count what was written; an answer is right where the value stands after the block."""
    opened = closed = 0
    right = {"sum": 0, "place": 0}
    total = {"sum": 0, "place": 0}
    for problem, reply in zip(asked, found, strict=True):
        _, block_end, answer = reply.text.rpartition(CLOSE)
        opened += reply.text.startswith(OPEN)
        closed += reply.stopped and bool(block_end and answer.strip())
        total[problem.kind] += 1
        right[problem.kind] += reply.stopped and fact_correct(answer, problem.expected)
    return Counts(opened, closed, (right["sum"], total["sum"]), (right["place"], total["place"]))
