"""Generate replies to a few short training prompts at the end of a run, as they will be served.
Held-out prompts were answered with the last vital signs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from truetune.behaviour.measure import greedy_replies
from truetune.behaviour.replies import ask
from truetune.contract.contract import PromptContract
from truetune.model.load import LoadedModel
from truetune.recipe.plan import Plan, suggested_rate
from truetune.run.outcome import Answer, Outcome, mean, short_rows
from truetune.run.prepare import Prepared

# Trained prompts asked at the end.
_NUM_PROMPTS = 4


def trained_answers(
    loaded: LoadedModel, contract: PromptContract, prepared: Prepared
) -> list[Answer]:
    """Answers to a few short rows that were trained."""
    chosen = short_rows(prepared.examples, _NUM_PROMPTS)
    examples = [(prepared.examples[row], prepared.rows[row]) for row in chosen]
    asked = [one for example, where in examples if (one := ask(contract, example, where))]
    most = max((one.most_tokens for one in asked), default=1)
    said = greedy_replies(loaded, contract, asked, most)
    return [
        Answer(True, one.where, one.expected_text, reply.text, reply.stopped)
        for one, reply in zip(asked, said, strict=True)
    ]


def sampled_answers(samples: Iterable[dict[str, Any]]) -> list[Answer]:
    """The samples of the last evaluation: held-out ones, and trained ones whose answers are too
    long to be asked for again."""
    return [
        Answer(
            not sample["held_out"],
            str(sample["where"]),
            str(sample["expected"] or ""),
            str(sample["answer"]),
            bool(sample["stopped"]),
            had_room=bool(sample["had_room"]),
            would_stop=sample.get("would_stop"),
        )
        for sample in samples
        if sample["held_out"] or not sample["had_room"]
    ]


def outcome_of(
    answers: tuple[Answer, ...], metrics: Iterable[dict[str, Any]], prepared: Prepared, plan: Plan
) -> Outcome:
    """What is known of a run when its last step is done.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    lines = list(metrics)
    losses = [line["loss"] for line in lines if "loss" in line]
    few = max(len(losses) // 10, 1)
    taken = sum(line["tokens"] for line in lines if "tokens" in line)
    whole = sum(len(example.ids) for example in prepared.examples)
    return Outcome(
        answers,
        mean(losses[:few]),
        mean(losses[-few:]),
        tuple((line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line),
        plan.max_steps,
        plan.learning_rate,
        plan.logging_steps * taken / max(whole, 1),
        plan.epochs is None,
        suggested_rate(plan, prepared.model),
    )
