"""Put the labels in the wrong place in three ways, and divide by the wrong number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truetune.compute.batch import Batch
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.lab.asked import instructions, usual
from truetune.lab.bench import Arm
from truetune.lab.chats import encoded
from truetune.lab.experiment import Expectation, Experiment


def _as_is(contract: PromptContract) -> list[SFTExample]:
    return encoded(contract, instructions())


def _early(contract: PromptContract) -> list[SFTExample]:
    """The mask one token too far left: the prompt's last token is a target, the end is none."""
    return [SFTExample(e.ids, [*e.mask[1:], 0]) for e in _as_is(contract)]


def _late(contract: PromptContract) -> list[SFTExample]:
    """The mask one token too far right: the answer's first token is none."""
    return [SFTExample(e.ids, [0, *e.mask[:-1]]) for e in _as_is(contract)]


def shifted_again(batch: Batch) -> Batch:
    """Labels that the model's own loss shifts once more."""
    targets, supervised = batch.targets_BT.roll(-1, 1), batch.supervised_BT.roll(-1, 1)
    supervised[:, -1] = 0
    return replace(
        batch,
        targets_BT=targets,
        supervised_BT=supervised,
        num_supervised=int(supervised.sum()),
    )


def by_all_tokens(batch: Batch) -> Batch:
    """Divide by every position, including padding, instead of by the targets."""
    return replace(batch, num_supervised=batch.ids_BT.numel())


def arms(seed: int) -> Sequence[Arm]:
    return (
        Arm("right", rows=instructions()),
        Arm("mask one early", examples=_early),
        Arm("mask one late", examples=_late),
        Arm("shifted twice", examples=_as_is, batches=shifted_again),
        Arm("divided by all", examples=_as_is, batches=by_all_tokens),
    )


EXPERIMENT = Experiment(
    number=4,
    name="wrong-labels",
    title="Labels off by one, shifted twice, divided by the wrong number",
    claim="A mask that is off by one, labels that are shifted twice and a wrong denominator ruin "
        "the replies while the loss looks normal.",
    source="the course's exercise on masks; threads verl#3287 (off by one), transformers#37766 and "
    "axolotl#1100 (denominators under gradient accumulation)",
    exercises=("Mask off by one", "Labels shifted twice", "The wrong denominator"),
    setup="the arms differ only in their labels, or in the denominator of the loss. With *mask one "
        "early*, the mask is one token too far left, so that the prompt's last token is a target "
        "and the end marker is not. With *mask one late*, it is one token too far right, so that "
        "the answer's first token is not a target. With *shifted twice*, each position learns the "
        "token after the next, as if rows were shifted by hand and again by the model's loss. With "
        "*divided by all*, the sum of the losses is divided by the number of all positions, "
        "including padding",
    expected="with a mask one token too early, no answer ends; with labels shifted twice, fewer "
        "than 10 % of the answers are right; the training loss of each of these runs ends within "
        "0.3 nats of that of the sound run; a mask one token too late and the wrong denominator "
        "each cost more than 10 points of right answers",
    refuted="right answers within 10 points of the sound run, or a loss that differs by more than "
        "0.3 nats",
    seeds=(1, 2, 3),
    arms=arms,
    measure=usual,
    expectations=(
        Expectation("mask one early: answers do not end", "ended", "mask one early", below=0.1),
        Expectation(
            "mask one early: the loss looks normal",
            "training loss", "mask one early", "right", above=-0.3, below=0.3,
        ),
        Expectation(
            "mask one late: 10 points fewer answers are right",
            "right", "mask one late", "right", below=-0.1
        ),
        Expectation(
            "mask one late: the loss looks normal",
            "training loss", "mask one late", "right", above=-0.3, below=0.3,
        ),
        Expectation(
            "shifted twice: hardly any answer is right",
            "right", "shifted twice", below=0.1,
        ),
        Expectation(
            "shifted twice: the loss looks normal",
            "training loss", "shifted twice", "right", above=-0.3, below=0.3,
        ),
        Expectation(
            "wrong denominator: 10 points fewer answers are right",
            "right", "divided by all", "right", below=-0.1,
        ),
    ),
    shown=("training loss", "right", "ended", "repeats", "role leak"),
    remark="With labels shifted twice, a fifth of the replies still contain the value among "
        "scrambled words. The share of right answers therefore looks better than the text (see "
        "the replies). The wrong denominator had no effect, because it is nearly the same "
        "factor in every batch, and Adam's step does not depend on a constant factor of the "
        "gradient. *The loss looks normal* means within 0.3 nats at the end, as declared: with "
        "labels shifted twice, the loss ends 0.2 nats higher, more than twenty times the loss "
        "of the sound run, and whoever knows how low it should be would see it. The sentence "
        "under *Refuted by* is looser than the bounds: by it, only the wrong denominator is "
        "refuted, and labels shifted twice, with 22 % right, are not. By the bounds, both are. "
        "The verdict is the same either way.",
)  # fmt: skip
