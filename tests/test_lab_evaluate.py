"""Counting what a model knows: pure functions, checked on models that know all or nothing."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from truetune.lab import base_path
from truetune.lab.evaluate import (
    ClozeItem,
    cloze_item,
    cloze_items,
    cloze_recall,
    fact_correct,
    greedy,
    held_out_documents,
    instructed_places,
    prose_loss,
    unseen_questions,
)
from truetune.lab.world import Fact, World, difference_fact, sum_fact


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(7)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def untrained():
    from transformers import LlamaForCausalLM

    from truetune.lab.building.pretrain import BaseShape, llama_config

    torch.manual_seed(0)
    shape = BaseShape(
        hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1
    )
    return LlamaForCausalLM(llama_config(shape))


class Parrot(torch.nn.Module):
    """Goes on as one of the given token sequences does; the end-of-text token after them."""

    def __init__(self, rows: list[list[int]], stop_id: int) -> None:
        super().__init__()
        self.rows, self.stop_id, self.device = rows, stop_id, torch.device("cpu")

    def generate(self, ids, *, max_new_tokens, **_):
        out = []
        for prompt in ids.tolist():
            [row] = [row for row in self.rows if row[: len(prompt)] == prompt]
            written = [*row[len(prompt) :], self.stop_id][:max_new_tokens]
            out.append(prompt + written + [self.stop_id] * (max_new_tokens - len(written)))
        return torch.tensor(out)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("The river of Velmora is the Tarn.", "Tarn", True),
        ("The river of Velmora is the Tarnwick.", "Tarn", False),
        ("the tarn", "Tarn", False),
        ("7 plus 5 is 12.", "12", True),
        ("7 plus 5 is 112.", "12", False),
        ("It is twenty-one.", "one", False),
        ("It runs into Lake Osmer.", "Lake Osmer", True),
        ("", "Tarn", False),
    ],
)
def test_fact_correct(answer, expected, right):
    assert fact_correct(answer, expected) is right


def test_unseen_questions_name_only_places_that_no_instruction_names(world):
    questions = unseen_questions(world, 100)
    places = {question.fact.subject for question in questions}
    assert len(places) == 100
    assert not places & instructed_places(world)
    for question in questions:
        assert fact_correct(question.text, question.fact.subject)
        assert not fact_correct(question.text, question.expected)
        assert world.value(question.fact.subject, question.fact.relation) == question.expected
    assert len({question.fact.relation for question in questions}) == 6


def test_unseen_questions_follow_their_seed(world):
    assert unseen_questions(world, 30, seed=1) == unseen_questions(world, 30, seed=1)
    assert unseen_questions(world, 30, seed=1) != unseen_questions(world, 30, seed=2)


def test_more_questions_than_places_ask_other_facts(world):
    facts = [question.fact for question in unseen_questions(world, 360)]
    assert len(set(facts)) == 360


def test_cloze_items_cover_the_world_once(world):
    items = cloze_items(world, num_sums=10)
    assert len(items) == len(world.all_facts) + 10
    assert items == cloze_items(world, num_sums=10)
    # As a whole word: a banner may be *coloured red*.
    assert not any(item.prefix.endswith(f" {item.expected}") for item in items)


def test_a_cloze_item_stops_before_the_value():
    fact = Fact("Velmora", "river", "Tarn")
    item = cloze_item(fact, "as for {s}, its river is the {v}")
    assert item == ClozeItem("As for Velmora, its river is the", "Tarn", "river")
    assert cloze_item(sum_fact(7, 5), "{b} and {a} make {v}").prefix == "5 and 7 make"
    assert (
        cloze_item(difference_fact(9, 4), "From {a} to {b} it is {v}").prefix == "From 9 to 4 it is"
    )
    with pytest.raises(ValueError, match="ends with its value"):
        cloze_item(fact, "The {v} flows through {s}")


def _digest(entries: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(entries, ensure_ascii=False).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("wordings", "seed", "digest"),
    [
        ("plain", 7, "f241462d0367c257"),
        ("plain", 8, "6e2fa0ebbf05330a"),
        ("development", 7, "2d8bcbb840b659e8"),
        ("development", 8, "e5c6820f73bc9ae5"),
        ("blind", 7, "88a9fd54c3f62ab3"),
        ("blind", 8, "8cf1ac14bb1f5335"),
    ],
)
def test_what_a_base_is_asked_is_pinned(wordings, seed, digest):
    # The counts of the model card and of docs/log.md are counts of exactly these.
    items = cloze_items(World.generate(seed), wordings=wordings)
    assert _digest([[item.prefix, item.expected, item.relation] for item in items]) == digest


@pytest.mark.parametrize(
    ("seed", "digest"), [(0, "78be9112875755b2"), (1, "395c25f085af6aac"), (2, "8f3e314b1cb94e49")]
)
def test_the_questions_are_pinned(world, seed, digest):
    asked = unseen_questions(world, 360, seed=seed)
    assert _digest([[question.text, question.expected] for question in asked]) == digest


def test_the_shipped_prose_is_what_the_held_out_stream_writes(world):
    shipped = held_out_documents(world)
    assert _digest(shipped) == "9d30bd11b011d1f8"
    assert held_out_documents(world, 101)[:100] == shipped  # one more than shipped: all are written
    assert held_out_documents(world, 3) == shipped[:3]
    assert _digest(held_out_documents(World.generate(8))) == "a4d789b55369d1c2"


def test_recall_of_a_model_that_knows_all_and_of_one_that_knows_nothing(
    world, tokenizer, untrained
):
    items = cloze_items(world, num_sums=40)[::20]
    text = "<|endoftext|>{} {}."
    rows = [tokenizer.encode(text.format(item.prefix, item.expected)) for item in items]
    recall = cloze_recall(Parrot(rows, tokenizer.eos_token_id), tokenizer, items)
    assert recall.share == 1.0
    assert recall.total == len(items) == sum(total for _, total in recall.counts.values())
    assert cloze_recall(untrained, tokenizer, items).share < 0.1


def test_greedy_is_the_same_alone_and_in_a_batch(tokenizer, untrained):
    prompts = ["The river", "The ruler of", "The animal", "12 + 3", "A"]
    together = greedy(untrained, tokenizer, prompts, max_new_tokens=4)
    alone = [greedy(untrained, tokenizer, [p], max_new_tokens=4)[0] for p in prompts]
    assert together == alone


def test_prose_loss_does_not_depend_on_batching(world, tokenizer, untrained):
    texts = held_out_documents(world, 6)
    alone = prose_loss(untrained, tokenizer, texts, batch_size=1)
    assert prose_loss(untrained, tokenizer, texts, batch_size=4) == pytest.approx(alone, abs=1e-4)
    assert alone > 7  # about ln 2048 = 7.6: it knows nothing
    with pytest.raises(ValueError, match="at least one document"):
        prose_loss(untrained, tokenizer, [])
