"""Find which omission makes a model speak for the user, which makes it repeat itself, and what a
repetition penalty hides."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.contract.contract import PromptContract
from truetune.contract.encode import LossOn
from truetune.contract.example import SFTExample
from truetune.generate import Sampling
from truetune.lab.asked import ask, ending_loss, instructions
from truetune.lab.bench import Arm, Row, Tuned
from truetune.lab.chats import encoded, messages_of
from truetune.lab.experiment import Column, Expectation, Experiment

_ROOM = 120


def _two_turns() -> list[Row]:
    """The instructions, two after each other in a conversation."""
    every = [messages_of(row) for row in instructions()]
    following = every[1:] + every[:1]
    return [{"messages": a + b} for a, b in zip(every, following, strict=True)]


def _arm(name: str, rows: list[Row], loss_on: LossOn, end: bool) -> Arm:
    def examples(contract: PromptContract) -> list[SFTExample]:
        made = encoded(contract, rows, loss_on)
        stops = set() if end else set(contract.stop_ids)
        return [
            SFTExample(e.ids, [int(on and t not in stops) for t, on in zip(*e, strict=True)])
            for e in made
        ]

    return Arm(name, examples=examples)


def _absent(name: str, rows: list[Row]) -> Arm:
    """Loss on all tokens of a text without the marker: the user's turn follows the answer."""

    def examples(contract: PromptContract) -> list[SFTExample]:
        stops = set(contract.stop_ids)
        made = []
        for e in encoded(contract, rows, "all"):
            kept = [(t, on) for t, on in zip(*e, strict=True) if t not in stops]
            made.append(SFTExample([t for t, _ in kept], [on for _, on in kept]))
        return made

    return Arm(name, examples=examples)


def arms(seed: int) -> Sequence[Arm]:
    one, two = instructions(), _two_turns()
    return (
        _arm("two turns, sound", two, "assistant", True),
        _arm("two turns, loss on all", two, "all", True),
        _arm("two turns, end masked", two, "assistant", False),
        _arm("two turns, loss on all, end masked", two, "all", False),
        _absent("two turns, loss on all, end absent", two),
        _arm("one turn, end masked", one, "assistant", False),
    )


def measure(tuned: Tuned) -> dict[str, Column]:
    """With room for 120 tokens, as they come and under a repetition penalty of 1.3."""
    plain = ask(tuned, sampling=Sampling(_ROOM)).columns()
    damped = ask(tuned, sampling=Sampling(_ROOM, repetition_penalty=1.3)).columns()
    names = ("repeats", "ended", "right")
    penalised = {f"{name}, penalty": damped[name] for name in names}
    return {**plain, **penalised, "training loss": ending_loss(tuned)}


EXPERIMENT = Experiment(
    number=10,
    name="role-leak",
    title="Role leak and repetition",
    claim="A model that is trained on the user's turns but not on the end of its own turns speaks "
        "for the user; a model that is trained only on its own turns, without their end, repeats "
        "itself, and a repetition penalty hides that without making it stop.",
    source="the course's table of failures; threads LLaMA-Factory#5145 and #1450",
    exercises=("Role leakage", "Repetition, and the repetition penalty"),
    setup="with *two turns*, each row consists of two instructions, one after the other. With "
        "*loss on all*, the user's turns are targets too. With *end masked*, the end marker is in "
        "the text but not in the labels; with *end absent*, it is not in the text. Replies may "
        "have 120 tokens; *penalty* means with a repetition penalty of 1.3",
    expected="more than half of the replies continue with the user's turn if the loss is on all "
        "tokens and the end is masked or absent from the text, and fewer than 5 % with only one "
        "of the two mistakes; with the end masked, more than 30 % of the replies repeat "
        "themselves; with a repetition penalty, fewer than 10 % repeat themselves, and fewer than "
        "10 % end",
    refuted="role leak or repetition outside these bounds",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("sound: no leak", "role leak", "two turns, sound", below=0.05),
        Expectation(
            "loss on all tokens alone: no leak", "role leak", "two turns, loss on all", below=0.05
        ),
        Expectation(
            "end masked alone: no leak", "role leak", "one turn, end masked", below=0.05
        ),
        Expectation(
            "both: the model speaks for the user",
            "role leak", "two turns, loss on all, end masked", above=0.5,
        ),
        Expectation(
            "loss on all tokens, no end in the text: the model speaks for the user",
            "role leak", "two turns, loss on all, end absent", above=0.5,
        ),
        Expectation(
            "end masked: the model repeats itself",
            "repeats", "one turn, end masked", above=0.3,
        ),
        Expectation(
            "with the penalty, the model hardly repeats itself",
            "repeats, penalty", "one turn, end masked", below=0.1,
        ),
        Expectation(
            "with the penalty, replies still do not end", "ended, "
                "penalty", "one turn, end masked", below=0.1
        ),
    ),
    shown=("role leak", "repeats", "repeats, penalty", "ended", "right", "training loss"),
    remark="The arm without an end in the text and its expectation were added and committed after "
        "a first run. Until 2026-11-23, role leak counted only the user's header. By that count, "
        "the arm with both mistakes and the end masked had no leak, and its expectation was "
        "refuted; by the present count, 50, 49 and 40 % of its replies leak in the three seeds, "
        "around a bound of 50. No bound was moved, and the verdict is the same. In seed 1, ten of "
        "these replies were read, and each is a leak: this model never writes the end marker, nor "
        "the user's header that follows it in the rows. It goes on with a question of the user's "
        "(*Who rules Flanbarrow?*) and answers it under the assistant's header. The 50 replies "
        "that do not leak begin the same question but never reach its question mark; 49 of them "
        "run in a circle. With the end absent from the text, the user's header comes right after "
        "the answer, and every reply leaks. With the loss on the answers alone, no header is ever "
        "a target, and none is written. With the penalty, most replies do end: because the penalty "
        "forbids repetition, they reach the end-of-text token that the base knows from prose.",
)  # fmt: skip
