"""The vital signs of a run at one step, and how to judge a series of them.

input   Vitals of step 0 and of each interval: losses and shares of replies, plain numbers
does    compares the latest values with the first and with the best so far: a base model does not
        stop before it is trained, so no value is wrong by itself
output  Findings; one of level error says that the run has collapsed

Every limit here was tried on healthy runs; docs/behaviour.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

from truetune.findings import Finding, Level


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """The vital signs at one step; a sign that was not measured is None. Losses are in nats per
    token.

    Attributes:
        step: the step after which they were measured; 0 before the first.
        loop_loss: mean training loss of the steps since the last measurement.
        held_out_loss: loss on the held-out examples, as served.
        trained_loss: loss on a fixed sample of the trained rows, as served.
        trained_error: standard error of `trained_loss`, from the differences between its rows.
        stop_loss: loss on the stop tokens alone that end the answers of that sample.
        keep_loss: loss on the text that must not be forgotten.
        stop_rate: share of the replies that end by themselves, among those that had room.
        reply_tokens: mean length of the replies, in tokens.
        repetition: share of replies that repeat themselves in a loop.
        role_leak: share of replies that write another turn of the conversation.
        open_thinking: share of replies that end, or reach their limit, inside a think block.
        empty: share of replies that end by themselves with nothing but whitespace.
        copied: share of replies that repeat the prompt.
        other_language: share of replies in a script that neither prompt nor answer uses.
        file_losses: median loss of a sample of each file's rows, if there are several files.
        file_left: share of the bytes of each file's answers that is left when they are compressed.
        examples: number of trained rows in the sample.
        prompts: number of prompts.
        seconds: duration of the measurement.
    """

    step: int
    loop_loss: float | None = None
    held_out_loss: float | None = None
    trained_loss: float | None = None
    trained_error: float | None = None
    stop_loss: float | None = None
    keep_loss: float | None = None
    stop_rate: float | None = None
    reply_tokens: float | None = None
    repetition: float | None = None
    role_leak: float | None = None
    open_thinking: float | None = None
    empty: float | None = None
    copied: float | None = None
    other_language: float | None = None
    file_losses: Mapping[str, float] | None = None
    file_left: Mapping[str, float] | None = None
    examples: int = 0
    prompts: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the known values, as a line of metrics.jsonl."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {"step": self.step, "probe": True, **known}

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> Vitals:
        """Restore vital signs from a line that `as_dict` made."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in line.items() if name in names})


@dataclass(frozen=True)
class Regime:
    """How a run is trained, as far as advice depends on it.

    Attributes:
        lora: whether adapters are trained.
        rate, usual_rate: the learning rate, and the default of this method, model and rows; None
            if they are not known.
        guessing: nats per token of a guess among the whole vocabulary; None if not known.
    """

    lora: bool = False
    rate: float | None = None
    usual_rate: float | None = None
    guessing: float | None = None

    @property
    def far(self) -> bool:
        """Whether the learning rate is far above the usual one."""
        return bool(self.rate and self.usual_rate and self.rate > _FAR * self.usual_rate)

    @property
    def gentler(self) -> str:
        """A lower learning rate, as advice."""
        if self.far and self.rate and self.usual_rate:
            usual, factor = self.usual_rate, self.rate / self.usual_rate
            return (
                f"use --learning-rate {usual:g}, the usual one for this run "
                f"({factor:.2g} times lower)"
            )
        return "use a third of the --learning-rate"


# Above the usual rate, from where a third of it is no way back.
_FAR = 3.0


def judge(history: Sequence[Vitals], regime: Regime = Regime()) -> list[Finding]:
    """Judge the latest vital signs by comparing them with the earlier ones."""
    if not history or not history[-1].step:
        return []
    return [finding for rule in _RULES for finding in rule(history, regime)]


def _numbers(history: Sequence[Vitals], name: str) -> list[float]:
    """The known values of a sign over time; [] if it is missing in the last measurement."""
    if getattr(history[-1], name) is None:
        return []
    return [value for value in (getattr(v, name) for v in history) if value is not None]


def _at(history: Sequence[Vitals]) -> str:
    return f"step {history[-1].step:,}"


# ------------------------------------------------------------------------------------ losses

# A share and nats above the loss before the first step: no training that serves makes its own
# rows, or rows like them, less likely than they were.
_WORSE, _WORSE_NATS = 1.10, 0.15


