"""Prompts that a run asks as they will be served when it is done: a few short ones that were
trained; held-out ones were answered with the last vital signs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.generate import Sampling, replies_to_ids
from truetune.model.load import LoadedModel
from truetune.recipe.plan import Plan, suggested_rate
from truetune.run.outcome import ROOM, Answer, Outcome, mean, short_rows
from truetune.run.prepare import Prepared

# Trained prompts asked at the end.
_NUM_PROMPTS = 4


def trained_answers(
    loaded: LoadedModel, contract: PromptContract, prepared: Prepared
) -> list[Answer]:
    """Answers to a few short rows that were trained."""
    chosen = short_rows(prepared.examples, _NUM_PROMPTS)
    prompts, spans = [], []
    for row in chosen:
        example = prepared.examples[row]
        first = example.mask.index(1)
        prompts.append(example.ids[:first])
        spans.append(example.ids[first : first + example.num_supervised])
    most = ROOM * max(map(len, spans), default=0) + 8
    said = replies_to_ids(loaded, contract, prompts, Sampling(max_new_tokens=most))
    stops = set(contract.stop_ids)
    return [
        Answer(
            True,
            prepared.rows[row],
            contract.tokens.decode([i for i in span if i not in stops]),
            reply.text,
            reply.stopped,
        )
        for row, span, reply in zip(chosen, spans, said, strict=True)
    ]


def held_out_answers(samples: Iterable[dict[str, Any]]) -> list[Answer]:
    """The samples of the last evaluation."""
    return [
        Answer(
            False,
            str(sample["where"]),
            str(sample["expected"] or ""),
            str(sample["answer"]),
            bool(sample["stopped"]),
            had_room=bool(sample["had_room"]),
        )
        for sample in samples
        if sample["held_out"]
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
