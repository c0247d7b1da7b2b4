"""Train on the assistant's tokens alone, or on all tokens."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.contract.example import SFTExample
from truetune.lab.asked import ask, ending_loss, instructions, losses, prose, questions, sentence
from truetune.lab.bench import Arm, Tuned
from truetune.lab.chats import encoded
from truetune.lab.experiment import Column, Expectation, Experiment


def arms(seed: int) -> Sequence[Arm]:
    return (
        Arm("base"),
        Arm("assistant only", rows=instructions()),
        Arm("all tokens", rows=instructions(), recipe={"loss_on": "all"}),
    )


def measure(tuned: Tuned) -> dict[str, Column]:
    """Also measure the losses of questions and answers that occur in no row."""
    rows = [{"prompt": q.text, "completion": sentence(q.fact)} for q in questions()]
    answers = encoded(tuned.contract, rows)
    users = [SFTExample(e.ids, [0] + [1 - on for on in e.mask[1:]]) for e in answers]
    return {
        **ask(tuned).columns(),
        "answers": losses(tuned, answers),
        "user text": losses(tuned, users),
        "prose": prose(tuned),
        "training loss": ending_loss(tuned),
    }


EXPERIMENT = Experiment(
    number=3,
    name="loss-mask",
    title="Loss on the answer alone",
    claim="Loss masking matters: with loss on all tokens, the model learns to write the user's "
        "turns, and its answers get worse.",
    source="the course's exercise on loss masks; threads trl#1282 and #3279; Shi et al. 2024 "
    "(arXiv:2405.14394) find the opposite for some data",
    exercises=("Loss masking: assistant only against all tokens",),
    setup="a model is trained on the same rows with `--loss-on assistant` (the default) and with "
        "`--loss-on all`. *User text* is the loss on the hundred questions, which occur in no "
        "row, and *answers* the loss on their right answers",
    expected="compared with loss on the answer alone, loss on all tokens makes the user's "
        "held-out text more likely by more than a nat per token, gives 5 points fewer right "
        "answers, and gives at least 5 points more replies that continue with the user's turn",
    refuted="the user's text becomes more likely by less than half a nat, or right answers or "
        "role leak change by less than 5 points",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "the user's text becomes more likely by a nat",
            "user text", "all tokens", "assistant only", below=-1.0,
        ),
        Expectation(
            "5 points fewer answers are right",
            "right", "all tokens", "assistant only", below=-0.05,
        ),
        Expectation(
            "5 points more replies speak for the user",
            "role leak", "all tokens", "assistant only", above=0.05,
        ),
    ),
    shown=("right", "role leak", "user text", "answers", "prose"),
    remark="No reply speaks for the user, because the end of the answer is a target in both arms. "
        "A role leak needs a second mistake (see role-leak). The training losses of the two "
        "arms are not comparable, because one also counts the question. For the user's text, "
        "the sentence under *Refuted by* leaves a gap of half a nat; the effect is eight nats.",
)  # fmt: skip