def _worse_than_untrained(history: Sequence[Vitals], regime: Regime) -> Iterator[Finding]:
    for name, of in (("held_out_loss", "held-out rows"), ("trained_loss", "trained rows")):
        losses = _numbers(history, name)
        if len(losses) > 1 and _is_worse(losses):
            yield Finding(
                "worse-than-untrained",
                "error",
                f"at {_at(history)} the loss of {of}, as served, is {losses[-1]:.2f} nats per "
                f"token; before the first step it was {losses[0]:.2f}",
                why="the learning rate is too high, the answers do not depend on their "
                "questions, or the labels differ from what is served",
                fix=f"{regime.gentler}; with another trainer, check the labels with "
                "`truetune.audit(trainer)`",
            )
            return


# Above the best that trained rows were, by so much: what was learned is destroyed.
_UNLEARNED, _UNLEARNED_NATS = 1.3, 0.4


def _is_worse(losses: Sequence[float]) -> bool:
    """Whether the last one is above the first by too much."""
    return losses[-1] > _WORSE * losses[0] + _WORSE_NATS


def _is_unlearned(losses: Sequence[float]) -> bool:
    """Whether the last one is above the lowest by too much."""
    return losses[-1] > _UNLEARNED * min(losses) + _UNLEARNED_NATS


def is_suspect(losses: Sequence[float]) -> bool:
    """Whether the held-out losses alone, in order, are a reason to look closer."""
    return bool(losses) and (_is_worse(losses) or _is_unlearned(losses))


def _unlearned(history: Sequence[Vitals], regime: Regime) -> Iterator[Finding]:
    losses = _numbers(history, "trained_loss")
    if len(losses) > 1 and _is_unlearned(losses):
        yield Finding(
            "unlearned",
            "error",
            f"at {_at(history)} the loss of trained rows, as served, is {losses[-1]:.2f} nats per "
            f"token; it had fallen to {min(losses):.2f}",
            why="the last rows are unlike the others, the weights were changed from outside, or "
            "the learning rate is too high",
            fix=f"inspect the rows of the last steps; {regime.gentler}",
        )


# The loop's own loss and that of the same rows as served are one number, up to the choice of rows
# and to dropout: times and nats of which either is too much, on so many rows at least.
_APART, FEWEST_EXAMPLES = ((2.0, 0.5), (3.0, 0.1)), 8
# Standard errors of the sample that are allowed for: two of them miss supervised padding.
_ERRORS = 1.0


def _another_loss(history: Sequence[Vitals], _: Regime) -> Iterator[Finding]:
    served, loop = history[-1].trained_loss, history[-1].loop_loss
    if served is None or loop is None or history[-1].examples < FEWEST_EXAMPLES:
        return
    # A few long rows of another kind, of which the sample happens to hold more, are no other loss.
    surely = served - _ERRORS * (history[-1].trained_error or 0.0)
    if any(surely > times * loop + nats for times, nats in _APART):
        yield Finding(
            "loss-not-of-answers",
            "error",
            f"at {_at(history)} the training loss is {loop:.2f} nats per token, but the same "
            f"rows, rendered as served, have a loss of {served:.2f}",
            why="the loss counts tokens outside the answers (padding, the prompt), is shifted, "
            "or the rows were rendered with a different template from the one that is served",
            fix="compare a batch with what is served, using `truetune.audit(trainer)`",
        )


# Times its best, twice in a row, while the trained rows go on getting likelier. Runs that are well
# rise a little: InstructGPT's (Ouyang et al. 2022) overfitted after one of its sixteen passes, and
# still got better at following instructions.
_RISING, _RISEN, _RISEN_NATS = 1.15, 1.5, 0.05


def _memorising(history: Sequence[Vitals], _: Regime) -> Iterator[Finding]:
    losses = _numbers(history, "held_out_loss")
    trained = history[-1].trained_loss
    if len(losses) < 4 or trained is None or trained > losses[-1] / 2:
        return
    best = min(losses)
    risen = min(losses[-2:]) - _RISEN_NATS
    if risen > _RISING * best:
        level: Level = "error" if risen > _RISEN * best else "note"
        step = next(v.step for v in history if v.held_out_loss == best)
        yield Finding(
            "memorising",
            level,
            f"the held-out loss rose from {best:.2f} at step {step:,} to {losses[-1]:.2f} at "
            f"{_at(history)}, while trained rows fell to {trained:.2f} nats per token",
            why="the model memorises the rows: too many epochs, duplicate rows, or answers that "
            "do not follow from their questions",
            fix=f"stop at step {step:,} with --max-steps, remove duplicates (`truetune check`), "
            "or add rows",
        )


