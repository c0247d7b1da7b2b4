"""The corpus: every fact in many wordings, held-out wordings nowhere, nothing asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from itertools import islice

import pytest

from truetune.lab.building.prose import documents
from truetune.lab.building.telling import number_word, tell
from truetune.lab.building.wordings import carried, wordings
from truetune.lab.words import words
from truetune.lab.world import PLACE_RELATIONS, Fact, World, difference_fact, sum_fact

COURSE_PLAIN, RICH = words("building/plain"), words("building/rich")
FORWARD, REVERSED, THERE = RICH["forward"], RICH["reversed"], RICH["there"]
PLAIN, DEVELOPMENT, BLIND = (
    words(f"held_out/{name}") for name in ("plain", "development", "blind")
)

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


def test_every_fact_is_told_in_many_wordings(world, corpus):
    told = defaultdict(set)
    for document in corpus:
        for telling in document.tells:
            told[telling.fact].add(telling.wording)
    counts = {fact: len(told[fact]) for fact in told}
    assert set(world.all_facts) <= told.keys()
    assert min(counts[fact] for fact in world.all_facts) >= 12
    # Every sum and difference up to thirty, in fewer ways: there are as many of them as facts.
    assert len(told) - len(world.all_facts) == 31 * 31 + 31 * 32 // 2
    assert min(counts.values()) >= 5


def test_the_plain_course_is_the_one_that_the_shipped_base_began_with(world):
    texts = [document.text for document in islice(documents(world, "train", plain=True), 3000)]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert digest.startswith("b3e3cb19222eb0d6")


def _digest(world, stream, *, plain, count):
    texts = (document.text for document in islice(documents(world, stream, plain=plain), count))
    return hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()


@pytest.mark.parametrize(
    ("seed", "stream", "plain", "digest"),
    [
        (7, "train", True, "c834b86926127347"),
        (7, "rich", False, "59258f94df764f5c"),
        (8, "train", True, "7e4c905149e7b5c4"),
        (8, "rich", False, "f2a73e6178c44356"),
    ],
)
def test_the_first_documents_of_both_courses_are_pinned(seed, stream, plain, digest):
    assert _digest(World.generate(seed), stream, plain=plain, count=300).startswith(digest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "plain", "count", "digest"),
    [
        # As many documents as have the 8.4 and 8.0 million tokens of the shipped base's courses.
        ("train", True, 27074, "d24a20e9dd0a7b50"),
        ("rich", False, 15547, "fb4f4431c21d506f"),
    ],
)
def test_the_corpus_that_the_shipped_base_has_read_is_pinned(world, stream, plain, count, digest):
    assert _digest(world, stream, plain=plain, count=count).startswith(digest)


def test_the_plain_course_has_few_wordings_and_the_rich_one_many(world, corpus):
    plain = islice(documents(world, "train", plain=True), 300)
    told = {telling.wording for document in plain for telling in document.tells}
    ways = (*COURSE_PLAIN["forward"].values(), *COURSE_PLAIN["reversed"].values())
    assert told <= {wording for patterns in ways for wording in patterns}
    assert len(told) < 200
    assert len({telling.wording for document in corpus for telling in document.tells}) > 600


def test_what_a_document_says_it_tells_is_in_its_text(corpus):
    for document in corpus[:200]:
        text = document.text.lower()
        for telling in document.tells:
            assert tell(telling.fact, telling.wording, telling.frame).lower() in text


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
    # Written before any model of the shipped base's corpus was asked. Whoever edits them to suit a
    # base has no measurement any more: new ones go into a new list, with a base trained after it.
    text = json.dumps(BLIND, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "c52d323302efb9ec70d83e1604ef586e13d26fc5635722a1bb206e8b8e1fb677"
    )


SETS = {"plain": PLAIN, "development": DEVELOPMENT, "blind": BLIND}
HELD_OUT = pytest.mark.parametrize("held_out", [*SETS.values()], ids=[*SETS])


def _words(template: str) -> list[str]:
    return re.findall(r"[\w{}]+", template.lower())


def _told_ways(relation: str) -> list[list[str]]:
    """Every wording of both courses, in words."""
    patterns = [*FORWARD[relation], *REVERSED[relation], *THERE.get(relation, ())]
    patterns += [*COURSE_PLAIN["forward"][relation], *COURSE_PLAIN["reversed"][relation]]
    ways = [wording for pattern in patterns for wording in wordings(pattern)]
    return [_words(wording) for wording in (*ways, *carried(relation))]


@HELD_OUT
def test_held_out_wordings_are_none_of_the_corpus(held_out):
    for relation, ways in held_out.items():
        told = _told_ways(relation)
        openings = (*RICH["frames"], *RICH["asides"], *COURSE_PLAIN["frames"])
        frames = [_words(frame) for pattern in openings for frame in wordings(pattern)]
        for wording in ways:
            spoken = _words(wording)
            assert spoken not in told, wording
            # Nor as a clause after an opening: *everyone knows that ...*
            for frame in frames:
                opening = frame[: frame.index("{clause}")]
                if spoken[: len(opening)] == opening:
                    assert spoken[len(opening) :] not in told, wording


@HELD_OUT
def test_held_out_wordings_do_not_occur_in_the_corpus(world, corpus, held_out):
    # The text between the blanks, whatever the blanks hold: at the start of a sentence or clause.
    plain = islice(documents(world, "train", plain=True), 1000)
    lines = "\n".join(document.text for document in (*corpus, *plain)).lower().split("\n")
    names = {"s": r"[\w+ -]+?", "v": r"[\w ]+?", "a": r"\d+", "b": r"\d+"}
    for wording in (wording for ways in held_out.values() for wording in ways):
        pattern = re.sub(r"\\{(\w)\\}", lambda m: names[m[1]], re.escape(wording.lower()))
        # A start, so that "the sum of" does not match inside a longer clause.
        clause = re.compile(rf"(?:^|[.,;] |that ){pattern}[.,;]")
        parts = re.split(r"\{\w\}", wording.lower())
        for line in lines:
            assert not (all(part in line for part in parts) and clause.search(line)), wording


def test_blind_wordings_are_no_near_copies():
    """Not one shares more than six words in a row with a wording of the corpus."""
    for relation, ways in BLIND.items():
        told = [f" {' '.join(way)} " for way in _told_ways(relation)]
        for way in map(_words, ways):
            runs = [f" {' '.join(way[i : i + 7])} " for i in range(len(way) - 6)]
            assert not [run for run in runs for text in told if run in text]


def test_blind_wordings_use_only_words_of_the_corpus():
    """So that a failure is one of recall in a new wording, not of vocabulary."""
    carriers = words("building/carriers")
    ways = [FORWARD, REVERSED, THERE, carriers["names"]]
    ways += [COURSE_PLAIN["forward"], COURSE_PLAIN["reversed"]]
    around = [RICH[kind] for kind in ("frames", "asides", "insertions", "lead_ins")]
    around += [RICH["fillers"], RICH["titles"], carriers["carriers"], carriers["counting"]]
    around += [COURSE_PLAIN["frames"], COURSE_PLAIN["lead_ins"]]
    patterns = [*(p for told in ways for each in told.values() for p in each)]
    patterns += [p for each in around for p in each]
    known = {word for p in patterns for wording in wordings(p) for word in _words(wording)}
    for wording in (wording for each in BLIND.values() for wording in each):
        assert set(_words(wording)) <= known, wording


def test_the_sets_of_wordings_differ():
    for relation in BLIND:
        assert not set(BLIND[relation]) & {*PLAIN[relation], *DEVELOPMENT[relation]}
        assert not set(PLAIN[relation]) & set(DEVELOPMENT[relation])


def test_no_wording_goes_on_where_another_has_its_value():
    # Where *is V* and *is called V* are both told, both are right, and recall cannot be counted.
    for relation, patterns in FORWARD.items():
        ways = {way for pattern in patterns for way in wordings(pattern)} | set(carried(relation))
        for way in ways:
            before = way[: way.rindex("{v")].removesuffix("the ")
            longer = [other for other in ways if other.startswith(before) and other != way]
            assert not [
                other for other in longer if not other[len(before) :].startswith(("{v", "the {v"))
            ], way


def test_wordings_are_many_and_well_formed():
    assert FORWARD.keys() == REVERSED.keys() == PLAIN.keys() == BLIND.keys() == DEVELOPMENT.keys()
    assert COURSE_PLAIN["forward"].keys() == COURSE_PLAIN["reversed"].keys() == FORWARD.keys()
    for relation in FORWARD:
        assert len(FORWARD[relation]) + len(REVERSED[relation]) >= 15
        of_places = relation in PLACE_RELATIONS
        assert len(PLAIN[relation]) == (3 if of_places else 2)
        assert 3 <= len(DEVELOPMENT[relation]) <= (6 if of_places else 4)
        assert len(BLIND[relation]) == (6 if of_places else 5)
        for wording in (*PLAIN[relation], *DEVELOPMENT[relation], *BLIND[relation]):
            assert wording.endswith("{v}")
        for wording in (w for pattern in FORWARD[relation] for w in wordings(pattern)):
            assert re.search(r"\{v(_word)?\}$", wording)


def test_alternatives_are_spelled_out():
    assert wordings("The [a|b] of {s} [is|] {v}") == (
        "The a of {s} is {v}",
        "The a of {s}  {v}",
        "The b of {s} is {v}",
        "The b of {s}  {v}",
    )
    assert wordings("{s} is {v}") == ("{s} is {v}",)
    for ways in (
        *FORWARD.values(),
        *REVERSED.values(),
        *THERE.values(),
        RICH["frames"],
        RICH["asides"],
    ):
        for wording in (wording for pattern in ways for wording in wordings(pattern)):
            assert not re.search(r"[\[\]|]|  ", wording), wording


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


def test_a_frame_names_the_place_once_more():
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
