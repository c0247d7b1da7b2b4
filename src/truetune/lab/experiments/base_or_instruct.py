"""Train the same few steps from a base and from an already tuned model."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.lab.asked import ask, facts_for_rows, instructions, sentence
from truetune.lab.bench import Arm, Row, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment

_OTHER = "instruction-response"
_OWN = "chatml-lite"


def _short(seed: int) -> list[Row]:
    """A new manner: the value alone, behind a word."""
    return [
        {"prompt": text, "completion": f"Answer: {fact.value}"}
        for text, fact in facts_for_rows(60, seed)
    ]


def _whole(seed: int) -> list[Row]:
    """The same manner in front of the sentence that the tuned model answers with."""
    return [
        {"prompt": text, "completion": f"Answer: {sentence(fact)}"}
        for text, fact in facts_for_rows(60, seed)
    ]


def arms(seed: int) -> Sequence[Arm]:
    tuned, rows = Arm("", rows=instructions()), _short(seed)

    def recipe(template: str) -> dict[str, object]:
        return {"chat_template": template, "max_steps": 40}

    other, own = recipe(_OTHER), recipe(_OWN)
    return (
        Arm("base, other template", rows=rows, recipe=other),
        Arm("tuned, other template", rows=rows, recipe=other, start=tuned),
        Arm(
            "the same, in its first template", rows=rows, recipe=other, start=tuned,
            served=_OWN, stop=["<|end|>"],
        ),
        Arm("tuned, its own template", rows=rows, recipe=own, start=tuned),
        Arm("its own template, whole sentences", rows=_whole(seed), recipe=own, start=tuned),
    )  # fmt: skip


def measure(tuned: Tuned) -> dict[str, Column]:
    heard = ask(tuned)
    new = Column.share(said.text.strip().startswith("Answer:") for said in heard.said)
    return {**heard.columns(), "new style": new}


EXPERIMENT = Experiment(
    number=13,
    name="base-or-instruct",
    title="Starting from a base or from a tuned model",
    claim="A tuned model learns a new style in fewer steps than a base. If it is trained with a "
        "template other than its own, it keeps both styles; with its own template, the new style "
        "replaces the old one. It keeps its right answers if the new answers still hold the "
        "sentence that it used to answer with.",
    source="the course's exercise on base against instruct; thread LLaMA-Factory#6736",
    exercises=("Base against instruct start",),
    setup="the arms take 40 steps on 60 rows that answer with *Answer: VALUE*. The tuned model was "
        "trained on the instructions in `chatml-lite`; the other template is "
        "`instruction-response`. For *whole sentences*, the rows answer with *Answer:* and the "
        "sentence that the tuned model was trained on. *New style* is the share of replies that "
        "begin with *Answer:*",
    expected="after 40 steps on 60 rows in a template that is new to both, the tuned model gives "
        "more than 10 points more right answers than the base; prompted in its first template, "
        "this model shows the new style in fewer than half of the replies; if it is trained in "
        "its own template, in more than 90 %; with whole sentences in its own template, it gives "
        "more than 90 % right answers",
    refuted="right answers within 10 points, a share of the new style outside these bounds, or "
        "fewer right answers with whole sentences",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "the tuned start is ahead of the base",
            "right", "tuned, other template", "base, other template", above=0.1,
        ),
        Expectation(
            "the first template keeps the old style",
            "new style", "the same, in its first template", below=0.5,
        ),
        Expectation(
            "with its own template, it takes on the new style",
            "new style", "tuned, its own template", above=0.9,
        ),
        Expectation(
            "whole sentences keep the right answers",
            "right", "its own template, whole sentences", above=0.9,
        ),
    ),
    shown=("right", "new style", "ended", "role leak"),
    remark="The tuned start is ahead in every seed, by 9, 15 and 9 points around a bound of 10; a "
        "hundred questions are too few to decide. *In fewer steps* was tested with a single number "
        "of steps: the result says which start is ahead after 40, and not how many steps each "
        "needs. Both starts learn the new style in 40 steps: all replies show it. The errors of "
        "seed 1 were read. Most confuse the relation: 40 of 42 wrong replies from the base and 30 "
        "of 33 from the tuned start give a true value of the right place (asked for the river, "
        "*Answer: weaving*). The tuned start can already recall facts, and the new style removes "
        "part of that ability. Prompted in its own template, the same model answers with its old "
        "sentence, and 91 % of the answers are right. That sentence names the relation before the "
        "value; the bare value has no such step. Right answers are thus the first to break (the "
        "tuned model had 100 % before, see knowledge): replies still end, and none writes another "
        "turn. Training in the model's own template leaves one style instead of two, but it does "
        "not bring back the right answers (69 %). Changing nothing but the style does bring them "
        "back: with *Answer:* in front of the old sentence, all replies show the new style and 98 "
        "% are right. This last arm was added after the others had run, and declared before its "
        "own run.",
)  # fmt: skip
