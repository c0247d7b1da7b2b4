"""Train on a worked step between think markers, or on the answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from truetune.generate import Sampling
from truetune.lab.asked import ask, ending_loss
from truetune.lab.bench import Arm, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment
from truetune.lab.reasoning import CLOSE, OPEN, TEMPLATE, Problem, problems, rows
from truetune.lab.world import World

# What is learned late is to copy the asked relation, or the third number, into the step: it takes
# many small steps, and both kinds of question in number.
_RECIPE = {
    "chat_template": TEMPLATE,
    "lora": True,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "learning_rate": 2e-3,
    "max_steps": 500,
    "batch_size": 8,
}


def arms(seed: int) -> Sequence[Arm]:
    chosen = problems(World.generate(), num_sums=1400, num_places=1200, seed=seed, held_out=False)
    return (
        Arm(
            "with a step",
            rows=rows(chosen, reasoning=True),
            recipe={**_RECIPE, "add_token": [OPEN, CLOSE]},
        ),
        Arm("answer alone", rows=rows(chosen, reasoning=False), recipe=_RECIPE),
    )


@cache
def _asked() -> tuple[Problem, ...]:
    return tuple(problems(World.generate(), num_sums=300, num_places=100, seed=0, held_out=True))


def measure(tuned: Tuned) -> dict[str, Column]:
    """Of sums of three numbers, and of places: each kind is its own share."""
    heard = ask(tuned, [problem.asked for problem in _asked()], Sampling(max_new_tokens=64))
    kinds = [problem.kind for problem in _asked()]
    return {
        "sums right": Column.share(
            r for r, k in zip(heard.right, kinds, strict=True) if k == "sum"
        ),
        "places right": Column.share(
            r for r, k in zip(heard.right, kinds, strict=True) if k == "place"
        ),
        "closes thinking": Column.share(heard.closed),
        "ended": Column.share(s.stopped for s in heard.said),
        "training loss": ending_loss(tuned),
    }


EXPERIMENT = Experiment(
    number=18,
    name="worked-step",
    title="A worked step before the answer",
    claim="A short intermediate step before the answer solves problems that the model cannot "
        "solve in one step, and the model learns the markers around it; problems that need no "
        "step lose little.",
    source="the course's exercise on reasoning traces; Nye et al. 2021, Show Your Work "
    "(arXiv:2112.00114)",
    exercises=("Reasoning traces: rows with and without a worked step",),
    setup="the rows are 1,400 sums of three numbers, which the base cannot compute in one step, "
        "and 1,200 questions about places. The arms take 500 steps of 8 rows with LoRA of rank 32 "
        "at 2e-3. *With a step* has the two sums of two numbers, or the fact in a sentence, "
        "between think markers before the answer. The model is then asked 300 sums and 100 "
        "questions about places that are in no row",
    expected="with the step, the share of right sums of three numbers is more than 50 points "
        "higher than without; more than 95 % of the replies close their thinking; right answers "
        "about places are within 10 points of those without the step",
    refuted="sums within 50 points, 5 % of the replies that do not close their thinking, or "
        "places more than 10 points behind",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "the step makes sums right", "sums right", "with a step", "answer alone", above=0.5
        ),
        Expectation("replies close their thinking", "closes thinking", "with a step", above=0.95),
        Expectation(
            "as many answers about places are right",
            "places right", "with a step", "answer alone", above=-0.1,
        ),
    ),
    shown=("sums right", "places right", "closes thinking", "training loss"),
    remark="Without the step, 10, 12 and 6 % of the sums are right in the three seeds; with it, "
        "95, 99 and 99 %. Questions about places, which the base can answer in one step, lose "
        "nothing. Training for fewer steps fails: the model first learns the form of a worked "
        "step, and only later to copy the requested numbers into it (log.md, 2026-11-21, has "
        "trials).",
)  # fmt: skip
