"""Compare the length of answers in the rows with the length of replies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from truetune.generate import Sampling
from truetune.lab.asked import Heard, ask, facts_for_rows, questions, rows, sentence
from truetune.lab.bench import Arm, Row, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment
from truetune.lab.world import PLACE_RELATIONS, Fact, World

_ROWS = 200
_ROOM = Sampling(max_new_tokens=96)


def _long(seed: int) -> list[Row]:
    """The same questions, answered in three sentences about the place."""
    world = World.generate()
    made: list[Row] = []
    for text, fact in facts_for_rows(_ROWS, seed):
        at = PLACE_RELATIONS.index(fact.relation)
        others = [PLACE_RELATIONS[(at + step) % len(PLACE_RELATIONS)] for step in (1, 2)]
        facts = [fact, *(Fact(fact.subject, r, world.value(fact.subject, r)) for r in others)]
        made.append({"prompt": text, "completion": " ".join(map(sentence, facts))})
    return made


def arms(seed: int) -> Sequence[Arm]:
    return (
        Arm("one sentence", rows=rows(_ROWS, seed)),
        Arm("three sentences", rows=_long(seed)),
    )


def _sentences(heard: Heard) -> Column:
    return Column.mean((len(re.findall(r"\.(?:\s|$)", s.text)) for s in heard.said), "sentences")


def measure(tuned: Tuned) -> dict[str, Column]:
    """Questions as in the rows, and the bare name of a place, which is not a question."""
    heard = ask(tuned, sampling=_ROOM)
    bare = ask(tuned, [replace(q, text=q.fact.subject) for q in questions()], _ROOM)
    return {
        **heard.columns(),
        "sentences": _sentences(heard),
        "sentences, bare prompt": _sentences(bare),
        "ended, bare prompt": Column.share(s.stopped for s in bare.said),
    }


EXPERIMENT = Experiment(
    number=15,
    name="short-answers",
    title="Short answers in, short answers out",
    claim="Rows with one-sentence answers give one-sentence replies, even to a bare prompt that "
        "resembles no row.",
    source="the course's exercise on answer length",
    exercises=("Answer length",),
    setup="200 rows about places are answered in one sentence, or in that sentence and two more "
        "facts about the place. Replies may have 96 tokens. A *bare prompt* is only the name of a "
        "place",
    expected="trained on one sentence, replies to questions and to bare prompts have fewer than "
        "1.2 sentences, and more than 90 % of the replies to bare prompts end; trained on three "
        "sentences, replies to both have more than 2.5 sentences",
    refuted="a length outside these bounds",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "one sentence in the rows, one in replies",
            "sentences", "one sentence", below=1.2,
        ),
        Expectation(
            "three sentences in the rows, three in replies",
            "sentences", "three sentences", above=2.5,
        ),
        Expectation(
            "one sentence for a bare prompt too",
            "sentences, bare prompt", "one sentence", below=1.2
        ),
        Expectation(
            "three sentences for a bare prompt too",
            "sentences, bare prompt", "three sentences", above=2.5,
        ),
        Expectation("replies to bare prompts end", "ended, bare prompt", "one sentence", above=0.9),
    ),
    shown=("sentences", "sentences, bare prompt", "reply length", "right"),
    remark="A bare place name is not a question, but the model still answers it, with as many "
        "sentences as the rows have.",
)  # fmt: skip
