"""Measure how prose is forgotten while answers are learned, and what preserves it."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.lab.asked import ask, ending_loss, ends_prose, instructions, prose, recall
from truetune.lab.bench import Arm, Tuned
from truetune.lab.chats import encoded, fresh_prose
from truetune.lab.experiment import Column, Expectation, Experiment

_STEPS, _ROWS, _WIDTH = 150, 16, 64


def _half_prose(seed: int) -> Arm:
    """As many tokens of prose as of chats, and as many chats as the other arms have."""

    def examples(contract: PromptContract) -> list[SFTExample]:
        chats = encoded(contract, instructions())
        chats = (chats * (_STEPS * _ROWS // len(chats) + 1))[: _STEPS * _ROWS]
        tokens = sum(len(e.ids) for e in chats)
        mixed = [*chats, *fresh_prose(contract, tokens, _WIDTH, seed)]
        return mixed[: len(mixed) // _STEPS * _STEPS]

    # A chat of the instructions has about 22 tokens: of 64 tokens of prose a third as many rows.
    recipe = {"learning_rate": 3e-4, "batch_size": 22}
    return Arm("3e-4, half prose", examples=examples, recipe=recipe)


def _swept(name: str, rate: float, steps: int = _STEPS) -> Arm:
    return Arm(name, rows=instructions(), recipe={"learning_rate": rate, "max_steps": steps})


def arms(seed: int) -> Sequence[Arm]:
    return (
        Arm("base"),
        _swept("1e-4", 1e-4),
        _swept("3e-4", 3e-4),
        _swept("1e-3", 1e-3),
        _swept("3e-4, 50 steps", 3e-4, 50),
        _swept("3e-4, 400 steps", 3e-4, 400),
        _half_prose(seed),
    )


def measure(tuned: Tuned) -> dict[str, Column]:
    return {
        "right": Column.share(ask(tuned).right),
        "prose": prose(tuned),
        "ends prose": ends_prose(tuned),
        "recall in prose": recall(tuned),
        "training loss": ending_loss(tuned),
    }


EXPERIMENT = Experiment(
    number=7,
    name="format-forgetting",
    title="Format collapse and forgetting of prose",
    claim="The more steps and the higher the learning rate, the more prose is forgotten, and the "
        "more often prose turns into answers; pretraining text among the rows prevents both.",
    source="the course's exercises on format collapse and on mixing; threads LLaMA-Factory#2611 "
    "and Qwen#813",
    exercises=("Format collapse: prose after SFT", "Forgetting, and mixing in pretraining text"),
    setup="a model is trained on the instructions at three rates for 150 steps, and at 3e-4 also "
        "for 50 and for 400 steps. *Half prose* has the same number of rows as *3e-4*, and in "
        "addition as many tokens in fresh documents about the world, in pieces of 64 tokens, "
        "spread over the same steps. *Ends prose*: the model continues a hundred held-out "
        "documents from their first 12 words; this is the share of continuations that end with the "
        "end marker of an answer",
    expected="the loss on prose is more than 0.3 nats higher at 1e-3 than at 1e-4, and more than "
        "0.2 nats higher after 400 steps than after 50; at 3e-4, more than half of the "
        "continuations of prose end like an answer; if half of the tokens are prose, fewer than "
        "10 % of them do, the loss is within 0.15 nats of the base's, and right answers are "
        "within 5 points of those without prose",
    refuted="a loss on prose or a share outside these bounds",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("a higher rate forgets more", "prose", "1e-3", "1e-4", above=0.3),
        Expectation(
            "more steps forget more",
            "prose", "3e-4, 400 steps", "3e-4, 50 steps", above=0.2,
        ),
        Expectation("continued prose ends like an answer", "ends prose", "3e-4", above=0.5),
        Expectation(
            "with prose among the rows, it does not",
            "ends prose", "3e-4, half prose", below=0.1
        ),
        Expectation("with prose among the rows, prose is not "
            "forgotten", "prose", "3e-4, half prose", "base", below=0.15),
        Expectation(
            "with prose among the rows, as many answers are "
            "right", "right", "3e-4, half prose", "3e-4", above=-0.05
        ),
    ),
    shown=("prose", "ends prose", "right", "recall in prose", "training loss"),
    remark="The loss on the rows keeps falling while everything else breaks: at 1e-3, it is among "
        "the lowest, but two fifths of the recall and a quarter of the answers are lost. With "
        "prose among the rows, the training loss is mostly that of prose (0.63), and says nothing "
        "about the answers.",
)  # fmt: skip
