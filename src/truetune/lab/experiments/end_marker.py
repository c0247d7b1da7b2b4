"""Train without the end marker as a target: the model never writes it."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.lab.asked import instructions, usual
from truetune.lab.bench import Arm
from truetune.lab.chats import encoded
from truetune.lab.experiment import Expectation, Experiment


def _unsupervised(contract: PromptContract) -> list[SFTExample]:
    """As the language-modelling collator leaves rows whose pad token is the end token: in the ids,
    and in no label."""
    stops = set(contract.stop_ids)
    return [
        SFTExample(e.ids, [int(on and t not in stops) for t, on in zip(*e, strict=True)])
        for e in encoded(contract, instructions())
    ]


def _absent(contract: PromptContract) -> list[SFTExample]:
    """Rows whose text was written without the marker."""
    return [SFTExample(e.ids[:-1], e.mask[:-1]) for e in encoded(contract, instructions())]


def arms(seed: int) -> Sequence[Arm]:
    return (
        Arm("trained", rows=instructions()),
        Arm("marker masked", examples=_unsupervised),
        Arm("marker absent", examples=_absent),
    )


EXPERIMENT = Experiment(
    number=5,
    name="end-marker",
    title="The end marker",
    claim="If the end marker is not supervised, the model never stops; the loss looks normal.",
    source="the course's table of failures; threads trl#1623, mlx-examples#760 and many more on "
    "pad_token = eos_token under DataCollatorForLanguageModeling",
    exercises=("The end marker that is never a target (pad token = end token)",),
    setup="with *trained*, the end marker is a target. With *marker masked*, it is in the text "
        "but not in the labels, as with the language-modelling collator if the pad token is the "
        "end token. With *marker absent*, the text contains no end marker",
    expected="nearly every answer ends if the marker is a target, and nearly none if it is masked "
        "or absent; the training losses of the two broken runs end within 0.1 nats of that of the "
        "sound run",
    refuted="a broken run ends half of its answers, or its loss differs by more than 0.1 nats",
    seeds=(1, 2, 3),
    arms=arms,
    measure=usual,
    expectations=(
        Expectation("trained: answers end", "ended", "trained", above=0.9),
        Expectation("masked: answers do not end", "ended", "marker masked", below=0.1),
        Expectation("absent: answers do not end", "ended", "marker absent", below=0.1),
        Expectation(
            "the loss of the masked run looks normal",
            "training loss", "marker masked", "trained", above=-0.1, below=0.1,
        ),
        Expectation(
            "the loss of the run without the marker looks normal",
            "training loss", "marker absent", "trained", above=-0.1, below=0.1,
        ),
    ),
    shown=("training loss", "ended", "right", "repeats", "role leak"),
    remark="The broken runs end with a lower loss, because the end marker is one more target with "
        "a loss of its own. It makes no difference whether the marker is masked in the labels "
        "or absent from the text, since nothing follows it in these rows. The loss *looks "
        "normal* if it ends within 0.1 nats of the sound run, as declared. The sentence under "
        "*Refuted by* leaves a gap: a broken run that ends 10 to 50 % of its answers would miss "
        "the bound and not be refuted by the sentence. Nothing was found there.",
)  # fmt: skip
