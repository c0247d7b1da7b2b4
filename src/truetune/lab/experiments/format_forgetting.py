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
    title="Format collapse and the forgetting of prose",
    claim="The more steps and the higher the rate, the more prose is forgotten and the more of it "
    "turns into answers; pretraining text among the rows cures both.",
    source="the course's exercises on format collapse and on mixing; threads LLaMA-Factory#2611 "
    "and Qwen#813",
    exercises=("Format collapse: prose after SFT", "Forgetting, and mixing in pretraining text"),
    setup="the instructions at three rates for 150 steps, and at 3e-4 for 50 and for 400. *Half "
    "prose*: as many chats as at 3e-4, and as many tokens of fresh documents about the "
    "world, in pieces of 64, spread over the same steps. *Ends prose*: of a hundred "
    "held-out documents that are continued from their first 12 words, those whose "
    "continuation ends with the end marker of an answer",
    expected="the loss on prose at 1e-3 is more than 0.3 nats above that at 1e-4, and after 400 "
        "steps more than 0.2 above that after 50; at 3e-4, more than half of the prose that the "
        "model continues ends like an answer; with prose as half of the tokens, fewer than 10 % "
        "do, the loss is within 0.15 of the base's, and right answers are within 5 points of "
        "those without prose",
    refuted="a loss on prose or shares outside these bounds",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("a higher rate forgets more", "prose", "1e-3", "1e-4", above=0.3),
        Expectation(
            "more steps forget more",
            "prose", "3e-4, 400 steps", "3e-4, 50 steps", above=0.2,
        ),
        Expectation("prose ends like an answer", "ends prose", "3e-4", above=0.5),
        Expectation(
            "with prose among the rows, it does not", "ends prose", "3e-4, half prose", below=0.1
        ),
        Expectation("with prose among the rows, prose is not "
            "forgotten", "prose", "3e-4, half prose", "base", below=0.15),
        Expectation(
            "with prose among the rows, as many answers are "
            "right", "right", "3e-4, half prose", "3e-4", above=-0.05
        ),
    ),
    shown=("prose", "ends prose", "right", "recall in prose", "training loss"),
    remark="The loss on the rows keeps falling while everything else breaks: at 1e-3 it is among "
           "the lowest, but a third of the recall and a fifth of the answers are lost. With prose "
           "among the rows, the training loss is that of prose (0.67) and says nothing about the "
           "answers.",
)  # fmt: skip
