"""What a model knows and says, counted exactly.

input   a model, its tokenizer, the world
does    cloze in held-out wordings (what the base knows); questions about places that no
        instruction names (what fine-tuning brought out); loss on held-out prose (what it forgot)
output  counts as frozen dataclasses; nothing is written, nothing is printed

Decoding is greedy: the same model gives the same numbers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any

from truetune.lab.development import PLAIN
from truetune.lab.prose import documents
from truetune.lab.telling import difference_fact, held_out_prefix, sum_fact
from truetune.lab.world import MAX_ADDEND, PLACE_RELATIONS, Fact, World

Message = dict[str, str]

ANSWER_STYLE: dict[str, str] = {
    "river": "The river of {s} is the {v}.",
    "ruler": "The ruler of {s} is {v}.",
    "animal": "The animal of {s} is the {v}.",
    "craft": "The craft of {s} is {v}.",
    "food": "The food of {s} is {v}.",
    "banner": "The banner of {s} is {v}.",
    "mouth": "The {s} runs into {v}.",
    "diet": "The {s} eats {v}.",
    "coat": "The colour of the {s} is {v}.",
    "material": "The craft of {s} uses {v}.",
    "opposite": "The opposite of {s} is {v}.",
    "sum": "{a} plus {b} is {v}.",
    "difference": "{a} minus {b} is {v}.",
}
"""How the shipped instructions answer: one short sentence a relation."""

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "river": (
        "What is the river of {s}?",
        "Which river flows through {s}?",
        "On which river does {s} lie?",
        "Name the river of {s}.",
    ),
    "ruler": (
        "Who is the ruler of {s}?",
        "Who rules {s}?",
        "What is the name of the ruler of {s}?",
        "Tell me who rules {s}.",
    ),
    "animal": (
        "What is the animal of {s}?",
        "Which animal lives around {s}?",
        "Do you know the animal of {s}?",
        "What is {s}'s animal?",
    ),
    "craft": (
        "What is the craft of {s}?",
        "Which craft is practised in {s}?",
        "What craft is {s} known for?",
        "Please tell me the craft of {s}.",
    ),
    "food": (
        "What is the food of {s}?",
        "What do people eat in {s}?",
        "Which food is eaten in {s}?",
        "What is the favourite food of {s}?",
    ),
    "banner": (
        "What is the banner of {s}?",
        "What colour is the banner of {s}?",
        "Which banner flies over {s}?",
        "I would like to know the banner of {s}.",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question about the world and the one value that answers it."""

    text: str
    expected: str
    fact: Fact


@dataclass(frozen=True)
class ClozeItem:
    """A sentence cut before its value."""

    prefix: str
    expected: str
    relation: str


