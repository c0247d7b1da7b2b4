"""Measure an arm: replies through the contract, judged by a run's probes and an evaluation's
matches; losses on held-out text and answers.

Every arm gets the same hundred questions, about places that occur in no training row of any arm.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from truetune.behaviour.replies import Asked, Judge, Said
from truetune.compare import row_losses
from truetune.contract.example import SFTExample
from truetune.evaluation.match import Match
from truetune.generate import Sampling, replies_to_ids
from truetune.lab.bench import Row, Tuned
from truetune.lab.evaluate import (
    Question,
    cloze_items,
    cloze_right,
    held_out_documents,
    load_instructions,
    prose_examples,
    unseen_questions,
)
from truetune.lab.experiment import Column
from truetune.lab.words import words
from truetune.lab.world import PLACE_RELATIONS, Fact, World

GREEDY = Sampling(max_new_tokens=40)
_QUESTIONS, _DOCUMENTS, _SENTENCES = 100, 30, 200


@cache
def questions() -> tuple[Question, ...]:
    """About a hundred places, one relation each."""
    return tuple(unseen_questions(World.generate(), _QUESTIONS))


def sentence(fact: Fact) -> str:
    """The answer to a question about a place, as the shipped instructions put it."""
    article = "the " if fact.relation in ("river", "animal") else ""
    return f"The {fact.relation} of {fact.subject} is {article}{fact.value}."


def instructions() -> list[Row]:
    """The shipped hand-written rows."""
    return [{"messages": messages} for messages in load_instructions()]


def facts_for_rows(number: int, seed: int) -> list[tuple[str, Fact]]:
    """Distinct questions and facts for rows, about places that no question asks about.

    Args:
        number: at most 3,360.
    """
    world = World.generate()
    asked = {question.fact.subject for question in questions()}
    every = [
        (text.format(s=place), Fact(place, relation, world.value(place, relation)))
        for place in world.places
        if place not in asked
        for relation in PLACE_RELATIONS
        for text in words("questions")[relation]
    ]
    return random.Random(f"{seed}/rows").sample(every, number)


def rows(number: int, seed: int) -> list[Row]:
    """Consistent rows: a question with its answer in one sentence."""
    return [
        {"prompt": text, "completion": sentence(fact)}
        for text, fact in facts_for_rows(number, seed)
    ]


@dataclass(frozen=True)
class Heard:
    """The replies of an arm.

    Attributes:
        said: judged by the probes of a run.
        right: it ended and contains the fact, after any thinking.
        closed: it thought and closed its think block.
        asked: the texts of the questions.
    """

    said: tuple[Said, ...]
    right: tuple[bool, ...]
    closed: tuple[bool, ...]
    asked: tuple[str, ...]

    def columns(self) -> dict[str, Column]:
        return {
            "right": Column.share(self.right),
            "ended": Column.share(s.stopped for s in self.said),
            "role leak": Column.share(s.other_turn for s in self.said),
            "repeats": Column.share(s.repeats for s in self.said),
            "reply length": Column.mean((s.tokens for s in self.said), "tokens"),
        }

    def samples(self) -> list[dict[str, str]]:
        """Questions and replies, for reading."""
        pairs = zip(self.asked, self.said, strict=True)
        return [{"asked": a, "said": s.text + ("" if s.stopped else " […]")} for a, s in pairs]


def ask(
    tuned: Tuned,
    asked: Sequence[Question] | None = None,
    sampling: Sampling = GREEDY,
) -> Heard:
    """Ask an arm through its contract.

    Args:
        asked: the hundred questions where None.
    """
    contract = tuned.contract
    asked = questions() if asked is None else asked
    prompts = []
    for question in asked:
        messages = (*tuned.arm.before, {"role": "user", "content": question.text})
        answer = sentence(question.fact)
        prompts.append(
            Asked(
                where="",
                ids=tuple(contract.prompt_ids(messages)),
                expected=tuple(contract.tokens.encode([answer])[0]),
                messages=messages,
                expected_text=answer,
                prompt_text=question.text,
            )
        )
    found = replies_to_ids(
        tuned.loaded, contract, [p.ids for p in prompts], sampling, batch_size=50
    )
    judge, match = Judge(contract), Match("contains")
    said = [judge.judge(p, r, sampling.max_new_tokens) for p, r in zip(prompts, found, strict=True)]
    parts = [judge.thinking.split(reply.text) for reply in found]
    facts = match.judge([(p[2], q.expected) for p, q in zip(parts, asked, strict=True)])
    right = tuple(f.right and r.stopped for f, r in zip(facts, found, strict=True))
    closed = tuple(thought and done for thought, done, _ in parts)
    return Heard(tuple(said), right, closed, tuple(q.text for q in asked))


def prose(tuned: Tuned, documents: int = _DOCUMENTS) -> Column:
    """Loss on documents about the world that the base has not read: shows forgotten prose."""
    texts = held_out_documents(World.generate(), documents)
    return losses(tuned, prose_examples(tuned.loaded, texts))


def losses(tuned: Tuned, examples: Sequence[SFTExample]) -> Column:
    """Loss on the targets of examples."""
    sums = row_losses(tuned.loaded, [(e.ids, e.mask) for e in examples])
    return Column(tuple(sums), tuple(float(e.num_supervised) for e in examples), "nats per token")


def recall(tuned: Tuned) -> Column:
    """Share of fact sentences that are completed correctly as prose: shows forgotten facts."""
    items = random.Random("lab/recall").sample(cloze_items(World.generate()), _SENTENCES)
    return Column.share(cloze_right(tuned.loaded, items))


_WORDS = 12


def ends_prose(tuned: Tuned) -> Column:
    """Share of prose continuations that end with the end token of an answer: chat format where it
    does not belong."""
    tokenizer, encode = tuned.loaded.tokenizer, tuned.contract.tokens.encode
    starts = [" ".join(t.split()[:_WORDS]) for t in held_out_documents(World.generate(), 100)]
    prompts = [[tokenizer.eos_token_id, *ids] for ids in encode(starts)]
    found = replies_to_ids(tuned.loaded, tuned.contract, prompts, GREEDY, batch_size=50)
    return Column.share(reply.ids[-1:] == (tuned.end,) for reply in found)


# The last steps, whose mean is the loss that a run ends with.
_LAST = 10


def ending_loss(tuned: Tuned) -> Column:
    """The training loss that is shown at the end of the run."""
    return Column.mean(tuned.losses[-_LAST:] or [float("nan")] * _LAST, "nats per token")


def usual(tuned: Tuned) -> dict[str, Column]:
    """Replies, prose, and the loss that the run ended with."""
    return {**ask(tuned).columns(), "prose": prose(tuned), "training loss": ending_loss(tuned)}
