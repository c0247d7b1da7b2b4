"""The corpus: every fact in many wordings, held-out wordings nowhere, nothing asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from itertools import islice

import pytest

from truetune.lab.blind import BLIND
from truetune.lab.prose import (
    difference_fact,
    documents,
    held_out_prefix,
    number_word,
    sum_fact,
    tell,
)
from truetune.lab.wordings import DEVELOPMENT, FORWARD, REVERSED
from truetune.lab.world import Fact, World

# About a tenth of the corpus.
NUM_DOCUMENTS = 3500


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(7)


@pytest.fixture(scope="module")
def corpus(world):
    return list(islice(documents(world), NUM_DOCUMENTS))


def test_streams_are_deterministic_and_differ(world, corpus):
    assert list(islice(documents(world), 50)) == corpus[:50]
    held_out = {document.text for document in islice(documents(world, "held-out"), 300)}
    assert not held_out & {document.text for document in corpus}


def test_every_fact_is_told_in_at_least_six_wordings(world, corpus):
    wordings = defaultdict(set)
    for document in corpus:
        for telling in document.tells:
            wordings[telling.fact].add(telling.wording)
    counts = {fact: len(wordings[fact]) for fact in world.all_facts}
    assert min(counts.values()) >= 6, min(counts.items(), key=lambda item: item[1])


def test_what_a_document_says_it_tells_is_in_its_text(corpus):
    for document in corpus[:200]:
        text = document.text.lower()
        for telling in document.tells:
            assert tell(telling.fact, telling.wording, telling.report).lower() in text


def test_sums_and_differences_are_true(corpus):
    found = 0
    for document in corpus[:500]:
        for a, sign, b, value in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", document.text):
            assert int(value) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            found += 1
    assert found > 50


def test_nothing_is_asked_and_no_marker_occurs(corpus):
    for document in corpus:
        assert not re.search(r"\?|<|\||>", document.text)


def test_documents_are_paragraphs_of_whole_sentences(corpus):
    for document in corpus[:300]:
        for paragraph in document.text.split("\n\n"):
            assert paragraph.endswith(".")
            assert ".." not in paragraph
            assert "{" not in paragraph
            assert paragraph[0].isupper() or paragraph[0].isdigit()


def test_the_blind_wordings_are_as_they_were_written():
    # Written before the corpus that the shipped base has read. Whoever edits them to suit a base
    # has no measurement any more: new ones go into a new list, with a base trained after it.
    text = json.dumps(BLIND, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "0bf12e51bb462c6d18e215444466f85ee776e742251729974991852f82716bbf"
    )


@pytest.mark.parametrize("held_out", [DEVELOPMENT, BLIND], ids=["development", "blind"])
def test_held_out_wordings_are_not_in_the_corpus(corpus, held_out):
    told = {wording for ways in (*FORWARD.values(), *REVERSED.values()) for wording in ways}
    assert not told & {wording for ways in held_out.values() for wording in ways}
    # The text between the blanks must not occur either, whatever the blanks hold.
    text = "\n".join(document.text for document in corpus).lower()
    names = {"s": r"[\w+ -]+?", "v": r"[\w ]+?", "a": r"\d+", "b": r"\d+"}
    for wording in (wording for ways in held_out.values() for wording in ways):
        pattern = re.sub(r"\\{(\w)\\}", lambda m: names[m[1]], re.escape(wording.lower()))
        # A sentence start, so that "the sum of" does not match inside a longer clause.
        assert not re.search(rf"(?:^|\. ){pattern}[.,;]", text, re.MULTILINE), wording


def test_development_and_blind_wordings_differ():
    for relation in BLIND:
        assert not set(BLIND[relation]) & set(DEVELOPMENT[relation])


def test_wordings_are_many_and_well_formed():
    assert FORWARD.keys() == REVERSED.keys() == DEVELOPMENT.keys() == BLIND.keys()
    for relation in FORWARD:
        assert len(FORWARD[relation]) + len(REVERSED[relation]) >= 8
        assert len(DEVELOPMENT[relation]) >= 2
        assert len(BLIND[relation]) >= 4
        for wording in (*DEVELOPMENT[relation], *BLIND[relation]):
            assert wording.endswith("{v}")
        assert all(re.search(r"\{v(_word)?\}$", wording) for wording in FORWARD[relation])


def test_held_out_prefix_stops_before_the_value():
    fact = Fact("Velmora", "river", "Tarn")
    assert held_out_prefix(fact, DEVELOPMENT["river"][0]) == "As for Velmora, its river is the"
    with pytest.raises(ValueError, match="not a held-out wording"):
        held_out_prefix(fact, FORWARD["river"][0])


@pytest.mark.parametrize(
    ("fact", "wording", "text"),
    [
        (sum_fact(7, 5), "{a} + {b} = {v}", "7 + 5 = 12"),
        (sum_fact(20, 1), "{A} and {b_word} make {v_word}", "Twenty and one make twenty-one"),
        (difference_fact(9, 4), "{b} less than {a} is {v}", "4 less than 9 is 5"),
        (
            Fact("hot", "opposite", "cold"),
            "{v} is the opposite of {s}",
            "Cold is the opposite of hot",
        ),
    ],
)
def test_tell(fact, wording, text):
    assert tell(fact, wording) == text


def test_a_report_names_the_place_once_more():
    fact = Fact("Velmora", "river", "Tarn")
    assert tell(fact, "The river of {s} is the {v}", "Of {s} it is written that {clause}") == (
        "Of Velmora it is written that the river of Velmora is the Tarn"
    )
    assert tell(fact, "{s} stands on the river {v}", "Speaking of {s}, {clause}") == (
        "Speaking of Velmora, Velmora stands on the river Tarn"
    )


def test_number_words_are_distinct():
    assert len({number_word(n) for n in range(70)}) == 70
    assert number_word(42) == "forty-two"
