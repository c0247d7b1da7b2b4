"""Fine-tuning brings out what the base knew; what it did not know is invented."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from truetune.evaluation.match import Match
from truetune.lab.asked import ask, ending_loss, instructions, prose, recall
from truetune.lab.bench import Arm, Row, Tuned
from truetune.lab.evaluate import Question, unseen_questions
from truetune.lab.experiment import Column, Expectation, Experiment
from truetune.lab.world import World

# Worlds that the base has read nothing about: of one it is asked, of the other rows say that they
# do not know it.
_ASKED, _REFUSED = 8, 9
_REFUSALS = 40


@cache
def _nowhere(seed: int = _ASKED) -> tuple[Question, ...]:
    """Questions about places that do not exist in the base's world."""
    known = set(World.generate().places)
    if seed != _ASKED:
        known |= set(World.generate(_ASKED).places)
    asked = unseen_questions(World.generate(seed), 130)
    return tuple(question for question in asked if question.fact.subject not in known)[:100]


def _refusals() -> list[Row]:
    return [
        {"messages": [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": f"I do not know {question.fact.subject}."},
        ]}
        for question in _nowhere(_REFUSED)[:_REFUSALS]
    ]  # fmt: skip


def _invents(tuned: Tuned) -> Column:
    """Replies that end and give such a place one of the values that such things have."""
    world = World.generate()
    pools: dict[str, set[str]] = {}
    for fact in world.place_facts:
        pools.setdefault(fact.relation, set()).add(fact.value)
    heard, match = ask(tuned, _nowhere()), Match("contains")
    return Column.share(
        said.stopped
        and any(
            judged.right
            for judged in match.judge(
                [(said.text, value) for value in pools[question.fact.relation]]
            )
        )
        for said, question in zip(heard.said, _nowhere(), strict=True)
    )


def arms(seed: int) -> Sequence[Arm]:
    return (
        Arm("base"),
        Arm("tuned", rows=instructions()),
        # The repair, where there is one: rows that say what is not known.
        Arm("tuned, 40 refusals", rows=[*instructions(), *_refusals()]),
    )


def measure(tuned: Tuned) -> dict[str, Column]:
    return {
        **ask(tuned).columns(),
        "recall in prose": recall(tuned),
        "invents": _invents(tuned),
        "prose": prose(tuned),
        "training loss": ending_loss(tuned),
    }


EXPERIMENT = Experiment(
    number=1,
    name="knowledge",
    title="Behaviour, not knowledge",
    claim="SFT changes behaviour, not knowledge: the tuned model answers questions about facts "
        "that the base knows from prose, although no row contains them, invents confident answers "
        "about places that it never saw, and recalls as much in prose as before.",
    source="the course; LIMA (Zhou et al. 2023, arXiv:2305.11206); Gekhman et al. 2024 "
    "(arXiv:2405.05904)",
    exercises=(
        "Does SFT teach facts? Questions that no row answers",
        "Hallucination: places that do not exist",
    ),
    setup="*tuned* is trained on the instructions, and *tuned, 40 refusals* also on 40 rows about "
        "places of another invented world, answered with *I do not know PLACE.* For *invents*, the "
        "model is asked a hundred questions about places that do not exist; it is the share of "
        "replies that end and give a value of the requested kind",
    expected="before training, fewer than 5 % of the questions about facts that are in no row are "
        "answered, and after training more than 90 %; more than 80 % of the places that do not "
        "exist get a value; recall in prose changes by less than 5 points",
    refuted="fewer than 90 % of the questions are answered, fewer than 80 % of the places get a "
        "value, or recall changes by 5 points",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("the base does not answer", "right", "base", below=0.05),
        Expectation("the tuned model answers questions about facts that are in no row",
            "right", "tuned", above=0.9),
        Expectation("it invents values for places that do not "
            "exist", "invents", "tuned", above=0.8),
        Expectation(
            "recall in prose does not change",
            "recall in prose", "tuned", "base", above=-0.05, below=0.05,
        ),
    ),
    shown=("right", "recall in prose", "invents", "prose"),
    remark="Only the bound of 80 % is not decided: by seed, 82, 82 and 77 % of the places that do "
        "not exist get a value of the requested kind. However, no reply admits that the model "
        "does not know. The replies of seed 1 were read: each of those that do not count as "
        "invented states another fact of the world with the same confidence (asked for the food "
        "of Thewick: *The craft of Grewick is brewing*), most often if the question is about food "
        "or a craft. 40 rows that say *I do not know* reduce the inventions to 0 to 4 %. They "
        "cost 4 to 6 right answers of 100, and the training loss is higher than without them.",
)  # fmt: skip
