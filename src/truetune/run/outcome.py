"""Judge whether a run has clearly learned, by its replies to served prompts and by its losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from truetune.contract.example import SFTExample
from truetune.findings import Finding

# Longest answer of a row that is asked for, in tokens: what is short is wholly right or wrong.
SHORT = 24
# Nats a token, of rows that the model was trained on: a probability of 37 %.
_UNSURE = 1.0
# Share by which a held-out loss still fell between the last two evaluations of a run that ended
# early, and by which it rose over its best in one that went on too long.
_FALLING, _RISEN = 0.05, 0.10


@dataclass(frozen=True)
class Answer:
    """A prompt asked as it will be served.

    Attributes:
        trained: whether the row was trained on.
        where: the row.
        expected: its answer, as tokens decoded without the stop.
        text: what the model wrote.
        stopped: whether it ended by itself.
        had_room: whether it was given twice the tokens of the row's answer, and more.
        would_stop: whether the model would stop behind the row's own answer; None if unknown.
    """

    trained: bool
    where: str
    expected: str
    text: str
    stopped: bool
    had_room: bool = True
    would_stop: bool | None = None

    @property
    def ends(self) -> bool | None:
        """Whether the model ends its answer; None if neither can say."""
        return self.stopped if self.had_room else self.would_stop

    @property
    def right(self) -> bool:
        return self.stopped and self.text.strip() == self.expected.strip()


@dataclass(frozen=True)
class Outcome:
    """What is known of a run when its last step is done.

    Attributes:
        answers: to trained and to held-out prompts.
        first_loss, last_loss: of training, each the mean of a few steps, in nats per token.
        held_out: (step, loss) of each evaluation.
        steps: that were taken.
        learning_rate: the peak.
        passes: over the rows.
        by_steps: whether the run's length was given in steps.
        usual_rate: the default learning rate of this method, model and rows; None if unknown.
    """

    answers: tuple[Answer, ...]
    first_loss: float
    last_loss: float
    held_out: tuple[tuple[int, float], ...]
    steps: int
    learning_rate: float
    passes: float
    by_steps: bool = False
    usual_rate: float | None = None

    @property
    def trained(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.trained and answer.had_room]


def short_rows(examples: Sequence[SFTExample], most: int) -> list[int]:
    """Examples of one short answer, spread over the rows: what is asked costs little, and is
    wholly right or wrong."""
    fitting = [
        row
        for row, example in enumerate(examples)
        if 0 < example.num_supervised <= SHORT and _is_one_answer(example)
    ]
    step = max(len(fitting) // most, 1)
    return fitting[::step][:most]


def _is_one_answer(example: SFTExample) -> bool:
    """A prompt, then one stretch that is supervised."""
    first = example.mask.index(1)
    return first > 0 and all(example.mask[first : first + example.num_supervised])


def judge(outcome: Outcome) -> list[Finding]:
    """Return what is clearly wrong, each with the setting to change; nothing for a run that may
    be healthy."""
    return [finding for rule in _RULES for finding in rule(outcome)]


def summary(answers: Sequence[Answer]) -> str:
    """A line for the screen; empty if nothing was asked."""
    parts = [
        f"{sum(a.right for a in some)} of {len(some)} {name} prompts"
        for name, some in (
            ("training", [a for a in answers if a.trained and a.had_room]),
            ("held-out", [a for a in answers if not a.trained]),
        )
        if some
    ]
    ends = [a.ends for a in answers if a.ends is not None]
    return (
        f"{', '.join(parts)} get their row's answer; {sum(ends)} of {len(ends)} replies ended"
        if parts
        else ""
    )


def _not_ended(outcome: Outcome) -> Iterator[Finding]:
    """Answers that had twice the room that they need; of longer ones, what the model predicts
    behind the row's own."""
    asked = [a for a in outcome.answers if a.ends is not None]
    open_ones = [a for a in asked if not a.ends]
    if len(asked) >= 3 and 2 * len(open_ones) >= len(asked):
        shown = next((a for a in open_ones if a.had_room), None)
        number = f"{len(open_ones)} of {len(asked)}"
        yield Finding(
            "answers-do-not-end",
            "warning",
            f"the answers to {number} served prompts never stop"
            if shown
            else f"at the end of the row's own answer, the stop token is not the likeliest next "
            f"token for {number} prompts",
            open_ones[0].where,
            len(open_ones),
            why="the run was too short, or its learning rate too low, for the model to learn to "
            "stop" + (f"; it writes {_quoted(shown.text)}" if shown else ""),
            fix=f"use {_more(outcome)}",
        )


