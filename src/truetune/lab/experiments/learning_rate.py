"""Sweep the learning rate from what works to what destroys."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.lab.asked import instructions, recall, usual
from truetune.lab.bench import Arm, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment

_FULL = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3)
_LORA = (1e-4, 1e-3, 3e-3)


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def arms(seed: int) -> Sequence[Arm]:
    full = [
        Arm(f"all weights {_rate(lr)}", rows=instructions(), recipe={"learning_rate": lr})
        for lr in _FULL
    ]
    lora = [
        Arm(
            f"LoRA {_rate(lr)}",
            rows=instructions(),
            recipe={
                "learning_rate": lr,
                "lora": True,
                "lora_dropout": 0.0,
                # The rows of the chat markers in the vocabulary were never trained.
                "add_token": ["<|user|>", "<|assistant|>", "<|end|>"],
            },
        )
        for lr in _LORA
    ]
    return [Arm("base"), *full, *lora]


def measure(tuned: Tuned) -> dict[str, Column]:
    return {**usual(tuned), "recall in prose": recall(tuned)}


EXPERIMENT = Experiment(
    number=8,
    name="learning-rate",
    title="Learning rate, and LoRA compared with all weights",
    claim="5 to 20 % of the pretraining rate teaches without damage; a rate far above it makes "
        "the model forget what it knew; LoRA needs about ten times the rate of full fine-tuning.",
    source="the course's sweep of learning rates; Schulman et al. 2025, LoRA Without Regret",
    exercises=("Learning-rate sweep and catastrophic forgetting", "LoRA against all weights"),
    setup="the arms train all weights at five rates, and LoRA at three rates (rank 16, all linear "
        "layers, no dropout, with the embeddings of the chat markers trained by `--add-token`)",
    expected="the base was pretrained at 2e-3, later at 1.2e-3. At 1e-4 and 3e-4 (5 and 15 %), "
        "more than 90 % of the answers are right, and at 1e-5 (0.5 %) fewer than 50 %; at 3e-3, "
        "recall in prose falls by more than 30 points; LoRA at 1e-4 is more than 20 points behind "
        "all weights at 1e-4, and LoRA at 1e-3 is within 10 points",
    refuted="right answers or recall outside these bounds",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("0.5 % of the pretraining rate is too "
            "little", "right", "all weights 1e-5", below=0.5),
        Expectation("5 % is enough", "right", "all weights 1e-4", above=0.9),
        Expectation("15 % is enough", "right", "all weights 3e-4", above=0.9),
        Expectation(
            "150 % makes the model forget what it knew",
            "recall in prose", "all weights 3e-3", "base", below=-0.3,
        ),
        Expectation(
            "LoRA at the same rate lags behind", "right", "LoRA "
                "1e-4", "all weights 1e-4", below=-0.2
        ),
        Expectation(
            "LoRA at ten times the rate is as good",
            "right", "LoRA 1e-3", "all weights 1e-4", above=-0.1, below=0.1,
        ),
    ),
    shown=("training loss", "right", "recall in prose", "prose", "ended"),
    remark="At 3e-3, the model still ends every reply and writes sentences of the right form with "
        "wrong names. Judged by form and loss alone, the run looks successful. *Without damage* "
        "has no bound of its own: the declared bounds for 5 and 15 % are about right answers "
        "alone, and so *reproduced* does not speak of it. What the table shows: at 1e-4 (5 %), "
        "recall falls by 1 point and the loss on prose rises from 0.76 to 0.92; at 3e-4 (15 %), "
        "recall falls by 4 points and the loss on prose nearly doubles (1.43). Only the lower "
        "end of 5 to 20 % does little damage. LoRA at ten times the rate gives as many right "
        "answers but is not gentler: its loss on prose (1.58) is higher than that of all "
        "weights at 1e-4 (0.92) and at 3e-4.",
)  # fmt: skip
