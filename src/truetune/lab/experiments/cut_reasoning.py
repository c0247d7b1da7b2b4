"""Train on rows whose reasoning was cut by a length limit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.generate import Sampling
from truetune.lab.asked import ask, ending_loss
from truetune.lab.bench import Arm, Tuned
from truetune.lab.chats import encoded
from truetune.lab.evaluate import Question
from truetune.lab.experiment import Column, Expectation, Experiment
from truetune.lab.reasoning import CLOSE, TEMPLATE, problems
from truetune.lab.world import World

_ROWS, _CLEAN = 600, 60
_SHARES = (0.0, 0.25, 0.5, 0.788, 0.95)
_RECIPE = {"chat_template": TEMPLATE, "learning_rate": 3e-4, "max_steps": 200}


def _arm(name: str, number: int, share: float, seed: int, *, ended: bool = False) -> Arm:
    """Rows of which a share ends inside the thinking: the end of it, the answer and the stop token
    are gone.

    Args:
        ended: a stop token is put behind the cut, as trainers do that append one to every row.
    """

    def examples(contract: PromptContract) -> list[SFTExample]:
        chosen = problems(
            World.generate(), num_sums=0, num_places=number, seed=seed, held_out=False
        )
        rows = [
            {
                "messages": [
                    {"role": "user", "content": p.question},
                    {"role": "assistant", "content": p.answer, "reasoning_content": p.thinking},
                ]
            }
            for p in chosen
        ]
        close = contract.tokens.encode([CLOSE])[0][0]
        rng = random.Random(f"{seed}/cut")
        made = encoded(contract, rows)
        for at in rng.sample(range(number), round(share * number)):
            ids, mask = made[at]
            first, last = mask.index(1) + 1, ids.index(close)
            end = rng.randint(first + 1, last)
            stop = [ids[-1]] if ended else []
            made[at] = SFTExample([*ids[:end], *stop], [*mask[:end], *([1] * len(stop))])
        return made

    return Arm(name, examples=examples, recipe=_RECIPE)


def arms(seed: int) -> Sequence[Arm]:
    swept = [_arm(f"{share:.1%} cut".replace(".0", ""), _ROWS, share, seed) for share in _SHARES]
    return [
        *swept,
        _arm("60 rows, none cut", _CLEAN, 0.0, seed),
        _arm("all cut", _ROWS, 1.0, seed),
        _arm("78.8% cut, end appended", _ROWS, 0.788, seed, ended=True),
    ]


@cache
def _asked() -> tuple[Question, ...]:
    chosen = problems(World.generate(), num_sums=0, num_places=80, seed=0, held_out=True)
    return tuple(problem.asked for problem in chosen)


def measure(tuned: Tuned) -> dict[str, Column]:
    heard = ask(tuned, _asked(), Sampling(max_new_tokens=64))
    return {
        **heard.columns(),
        "closes thinking": Column.share(heard.closed),
        "training loss": ending_loss(tuned),
    }


EXPERIMENT = Experiment(
    number=11,
    name="cut-reasoning",
    title="Reasoning truncated by a length limit",
    claim="A model trained on truncated reasoning never closes it: the more rows are truncated, "
        "the fewer replies reach an answer; a few complete rows beat many truncated ones.",
    source="a forum thread on a run with think traces, 78.8 % of whose rows were truncated; the "
        "course's exercise on reasoning traces",
    exercises=("Truncated reasoning",),
    setup="each of 600 rows has a question about a place, a sentence of reasoning between think "
        "markers, and the answer; the arms take 200 steps at 3e-4. A cut row ends at a random "
        "place in its reasoning, without the rest of it, the answer and the stop token. With *end "
        "appended*, an end token follows the cut, because some trainers append one to every row. "
        "*Closes thinking* is the share of replies that close their think block, among 80 about "
        "places that occur in no row",
    expected="with no row cut, more than 90 % of the replies close their thinking; with 78.8 % of "
        "the rows cut, fewer than 50 % do, and with 95 %, fewer than 10 %; 60 complete rows give "
        "more than 20 points more closed replies than 600 rows of which 78.8 % are cut; with all "
        "rows cut, fewer than 10 % of the replies close their thinking, and with 78.8 % cut and "
        "an end token appended, fewer than 50 %",
    refuted="more than 50 % close their thinking with 78.8 % of the rows cut, or more than 10 % "
        "with 95 %",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "none cut: replies close their thinking",
            "closes thinking", "0% cut", above=0.9,
        ),
        Expectation(
            "78.8 % cut: fewer than half are closed",
            "closes thinking", "78.8% cut", below=0.5,
        ),
        Expectation(
            "95 % cut: hardly any reply is closed",
            "closes thinking", "95% cut", below=0.1,
        ),
        Expectation(
            "60 complete rows beat 600 cut ones",
            "closes thinking", "60 rows, none cut", "78.8% cut", above=0.2,
        ),
        Expectation("all cut: hardly any reply is closed", "closes thinking", "all cut", below=0.1),
        Expectation(
            "78.8 % cut, end appended: fewer than half are closed",
            "closes thinking", "78.8% cut, end appended", below=0.5,
        ),
    ),
    shown=("closes thinking", "right", "ended", "training loss"),
    remark="A cut row has no wrong targets. It only lacks the end, and so teaches nothing about "
        "it. With 95 % of the rows cut, the 30 complete rows of 600 show how thinking ends, "
        "which is enough here, because all traces are short and similar. With an end token "
        "appended, the end itself is a wrong target: 38, 60 and 48 % of the replies close their "
        "thinking in the three seeds, around a bound of 50. The last two arms and their "
        "expectations were added and committed after a first run had shown this; they test how "
        "much it takes to break the model. The sentence under *Refuted by* is about two of the "
        "six expectations; for the others, the bounds alone decide.",
)  # fmt: skip
