"""Vary the number of rows and their consistency."""

from __future__ import annotations

import random
from collections.abc import Sequence

from truetune.lab.asked import ask, ending_loss, facts_for_rows, questions, rows, sentence
from truetune.lab.bench import Arm, Row, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment
from truetune.lab.world import World

# The world has 3,360 such questions about places that nobody is asked about.
_SIZES = (5, 20, 50, 200, 1000, 3000)
_STYLES = (
    "{s}",
    "Sure, let me tell you. {s}",
    "{v}",
    "I think that {v} is what you mean, but it may be otherwise",
    "{s} Is there anything else?",
    "answer = {v}",
)
_WRONG = 0.3


def _noisy(number: int, seed: int) -> list[Row]:
    """Rows in six styles, three in ten of which are false."""
    rng = random.Random(f"{seed}/noisy")
    values: dict[str, list[str]] = {}
    for fact in World.generate().place_facts:
        values.setdefault(fact.relation, []).append(fact.value)
    made: list[Row] = []
    for text, fact in facts_for_rows(number, seed):
        wrong = rng.choice([v for v in values[fact.relation] if v != fact.value])
        value = wrong if rng.random() < _WRONG else fact.value
        statement = sentence(fact).replace(fact.value, value)
        completion = rng.choice(_STYLES).format(s=statement, v=value)
        made.append({"prompt": text, "completion": completion})
    return made


def arms(seed: int) -> Sequence[Arm]:
    sweep = [Arm(f"{number:,} rows", rows=rows(number, seed)) for number in _SIZES]
    return [
        *sweep,
        Arm("60 consistent", rows=rows(60, seed)),
        Arm("600 noisy", rows=_noisy(600, seed)),
    ]


def measure(tuned: Tuned) -> dict[str, Column]:
    heard = ask(tuned)
    return {
        **heard.columns(),
        "training loss": ending_loss(tuned),
        "in form": Column.share(
            said.stopped and said.text.strip().startswith(f"The {q.fact.relation} of ")
            for said, q in zip(heard.said, questions(), strict=True)
        ),
    }


EXPERIMENT = Experiment(
    number=2,
    name="data-size",
    title="How many rows, and how clean",
    claim="50 to 500 consistent examples suffice, and quality beats quantity: 60 consistent rows "
    "teach more than 600 noisy ones.",
    source="the course's exercise on data size; LIMA (Zhou et al. 2023, arXiv:2305.11206)",
    exercises=("Data-size sweep", "Quality against quantity: consistent and noisy rows"),
    setup="the rows are questions about places, answered in one sentence (*The ruler of PLACE is "
        "NAME.*) and drawn anew for each seed. Every arm takes 150 steps of 16 rows, so smaller "
        "sets are repeated more often. Noisy rows answer in six styles, and three in ten of them "
        "are false. *In form* is the share of replies that end, and that begin with *The*, the "
        "requested relation and *of*",
    expected="with 5 rows, fewer than 50 % of the answers are right; with 200 rows, the share of "
        "right answers is within 10 points of that with 3,000 rows; 60 consistent rows beat 600 "
        "noisy ones by more than 10 points, both in right answers and in answers of the right "
        "form (all after 150 steps)",
    refuted="50 % are right with 5 rows, 200 rows are more than 10 points behind 3,000, or noisy "
        "rows are within 10 points of consistent ones",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("5 rows are too few", "right", "5 rows", below=0.5),
        Expectation(
            "200 rows are as good as 3,000", "right", "200 rows", "3,000 rows", above=-0.1
        ),
        Expectation(
            "60 consistent rows beat 600 noisy ones",
            "right", "60 consistent", "600 noisy", above=0.1,
        ),
        Expectation(
            "60 consistent rows give the right form more often",
            "in form", "60 consistent", "600 noisy", above=0.1,
        ),
    ),
    shown=("right", "in form", "ended", "training loss"),
    remark="The sweep ends at 3,000 rows, because the world has 3,360 questions about places that "
        "are not used in the evaluation. Noisy rows cost 21, 53 and 38 of 100 right answers in "
        "the three seeds. The 600 noisy rows have six styles, and three in ten are false. That "
        "they still give more than half of the right answers may be because the noise has no "
        "single direction, and greedy decoding takes the likeliest style.",
)  # fmt: skip
