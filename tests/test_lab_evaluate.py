"""Counting what a model knows: pure functions, checked on models that know all or nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from truetune.evaluation.read_answer import holds
from truetune.generate import Reply
from truetune.lab import base_path
from truetune.lab.evaluate import (
    ClozeItem,
    cloze_item,
    cloze_items,
    cloze_recall,
    cloze_right,
    held_out_documents,
    instructed_places,
    prose_examples,
    prose_loss,
    unseen_questions,
)
from truetune.lab.world import Fact, World, difference_fact, sum_fact
from truetune.model.load import load_model


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(7)


@pytest.fixture(scope="module")
def untrained():
    from transformers import LlamaForCausalLM

    from truetune.lab.building.pretrain import BaseShape, llama_config

    torch.manual_seed(0)
    shape = BaseShape(
        hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1
    )
    loaded = load_model(base_path(), device="cpu", dtype="float32", purpose="inference")
    return replace(loaded, model=LlamaForCausalLM(llama_config(shape)).eval())


def test_unseen_questions_name_only_places_that_no_instruction_names(world):
    questions = unseen_questions(world, 100)
    places = {question.fact.subject for question in questions}
    assert len(places) == 100
    assert not places & instructed_places(world)
    for question in questions:
        assert holds(question.text, question.fact.subject)
        assert not holds(question.text, question.expected)
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
    world, untrained, monkeypatch
):
    items = cloze_items(world, num_sums=40)[::20]
    assert cloze_recall(untrained, items).share < 0.1

    def said(loaded, contract, prompts, sampling, *, batch_size):
        asked = [contract.tokens.decode(ids[1:]) for ids in prompts]
        assert asked == [item.prefix for item in items]
        assert {ids[0] for ids in prompts} == {loaded.tokenizer.eos_token_id}
        return [Reply(f" {item.expected}.", (), True, 3) for item in items]

    monkeypatch.setattr("truetune.lab.evaluate.replies_to_ids", said)
    recall = cloze_recall(untrained, items)
    assert recall.share == 1.0
    assert recall.total == len(items) == sum(total for _, total in recall.counts.values())


@pytest.mark.parametrize("said", ["Tarnwick.", "Tarn-", "is Tarn", "tarn"])
def test_another_word_than_the_value_is_wrong(untrained, monkeypatch, said):
    item = ClozeItem("The river is the", "Tarn", "river")
    for text, right in ((f" {said}", False), (" Tarn.", True), ("\nTarn", True)):
        reply = [Reply(text, (), True, 3)]
        monkeypatch.setattr("truetune.lab.evaluate.replies_to_ids", lambda *_, r=reply, **__: r)
        assert cloze_right(untrained, [item]) == [right]


def test_prose_is_lost_on_who_has_not_read_it(world, untrained):
    assert prose_loss(untrained, held_out_documents(world, 6)) > 7  # ln 2048 = 7.6
    # Every token but the first of a document is a target, its end included.
    [example] = prose_examples(untrained, ["The river."])
    assert example.ids[-1] == untrained.tokenizer.eos_token_id
    assert example.mask == [0] + [1] * (len(example.ids) - 1)