def _not_learned(outcome: Outcome) -> Iterator[Finding]:
    """Report wrong answers to short training prompts: a warning if the loss on the rows is still
    high, a note if it is not and every answer is another one."""
    asked = outcome.trained
    wrong = [a for a in asked if not a.right]
    unsure = outcome.last_loss > _UNSURE
    if len(asked) >= 3 and len(wrong) >= (0.75 if unsure else 1) * len(asked):
        yield Finding(
            "rows-not-learned",
            "warning" if unsure else "note",
            f"{len(wrong)} of {len(asked)} training prompts get an answer that "
            "differs from that of the row",
            wrong[0].where,
            len(wrong),
            why=f"the loss ended at {outcome.last_loss:.2f} nats per token, from "
            f"{outcome.first_loss:.2f}: on average the model gives the next token of the trained "
            f"answers a probability of {100 * math.exp(-outcome.last_loss):.0f} %; it writes "
            f"{_quoted(wrong[0].text)} for {_quoted(wrong[0].expected)}",
            fix=f"use {_more(outcome)}"
            if unsure
            else f"nothing to do if other answers are as good; to learn these, use "
            f"{_longer(outcome)}",
        )


def _ended_early(outcome: Outcome) -> Iterator[Finding]:
    """A held-out loss that was still falling fast, though the rate had fallen."""
    losses = [loss for _, loss in outcome.held_out]
    if len(losses) < 4:
        return
    before, last = losses[-2:]
    if last < (1 - _FALLING) * before and last == min(losses):
        yield Finding(
            "held-out-falling",
            "note",
            f"the held-out loss was still falling at the end: {before:.3f}, then {last:.3f}",
            why="the run ended before the model had learned what the rows can teach",
            fix=f"use {_longer(outcome)}",
        )


def _went_too_far(outcome: Outcome) -> Iterator[Finding]:
    losses = [loss for _, loss in outcome.held_out]
    if len(losses) < 3:
        return
    best = min(outcome.held_out, key=lambda pair: pair[1])
    if losses[-1] > (1 + _RISEN) * best[1] and best[0] < outcome.held_out[-1][0]:
        yield Finding(
            "held-out-rising",
            "note",
            f"the held-out loss rose from {best[1]:.3f} at step {best[0]:,} to {losses[-1]:.3f}",
            why="the model memorises the rows after that step",
            fix=f"use {_shorter(outcome, best[0])}, a lower --learning-rate, or more rows",
        )


_RULES = (_not_ended, _not_learned, _ended_early, _went_too_far)


def _more(outcome: Outcome) -> str:
    """What to change: up to three times the rate, and no more than is usual, where the loss hardly
    moved, else three times the passes."""
    rate = float(f"{3 * outcome.learning_rate:.0e}")
    if outcome.usual_rate is not None:
        rate = min(rate, outcome.usual_rate)
    if outcome.last_loss > 0.5 * outcome.first_loss and rate > 1.2 * outcome.learning_rate:
        return f"--learning-rate {rate:g}, or {_longer(outcome)}"
    return _longer(outcome)


def _shorter(outcome: Outcome, steps: int) -> str:
    if outcome.by_steps:
        return f"--max-steps {steps}"
    return f"--epochs {outcome.passes * steps / max(outcome.steps, 1):.2g}"


def _longer(outcome: Outcome) -> str:
    if outcome.by_steps:
        return f"--max-steps {3 * outcome.steps} (this run: {outcome.steps})"
    passes = max(round(3 * outcome.passes), 2)
    return f"--epochs {passes} (this run: {outcome.passes:.3g})"


def _quoted(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= most else text[: most - 1].rstrip() + "\u2026")


def mean(losses: Iterable[float]) -> float:
    values = list(losses)
    return sum(values) / len(values) if values else float("nan")