# How many times less likely a token of text that is not trained becomes. Rows that are strange to
# a small base cost it three times on the way, and are learned.
_FORGOTTEN: tuple[tuple[float, Level], ...] = ((100, "error"), (10, "warning"), (3, "note"))
# Nats a token of the rows before the first step, above which they are another language to the
# model: a choice among 400 tokens. Who learns one from nothing gives up much of the own.
_FOREIGN = 6.0


def _times(nats: float) -> str:
    """How many times less likely a token becomes; numbers above a thousand are not shown."""
    return f"{math.exp(nats):,.0f}" if nats < math.log(1000) else "over a thousand"


def _forgetting(history: Sequence[Vitals], regime: Regime) -> Iterator[Finding]:
    losses = _numbers(history, "keep_loss")
    if len(losses) < 2:
        return
    more = losses[-1] - losses[0]
    level = next((level for times, level in _FORGOTTEN if more > math.log(times)), None)
    rows = _numbers(history, "trained_loss")
    foreign = bool(rows) and rows[0] > _FOREIGN
    if level:
        yield Finding(
            "forgetting",
            "note" if foreign and level == "warning" else level,
            f"the loss on text outside the training data rose by {more:.2f} nats per token by "
            f"{_at(history)} "
            f"({losses[0]:.2f} to {losses[-1]:.2f}): on average each token is "
            f"{_times(more)} times less likely",
            why="the learning rate is far above the usual one for this method, model and rows"
            if regime.far
            else f"the rows were very unlike what the model knew ({rows[0]:.1f} nats per token "
            "before the first step): learning them displaces earlier knowledge"
            if foreign
            else "the model forgets what it knew: the learning rate is too high, or there are "
            "too many epochs over rows of one kind",
            fix=f"{regime.gentler}, {'' if regime.lora else '--lora, '}fewer epochs, or some rows "
            "like the model's earlier training data",
        )


# The rest of the answers is learned by so much while their stop is not: the stop is no target.
_STOP_LEFT, _STOP_NATS, _LEARNED = 0.8, 1.5, 0.7
# Nats a token of answers that are learned so far that their stop is to be as well: who still learns
# words unlearns at first to stop early.
_KNOWN = 2.0
# A stop token is unlearned if its loss is this many nats above its first value.
_STOP_LOST = 2.0


def _stop_not_learned(history: Sequence[Vitals], _: Regime) -> Iterator[Finding]:
    stops, trained = _numbers(history, "stop_loss"), _numbers(history, "trained_loss")
    if len(stops) < 3:
        return
    # The stop token is learned after the words, so one interval proves nothing.
    first, now = stops[0], min(stops[-2:])
    known = bool(trained) and trained[-1] < _KNOWN
    learned = known and len(trained) > 1 and trained[-1] < _LEARNED * trained[0]
    kept = now > max(_STOP_LEFT * first, _STOP_NATS) and learned
    lost = now > first + _STOP_LOST and now > _STOP_NATS and (known or first < _STOP_NATS)
    if kept or lost:
        yield Finding(
            "stop-not-learned",
            "error",
            f"at {_at(history)} the stop token after trained answers has a loss of {now:.2f} "
            f"nats; before the first step it was {first:.2f}"
            + (f", while the loss of the answers fell to {trained[-1]:.2f}" if learned else ""),
            why="the stop token is not supervised: it is masked as padding, or cut off by a "
            "length limit"
            if kept
            else "the model is forgetting how to stop",
            fix="`truetune check` shows which tokens are supervised; train on answers that are "
            "not cut off",
        )


# A fixed sample of trained rows that has moved by less than this share after so many intervals.
_MOVED, _INTERVALS, _STEPS = 0.002, 3, 20