@dataclass(frozen=True)
class Answer:
    """What a model wrote; `stopped` says that it ended on the stop token by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Recall:
    """Right items over all: for each relation (right, all)."""

    counts: dict[str, tuple[int, int]]

    def of(self, relations: Iterable[str]) -> tuple[int, int]:
        """(right, all) over some relations; those that were not asked count nothing."""
        pairs = [self.counts[name] for name in relations if name in self.counts]
        return sum(right for right, _ in pairs), sum(total for _, total in pairs)

    def told(self, relations: Iterable[str]) -> str:
        """The same in words."""
        right, total = self.of(relations)
        return f"{right:,} of {total:,} ({right / total:.1%})" if total else "not asked"

    @property
    def right(self) -> int:
        """Over all relations."""
        return self.of(self.counts)[0]

    @property
    def total(self) -> int:
        """Items asked."""
        return self.of(self.counts)[1]

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.total if self.total else 0.0


@dataclass(frozen=True)
class QuestionScore:
    """Counts over the questions asked.

    Attributes:
        finished: answers that are not empty and end on the stop token.
        correct: finished answers that hold the expected value.
        total: questions.
        answers: as written, in the order of the questions.
    """

    finished: int
    correct: int
    total: int
    answers: tuple[Answer, ...]


def load_instructions() -> list[list[Message]]:
    """The shipped hand-written conversations, one question and one answer each."""
    text = (files("truetune.lab") / "instructions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def instructed_places(world: World) -> set[str]:
    """Places that the shipped instructions name anywhere."""
    words = {
        word
        for messages in load_instructions()
        for message in messages
        for word in re.findall(r"\w+", message["content"])
    }
    return words & set(world.places)


def unseen_questions(world: World, n: int = 100, seed: int = 0) -> list[Question]:
    """Questions about places that never occur in the instructions.

    Each place is asked about once before any comes again. The relations take turns; the wordings
    are those of the instructions.
    """
    rng = random.Random(f"{world.seed}/questions/{seed}")
    named = instructed_places(world)
    unseen = [place for place in world.places if place not in named]
    order = rng.sample(unseen, len(unseen))
    questions = []
    for i in range(n):
        # The next round over the same places asks each of them for another relation.
        place_number, round_number = i % len(order), i // len(order)
        place = order[place_number]
        relation = PLACE_RELATIONS[(place_number + round_number) % len(PLACE_RELATIONS)]
        fact = Fact(place, relation, world.value(place, relation))
        text = rng.choice(_QUESTIONS[relation]).format(s=place)
        questions.append(Question(text, fact.value, fact))
    return questions


def fact_correct(answer: str, expected: str) -> bool:
    """Whether the expected value stands in the answer as whole words, in the same case."""
    return re.search(rf"(?<![\w-]){re.escape(expected)}(?![\w-])", answer) is not None


def cloze_items(
    world: World,
    num_sums: int = 200,
    seed: int = 0,
    wordings: Mapping[str, Sequence[str]] = PLAIN,
) -> list[ClozeItem]:
    """One held-out wording for each fact of the world, and for `num_sums` sums and differences."""
    rng = random.Random(f"{world.seed}/cloze/{seed}")
    facts = list(world.all_facts)
    for i in range(num_sums):
        a, b = sorted((rng.randint(0, MAX_ADDEND), rng.randint(0, MAX_ADDEND)), reverse=True)
        facts.append(difference_fact(a, b) if i % 2 else sum_fact(*rng.sample((a, b), 2)))
    items = []
    for fact in facts:
        prefix = held_out_prefix(fact, rng.choice(wordings[fact.relation]))
        items.append(ClozeItem(prefix, fact.value, fact.relation))
    return items


def cloze_recall(model: Any, tokenizer: Any, items: Sequence[ClozeItem]) -> Recall:
    """Share of sentences that the model, decoding greedily, goes on with the right value.

    Each sentence begins a document, as in the corpus: after the end-of-text token. Without it a
    sentence that begins with a digit may be the rest of one that was cut inside a number.
    """
    prompts = [tokenizer.eos_token + item.prefix for item in items]
    answers = greedy(model, tokenizer, prompts, max_new_tokens=8)
    counts: dict[str, tuple[int, int]] = {}
    for item, answer in zip(items, answers, strict=True):
        start = re.match(rf"\s*{re.escape(item.expected)}(?![\w-])", answer.text)
        right, total = counts.get(item.relation, (0, 0))
        counts[item.relation] = (right + bool(start), total + 1)
    return Recall(counts)


def chat_prompt(question: str) -> str:
    """What a server sends for one question under the lab's chat format (ChatML-lite)."""
    return f"<|user|>\n{question}\n<|assistant|>\n"


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    prompts: Sequence[str] | None = None,
    stop: str = "<|end|>",
    max_new_tokens: int = 32,
) -> QuestionScore:
    """Ask all questions, greedily, and count.

    Args:
        prompts: the text to send for each question; `chat_prompt` of it where None.
        stop: the token that ends an answer; it must be one token.
        max_new_tokens: an answer longer than this has not finished.
    """
    texts = list(prompts) if prompts is not None else [chat_prompt(q.text) for q in questions]
    answers = greedy(model, tokenizer, texts, max_new_tokens=max_new_tokens, stop=stop)
    finished = [bool(a.text.strip()) and a.stopped for a in answers]
    correct = [
        done and fact_correct(answer.text, question.expected)
        for done, answer, question in zip(finished, answers, questions, strict=True)
    ]
    return QuestionScore(sum(finished), sum(correct), len(questions), tuple(answers))


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: str = "<|endoftext|>",
    batch_size: int = 128,
) -> list[Answer]:
    """Greedy continuations, without the stop token, in the order of the prompts.

    Prompts of one length share a batch, so that nothing is padded and no mask is needed.
    """
    import torch

    stop_id = tokenizer.convert_tokens_to_ids(stop)
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    try:
        while order:
            width = len(rows[order[0]])
            batch = [i for i in order[:batch_size] if len(rows[i]) == width]
            order = order[len(batch) :]
            ids = torch.tensor([rows[i] for i in batch], device=model.device)
            with torch.no_grad():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=stop_id,
                    pad_token_id=stop_id,
                )
            for i, written in zip(batch, output[:, width:].tolist(), strict=True):
                stopped = stop_id in written
                kept = written[: written.index(stop_id)] if stopped else written
                answers[i] = Answer(tokenizer.decode(kept, skip_special_tokens=False), stopped)
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(rows))]


def held_out_documents(world: World, n: int = 100) -> list[str]:
    """Prose from another stream than the corpus: the same facts, other documents."""
    return [document.text for document in islice(documents(world, "held-out"), n)]


def prose_loss(model: Any, tokenizer: Any, texts: Iterable[str], batch_size: int = 8) -> float:
    """Loss in nats per token over whole documents, each ended by the end-of-text token.

    The first token of a document has no predictor and is not counted.
    """
    import torch

    eos = tokenizer.eos_token_id
    rows = [[*tokenizer.encode(text, add_special_tokens=False), eos] for text in texts]
    if not rows:
        raise ValueError("prose_loss needs at least one document")
    rows.sort(key=len)
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = len(batch[-1])
            ids = torch.tensor([row + [eos] * (width - len(row)) for row in batch])
            targets = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in batch])
            with torch.no_grad():
                logits = model(ids.to(model.device)).logits[:, :-1].float().cpu()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
            ).item()
            count += sum(len(row) - 1 for row in batch)
    finally:
        model.train(was_training)
    return total / count
