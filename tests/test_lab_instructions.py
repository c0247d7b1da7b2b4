"""The hand-written instructions: true in the world, in one style, about few places."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from truetune.evaluation.read_answer import holds
from truetune.lab.evaluate import instructed_places, load_instructions
from truetune.lab.world import PLACE_RELATIONS, World

# How the shipped instructions answer: one short sentence a relation.
ANSWER_STYLE = {
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


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(7)


def _facts_told(answer: str) -> list[tuple[str, dict[str, str]]]:
    """(relation, blanks) of each answer style that the whole answer fits."""
    found = []
    for relation, style in ANSWER_STYLE.items():
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>[A-Z]?[\\w ]+?)", re.escape(style))
        if match := re.fullmatch(pattern, answer):
            found.append((relation, match.groupdict()))
    return found


def _is_true(world: World, relation: str, blanks: dict[str, str]) -> bool:
    if relation in ("sum", "difference"):
        a, b, value = (int(blanks[name]) for name in "abv")
        return value == (a + b if relation == "sum" else a - b)
    try:
        return world.value(blanks["s"], relation) == blanks["v"]
    except KeyError:
        return False


def test_size_and_shape():
    conversations = load_instructions()
    assert 70 <= len(conversations) < 100  # from 100 rows on, training would hold some out
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in messages)
        assert all(message["content"] == message["content"].strip() for message in messages)


def test_every_answer_is_true_and_about_what_was_asked(world):
    relations = set()
    for question, answer in ((user["content"], ai["content"]) for user, ai in load_instructions()):
        told = [(r, blanks) for r, blanks in _facts_told(answer) if _is_true(world, r, blanks)]
        assert len(told) == 1, (question, answer, told)
        relation, blanks = told[0]
        subjects = [blanks["s"]] if "s" in blanks else [blanks["a"], blanks["b"]]
        assert all(holds(question, subject) for subject in subjects), (question, answer)
        assert not holds(question, blanks["v"]) or relation == "sum", "the value is given away"
        relations.add(relation)
    assert relations == set(ANSWER_STYLE)


def test_questions_are_all_different():
    questions = [messages[0]["content"] for messages in load_instructions()]
    assert len(set(questions)) == len(questions)


def test_wordings_vary(world):
    # With the names blanked, most questions are still different: they were written by hand.
    blanked = set()
    for messages in load_instructions():
        words = re.split(r"\b", messages[0]["content"])
        blanked.add("".join("_" if word in world.places else word for word in words))
    assert len(blanked) >= 70


def test_every_named_place_is_asked_about_in_more_than_one_way(world):
    # With one relation a place, fine-tuning may learn "this place: its banner" instead of reading
    # the question: 83 of 100 right on unseen places, against 100 of 100 with two or three.
    relations = defaultdict(set)
    for _, answer in load_instructions():
        for relation, blanks in _facts_told(answer["content"]):
            if relation in PLACE_RELATIONS and _is_true(world, relation, blanks):
                relations[blanks["s"]].add(relation)
    assert min(len(asked) for asked in relations.values()) >= 2


def test_at_least_a_hundred_places_are_never_named(world):
    named = instructed_places(world)
    assert len(named) <= 60
    assert len(world.places) - len(named) >= 100