def _stands_still(history: Sequence[Vitals], _: Regime) -> Iterator[Finding]:
    losses = _numbers(history, "trained_loss")
    if len(losses) <= _INTERVALS or history[-1].step < _STEPS or not losses[0]:
        return
    most = max(abs(loss - losses[0]) for loss in losses)
    if most < _MOVED * losses[0]:
        yield Finding(
            "nothing-learned",
            "error" if most == 0 else "warning",
            f"the loss of trained rows has not changed: {losses[0]:.4f}, then {losses[-1]:.4f} "
            f"nats per token at {_at(history)}",
            why="no weight changes: the adapter is frozen or inactive, or the learning rate is "
            "far too low",
            fix="triple the --learning-rate, or check which parameters are trained",
        )


# Shares of its loss before the first step: what the rows of one file still have, and what those of
# the others have at most; and times the loss of the others that it has.
_KEPT, _FELL, _APART_FROM_OTHERS = 0.9, 0.6, 2.0
# Of the nats of a guess among all tokens, what rows have of which nothing is learned.
_LIKE_GUESSING = 0.8
# What zlib leaves of random characters is 0.85, of base64 0.76; of a thousand bytes of prose or
# code 0.6 at most.
_NOISE = 0.7


def _one_file(history: Sequence[Vitals], regime: Regime) -> Iterator[Finding]:
    """Twice in a row, the rows of one file are no likelier than before, and those of the others
    are."""
    measured = [v.file_losses for v in history if v.file_losses]
    if len(measured) < 3 or history[-1].file_losses is None:
        return
    names = [name for name in measured[-1] if all(name in losses for losses in measured)]
    for name in names:
        noise = (history[-1].file_left or {}).get(name, 0.0) >= _NOISE
        least = 0.0 if noise else _least(measured[0][name], regime)
        others = [other for other in names if other != name]
        if not all(_apart(name, others, measured[0], now, least) for now in measured[-2:]):
            continue
        rest = median(measured[-1][other] for other in others)
        yield Finding(
            "file-not-learned",
            "warning" if noise else "note",
            f"at {_at(history)} the rows of {name} have a loss of {measured[-1][name]:.2f} nats "
            f"per token ({measured[0][name]:.2f} before the first step); the median of the other "
            f"files is {rest:.2f}",
            name,
            why="its answers hardly compress, like random characters: they are damaged, encrypted "
            "or encoded"
            if noise
            else "these rows may be damaged, or harder than the others (another language, code): "
            "the loss alone cannot tell the two apart",
            fix="inspect the rows named here, and train without the file if they are damaged",
        )


def _least(first: float, regime: Regime) -> float:
    """From which loss on the rows of a file are not learned."""
    kept = _KEPT * first
    return kept if regime.guessing is None else min(kept, _LIKE_GUESSING * regime.guessing)


def _apart(
    name: str,
    others: Sequence[str],
    first: Mapping[str, float],
    now: Mapping[str, float],
    least: float,
) -> bool:
    """Whether the others are learned, and this file is not."""
    if not others or now[name] < least:
        return False
    fell = median(now[other] / max(first[other], 1e-9) for other in others) <= _FELL
    return fell and now[name] >= _APART_FROM_OTHERS * median(now[other] for other in others)


# ----------------------------------------------------------------------------------- replies

# Of so few prompts a share jumps: these limits are more than three of eight, and six of eight.
_FEWEST_PROMPTS = 4
# After fewer steps a reply says what the model was, not what it learns.
_FEWEST_STEPS = 10
_SOME, _SOME_MORE = 0.5, 0.375
_MOST, _MOST_MORE = 0.75, 0.6
_ALL = 0.875

_LOOK = "compare the replies in samples.jsonl with the training rows"
# A vital sign, and the finding about replies that show it.
_BAD_REPLIES = (
    (
        "repetition",
        Finding(
            "replies-repeat",
            "error",
            "replies repeat themselves in a loop",
            why="the model has collapsed into its most likely words: the learning rate is too "
            "high, or answers in the data repeat themselves",
            fix=_LOOK,
        ),
    ),
    (
        "role_leak",
        Finding(
            "role-leak",
            "error",
            "replies continue with another turn of the conversation",
            why="answers in the data contain the next user turn, or the stop token is not learned",
            fix=_LOOK,
        ),
    ),
    (
        "open_thinking",
        Finding(
            "thinking-open",
            "error",
            "replies never close their think block",
            why="reasoning in the rows is cut off, or its closing marker is not supervised",
            fix=_LOOK,
        ),
    ),
    (
        "empty",
        Finding(
            "replies-empty",
            "error",
            "replies are empty",
            why="the model has learned only the stop token: padding is supervised, or answers "
            "are empty",
            fix=_LOOK,
        ),
    ),
    (
        "copied",
        Finding(
            "replies-copy",
            "error",
            "replies repeat the prompt",
            why="the prompt is supervised, or answers repeat their questions",
            fix=_LOOK,
        ),
    ),
    (
        "other_language",
        Finding(
            "replies-switch-script",
            "error",
            "replies are in a script that neither the prompt nor the expected answer uses",
            why="there are rows in other languages, or the model is breaking down",
            fix=_LOOK,
        ),
    ),
)


