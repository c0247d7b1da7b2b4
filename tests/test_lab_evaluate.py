"""Counting what a model knows: pure functions, checked on models that know all or nothing."""

from __future__ import annotations

import pytest
import torch

from truetune.lab import base_path
from truetune.lab.evaluate import (
    Answer,
    ask,
    chat_prompt,
    cloze_items,
    cloze_recall,
    fact_correct,
    greedy,
    held_out_documents,
    instructed_places,
    prose_loss,
    unseen_questions,
)
from truetune.lab.world import World


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

    from truetune.lab.pretrain import Shape, llama_config

    torch.manual_seed(0)
    shape = Shape(hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1)
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


def test_ask_counts_finished_and_correct(world, tokenizer):
    questions = unseen_questions(world, 4)
    written = [f"It is {q.expected}.<|end|>" for q in questions[:2]]
    written += ["It is unknown.<|end|>", "<|end|>"]
    texts = [chat_prompt(q.text) + answer for q, answer in zip(questions, written, strict=True)]
    score = ask(Parrot([tokenizer.encode(t) for t in texts], 4), tokenizer, questions)
    assert (score.finished, score.correct, score.total) == (3, 2, 4)
    assert score.answers[0] == Answer(f"It is {questions[0].expected}.", True)


def test_an_answer_that_does_not_stop_is_not_finished(world, tokenizer):
    [question] = unseen_questions(world, 1)
    text = chat_prompt(question.text) + " ".join([question.expected] * 40)
    score = ask(Parrot([tokenizer.encode(text)], 4), tokenizer, [question], max_new_tokens=5)
    assert (score.finished, score.correct) == (0, 0)


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
