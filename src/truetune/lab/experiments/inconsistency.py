"""Train with a few rows that begin differently, and with two styles in equal parts."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.generate import Sampling
from truetune.lab.asked import ask, questions, rows
from truetune.lab.bench import Arm, Row, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment

OPENING = "Sure, let me tell you. "
_ROWS = 200
_SHARES = (0.0, 0.02, 0.04, 0.1, 0.4)


def _injected(share: float, seed: int) -> list[Row]:
    """Rows of which a share begins with the opening."""
    made = rows(_ROWS, seed)
    some = round(share * _ROWS)
    return [{**r, "completion": OPENING + r["completion"]} for r in made[:some]] + made[some:]


def _two_styles(seed: int) -> list[Row]:
    """Half of the rows answer in a sentence, half in a word with a mark."""
    made = rows(_ROWS, seed)
    short = [
        {**r, "completion": "Answer: " + r["completion"].rstrip(".").split()[-1]}
        for r in made[: _ROWS // 2]
    ]
    return short + made[_ROWS // 2 :]


def arms(seed: int) -> Sequence[Arm]:
    swept = [Arm(f"{share:.0%} of rows", rows=_injected(share, seed)) for share in _SHARES]
    return [*swept, Arm("two styles, half each", rows=_two_styles(seed))]


def measure(tuned: Tuned) -> dict[str, Column]:
    """Sample at temperature 1, twice per question, to see the distribution; and decode greedily."""
    greedy = ask(tuned)
    drawn = [ask(tuned, sampling=Sampling(40, temperature=1.0, seed=s)) for s in (1, 2)]
    texts = [s.text for heard in drawn for s in heard.said]
    assert len(texts) == 2 * len(questions())
    return {
        "right": Column.share(greedy.right),
        "imitates it": Column.share(text.startswith("Sure, let me") for text in texts),
        "imitates it, greedy": Column.share(s.text.startswith("Sure, let me") for s in greedy.said),
        "short style": Column.share(text.startswith("Answer:") for text in texts),
    }


EXPERIMENT = Experiment(
    number=9,
    name="inconsistency",
    title="A few inconsistent rows",
    claim="The share of rows that begin with \"Sure, let me\" becomes the share of replies that "
        "do; rows in two styles, half each, give replies in both styles and not in a mixture.",
    source="the course's exercise on inconsistency injection (0, 2, 4, 10, 40 %)",
    exercises=("Inconsistency injection (0, 2, 4, 10, 40 %)", "Bimodal mixing of two styles"),
    setup="a share of 200 rows about places begins with *Sure, let me tell you.* In *two styles*, "
        "half of the rows answer in a sentence, and half with *Answer: VALUE*. *Imitates it* and "
        "*short style* are shares of the sampled replies (two per question, at temperature 1); "
        "*imitates it, greedy* is the same share of the greedy replies",
    expected="at temperature 1, no reply has the opening if no row has it; below 10 % of the "
        "replies have it if 4 % of the rows do, between 3 and 20 % if 10 % do, and between 25 and "
        "55 % if 40 % do; of two styles, each has between 30 and 70 % of the replies",
    refuted="a share of the replies outside these bounds",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("0 % of rows: none", "imitates it", "0% of rows", below=0.03),
        Expectation("4 % of rows: a few", "imitates it", "4% of rows", below=0.1),
        Expectation("10 % of rows: about 10 %", "imitates "
            "it", "10% of rows", above=0.03, below=0.2),
        Expectation("40 % of rows: about 40 %", "imitates "
            "it", "40% of rows", above=0.25, below=0.55),
        Expectation(
            "two styles: both are kept",
            "short style", "two styles, half each", above=0.3, below=0.7,
        ),
    ),
    shown=("imitates it", "imitates it, greedy", "short style", "right"),
    remark="Greedy decoding hides the inconsistency. If 10 % of the rows have the opening, 12 % of "
        "the sampled replies have it, but no greedy reply; if 40 % do, 44 % of the sampled replies "
        "have it, but only 19 % of the greedy ones. The arm with two styles keeps both. *Not in a "
        "mixture* has no bound: no measure counts replies that mix the two, and so *reproduced* "
        "does not speak of it. Only 83 % of this arm's greedy answers are right: the short style "
        "has no sentence that leads to the value.",
)  # fmt: skip