def _best(history: Sequence[Vitals], name: str) -> float:
    """Return the best value of a bad sign before the first step, or after the rows were learned:
    what a model does by chance while it learns words is no standard."""
    found = [
        value
        for at, v in enumerate(history[:-2])
        if (value := getattr(v, name)) is not None
        and (not at or (v.trained_loss is not None and v.trained_loss < _KNOWN))
    ]
    return min(found, default=1.0)


# Replies of a model that is too small for its rows, or has seen too few of them, show these too:
# the 5M base on GSM8K went round in a circle from step 20 to 100 while the loss of its rows fell
# from 10.9 to 2.7 nats per token.
_OF_WEAK_MODELS = ("repetition", "copied", "other_language")
# The lowest loss so far, up to sampling noise.
_LOWEST = 1.02


def _still_learns(history: Sequence[Vitals]) -> bool:
    """Whether the rows are not known yet, and their loss has never been lower than now."""
    losses = _numbers(history, "trained_loss")
    return bool(losses) and losses[-1] >= _KNOWN and losses[-1] <= _LOWEST * min(losses)


def _bad_replies(history: Sequence[Vitals], _: Regime) -> Iterator[Finding]:
    if history[-1].prompts < _FEWEST_PROMPTS or history[-1].step < _FEWEST_STEPS:
        return
    for name, said in _BAD_REPLIES:
        found = _numbers(history, name)
        if len(found) < 3:
            continue
        # Twice in a row: on its way from a base a model passes through much, but not through all
        # replies going on with another turn.
        now, best = min(found[-2:]), _best(history, name)
        if name == "role_leak" and found[-1] >= _ALL:
            now = found[-1]
        level: Level | None = None
        if now >= _SOME and now >= best + _SOME_MORE:
            level = "warning"
        if now >= _MOST and now >= best + _MOST_MORE:
            level = "error"
        if level and name in _OF_WEAK_MODELS and _still_learns(history):
            level = "note"
        if level:
            yield replace(
                said,
                level=level,
                what=f"{found[-1]:.0%} of the replies to {history[-1].prompts} fixed prompts "
                f"{said.what.removeprefix('replies ')} at {_at(history)}; the share was "
                f"{best:.0%} before",
            )


def _stops_lost(history: Sequence[Vitals], regime: Regime) -> Iterator[Finding]:
    found = _numbers(history, "stop_rate")
    # A base that ends its texts now and then has not learned to stop.
    known = [
        v.stop_rate
        for v in history[:-2]
        if v.stop_rate is not None and (v.stop_loss is None or v.stop_loss < _STOP_NATS)
    ]
    if len(found) < 3 or not known or history[-1].prompts < _FEWEST_PROMPTS:
        return
    if history[-1].step < _FEWEST_STEPS:
        return
    now, best = max(found[-2:]), max(known)
    level: Level | None = None
    if now <= 1 - _SOME and now <= best - _SOME_MORE:
        level = "warning"
    if now <= 1 - _MOST and now <= best - _MOST_MORE:
        level = "error"
    if level:
        yield Finding(
            "stops-lost",
            level,
            f"{now:.0%} of the replies to {history[-1].prompts} fixed prompts end by themselves "
            f"at {_at(history)}; the highest share was {best:.0%}",
            why="the model is forgetting how to stop: the learning rate is too high, or the ends "
            "of answers are cut off or masked",
            fix=f"{regime.gentler}; `truetune check` shows whether the stop token is supervised",
        )


_RULES = (
    # What replies show names the cause best.
    _bad_replies,
    _worse_than_untrained,
    _unlearned,
    _another_loss,
    _memorising,
    _forgetting,
    _stop_not_learned,
    _stops_lost,
    _stands_still,
    _one_file,
)
