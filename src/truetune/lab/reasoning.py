"""An experiment: does a short reasoning before the answer help, and is it learned at all?

input   a base that knows sums of two numbers and facts of places, and has seen no question
does    trains twins that differ in one thing: the rows of one hold a worked step between new
        markers, those of the other only the answer; asks both what neither has seen
output  counts; `truetune lab reasoning` prints them, docs/log.md keeps them
who     a user of the pipeline like any other

The prompt does not open the block: the model itself has to write the marker. Sums of three numbers
are out of the base's reach in one step and within it in two.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.generate import Reply, Sampling, replies
from truetune.lab import base_path
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, World
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.recipe.sources import make_recipe
from truetune.run.pipeline import train

OPEN, CLOSE = "<think>", "</think>"
TEMPLATE = "user-assistant-think"

STEPS, BATCH_SIZE = 500, 8
ROWS = (1400, 1200)
"""Two-step sums and world questions. Facts and sums are the base's own: what is learned late is to
copy the asked relation, or the third number, into the step. It takes steps and both kinds of
question in number (docs/log.md)."""

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
    total = a + b + c
    return Problem(
        rng.choice(_SUM).format(a=a, b=b, c=c),
        f"{a} plus {b} is {a + b}. {a + b} plus {c} is {total}.",
        f"The result is {total}.",
        str(total),
        "sum",
    )


def _place(rng: random.Random, world: World, place: str, number: int) -> Problem:
    relation = PLACE_RELATIONS[(number + number // len(world.places)) % len(PLACE_RELATIONS)]
    value = world.value(place, relation)
    return Problem(
        rng.choice(_PLACE).format(r=relation, s=place),
        f"The {relation} of {place} is {value}.",
        f"It is {value}.",
        value,
        "place",
    )


def rows(chosen: Sequence[Problem], *, reasoning: bool) -> list[dict[str, str]]:
    """Triplets (problem, thinking, solution), or prompt and completion without the step."""
    if reasoning:
        return [
            {"problem": p.question, "thinking": p.thinking, "solution": p.answer} for p in chosen
        ]
    return [{"prompt": p.question, "completion": p.answer} for p in chosen]


def run_twin(
    output: Path,
    *,
    reasoning: bool,
    seed: int,
    steps: int,
    num_rows: tuple[int, int],
    num_questions: tuple[int, int],
    base: Path | None = None,
    listener: Listener | None = None,
) -> Counts:
    """Train one of the twins and ask it.

    Args:
        output: folder of the run; its rows lie beside it.
        num_rows, num_questions: (two-step sums, places).
        base: the lab's base where None.
    """
    world = World.generate()
    chosen = problems(
        world, num_sums=num_rows[0], num_places=num_rows[1], seed=seed, held_out=False
    )
    data = output.with_suffix(".jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows(chosen, reasoning=reasoning))
    data.write_text(text, encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(base or base_path()),
        "data": str(data),
        "chat_template": TEMPLATE,
        "lora": True,
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "learning_rate": 2e-3,
        "max_steps": steps,
        "batch_size": BATCH_SIZE,
        "eval_steps": steps,
        "save_steps": steps,
        "seed": seed,
        "verify": False,
        "output": str(output),
    }
    if reasoning:
        settings["add_token"] = [OPEN, CLOSE]
    result = train(make_recipe(("lab", settings)), listener)
    asked = problems(
        world, num_sums=num_questions[0], num_places=num_questions[1], seed=0, held_out=True
    )
    return ask(result.artifact, asked)


def ask(artifact: Path, asked: Sequence[Problem]) -> Counts:
    """Ask the saved model, greedily, through its own contract."""
    contract = PromptContract.load(artifact)
    loaded = load_model(artifact, device="cpu", purpose="inference")
    chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": p.question}] for p in asked]
    found = replies(loaded, contract, chats, Sampling(max_new_tokens=64), batch_size=64)
    return count(asked, found)


def count(asked: Sequence[Problem], found: Sequence[Reply]) -> Counts:
    """Count what was written; an answer is right where the value stands after the block."""
    opened = [reply.text.startswith(OPEN) for reply in found]
    answers = [reply.text.rpartition(CLOSE)[2].strip() for reply in found]
    closed = [
        reply.stopped and CLOSE in reply.text and bool(answer)
        for reply, answer in zip(found, answers, strict=True)
    ]
    right = {"sum": 0, "place": 0}
    total = {"sum": 0, "place": 0}
    for problem, reply, answer in zip(asked, found, answers, strict=True):
        total[problem.kind] += 1
        whole = rf"(?<![\w-]){re.escape(problem.expected)}(?![\w-])"
        right[problem.kind] += reply.stopped and re.search(whole, answer) is not None
    return Counts(
        sum(opened),
        sum(closed),
        (right["sum"], total["sum"]),
        (right["place"], total["place"]),
    )


def experiment(
    output: Path | str,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    steps: int = STEPS,
    num_rows: tuple[int, int] = ROWS,
    num_questions: tuple[int, int] = (300, 100),
    on_twins: Callable[[Twins], None] | None = None,
    listener: Listener | None = None,
) -> list[Twins]:
    """All twins; what is trained lies below `output`."""
    found = []
    for seed in seeds:
        counts = [
            run_twin(
                Path(output) / f"{name}-{seed}",
                reasoning=reasoning,
                seed=seed,
                steps=steps,
                num_rows=num_rows,
                num_questions=num_questions,
                listener=listener,
            )
            for name, reasoning in (("reasoning", True), ("plain", False))
        ]
        found.append(Twins(seed, *counts))
        if on_twins:
            on_twins(found[-1])
    return found
