"""Damaged answers: each code with rows that bring it about, and rows as near to it as can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from test_check_data import plain, prose, row, sound, with_some
from truetune.checks import conversations
from truetune.checks.conversations import cut_off, letters, quality
from truetune.checks.conversations.rows import DataFacts
from truetune.checks.registry import ask
from truetune.data.conversation import Conversation
from truetune.data.load import load
from truetune.findings import Finding

DATA = Path(__file__).parents[2] / "shared" / "data"
REFUSAL = "I am sorry, but I cannot help with that request."


def found(rows: list[Conversation]) -> dict[str, Finding]:
    facts = DataFacts(rows)
    return {f.code: f for family in (cut_off, letters, quality) for f in ask(family, facts)}


def long(i: int) -> str:
    return f"{prose(i)} {prose(i + 777)}"


def cut_in_word(i: int) -> Conversation:
    # No row holds "morn" as a word of its own, and all of them hold "morning".
    return plain(i, f"{long(i)} It went on through the whole of that long grey morn")


def one_length(i: int) -> Conversation:
    return plain(i, (long(i) + " " + long(i + 1) + " " + long(i + 2) + "more" * 40)[:420] + "x")


def code(i: int) -> Conversation:
    body = f"def area_{i}(width, height):\n    product = width * height\n    return product"
    return plain(i, f"{body}\n\nprint(area_{i}(3, {i}) and the")


def label(i: int) -> Conversation:
    return plain(i, ("yes", "no", "neutral")[i % 3])


def mojibake(i: int) -> Conversation:
    return plain(i, long(i) + " It\u00e2\u20ac\u2122s caf\u00c3\u00a9 time.")


def accents(i: int) -> Conversation:
    text = " \u00c9t\u00e9, na\u00efve, S\u00c3O PAULO, \u00ab \u00c2ge \u00bb"
    text += ", \u6f22\u5b57, \U0001f600 \u201cquoted\u201d \u2014 and so on."
    return plain(i, long(i) + text)


def entities(i: int) -> Conversation:
    return plain(i, long(i) + " Salt &amp; pepper, &quot;fresh&quot; &#39;bread&#39;.")


def markup(i: int) -> Conversation:
    return plain(i, "<p>Salt &amp; pepper</p>\n" + long(i), "How do I escape & in HTML?")


def refusal(i: int) -> Conversation:
    return plain(i, REFUSAL)


def thanks(i: int) -> Conversation:
    turns = [("user", prose(i) + "?"), ("assistant", long(i)), ("user", "Thank you!")]
    return row(i, *turns, ("assistant", "You are welcome, ask me whenever you like!"))


def led(i: int) -> Conversation:
    return plain(i, f"Assistant: {long(i)}")


def spoken(i: int) -> Conversation:
    return plain(i, f"The assistant: a short history. {long(i)} AI is a tool: use it.")


def echoed(i: int) -> Conversation:
    return plain(i, f"{prose(i)}? {long(i)}")


def edited(i: int) -> Conversation:
    """A text that needs no correction comes back as it was."""
    text = prose(i)
    turns = [("system", "Correct the grammar."), ("user", text), ("assistant", text)]
    return row(i, *turns)


def completed(i: int) -> Conversation:
    asked = f"def area_{i}(width, height):\n    return"
    return plain(i, asked + " width * height\n", asked)


def titled(i: int) -> Conversation:
    """Lists, headings, signatures and names end without a mark."""
    ends = (
        "\n- the river\n- the bridge",
        "\n\nYours sincerely,\nMary Stone",
        "\n\n## The Long Road",
    )
    return plain(i, long(i) + ends[i % 3])


def looped(i: int) -> Conversation:
    return plain(i, f"{long(i)} And so on. " + "under the old bridge " * 9 + "under the o")


def refrain(i: int) -> Conversation:
    """Three times is a figure of speech; cells, figures and what is asked for repeat."""
    said = (
        long(i) + " We go on. We go on. We go on.",
        f"| a | {i} |\n" + "| no | yes |\n" * 12,
        f"{i} said " + "ha " * 40,
    )
    return plain(i, said[i % 3], prose(i) + ("?", "?", ", again and again?")[i % 3])


Make = Callable[[int], Conversation]
# code -> (rows that bring it about, how many of 100, near misses).
CASES: dict[str, tuple[tuple[Make, int], tuple[Make, ...]]] = {
    "answer-broken-off": ((cut_in_word, 6), (code, label, titled, accents)),
    "answer-loops": ((looped, 6), (refrain,)),
    "text-mojibake": ((mojibake, 6), (accents,)),
    "text-entities": ((entities, 6), (markup, spoken)),
    "answers-identical": ((refusal, 12), (label, thanks)),
    "answer-role-first": ((led, 6), (spoken,)),
    "question-echoed": ((echoed, 6), (edited, completed)),
}


@pytest.mark.parametrize("code", CASES)
def test_damage_is_a_warning_with_its_count_and_an_example(code: str) -> None:
    (make, some), _ = CASES[code]
    told = found(with_some(make, some))
    assert set(told) == {code}
    assert (told[code].level, told[code].count) == ("warning", some)
    assert told[code].where == "rows.jsonl:0"
    assert len(told[code].rows) == some
    assert "'" in told[code].what or '"' in told[code].what
    assert told[code].why
    assert told[code].fix


@pytest.mark.parametrize("code", CASES)
def test_a_straggler_is_no_warning(code: str) -> None:
    (make, _), _ = CASES[code]
    assert {f.level for f in found(with_some(make, 1, 400)).values()} <= {"note"}


@pytest.mark.parametrize("make", sorted({m for _, near in CASES.values() for m in near}, key=str))
def test_what_is_near_to_damage_is_left_in_peace(make: Make) -> None:
    for some in (6, 60, 100):
        assert found(with_some(make, some)) == {}, some


def test_answers_of_one_length_that_stop_in_the_middle() -> None:
    told = found(with_some(one_length, 8))
    assert told["answer-broken-off"].count == 8
    assert "421 characters" in told["answer-broken-off"].why


def fenced(i: int) -> Conversation:
    return plain(i, f"Here it is:\n```python\nfor k in range({i}):\n    print(k, nu")


def closed(i: int) -> Conversation:
    return plain(i, f"Here it is:\n```python\nprint({i})\n```\nThat is all of it.")


def announced(i: int) -> Conversation:
    return plain(i, f"{prose(i)[:-1]}, which are the steps that you take:")


CHINESE = (
    "\u8fd9\u662f\u4e00\u4e2a\u5f88\u957f\u7684\u4ecb\u7ecd\uff0c\u57ce\u5e02{}"
    "\u6709\u8bb8\u591a\u6cb3\u6d41\u548c\u5c71\uff0c\u4eba\u4eec\u5728\u8fd9\u91cc"
    "\u751f\u6d3b\u4e86\u5f88\u591a\u5e74\u3002"
)


def test_cuts_without_a_sentence() -> None:
    """Blocks of code, a script without spaces, the first line alone."""
    for some in (5, 100):
        told = found(with_some(fenced, some))
        assert set(told) == {"answer-broken-off"}
        assert told["answer-broken-off"].count == some
        assert "never close" in told["answer-broken-off"].what
    chinese = [plain(i, CHINESE.format(i)[:30]) for i in range(60)]
    told = found(chinese)
    assert set(told) == {"answer-broken-off"}
    assert told["answer-broken-off"].count == 60
    assert "exactly 30 characters" in told["answer-broken-off"].why
    code = [plain(i, (f"def area_{i % 7}(w, h):\n    " + prose(i, 90))[:70]) for i in range(59)]
    assert "exactly 70 characters" in found(code)["answer-broken-off"].why
    told = found(with_some(announced, 60))
    assert "colon" in told["answer-broken-off"].what
    assert "first line" in told["answer-broken-off"].why
    assert "complete answers" in told["answer-broken-off"].fix


THAI = "\u0e19\u0e35\u0e48\u0e04\u0e37\u0e2d\u0e1b\u0e23\u0e30\u0e42\u0e22\u0e04 "


@pytest.mark.parametrize(
    "answer",
    [
        # Of one length, because they have one pattern, are keys, or columns.
        lambda i: CHINESE.format(i),
        lambda i: f"{THAI * 3}{i} \u0e02\u0e2d\u0e07\u0e09\u0e31\u0e19",
        lambda i: f"SELECT name, city, age FROM users WHERE age > {i % 90 + 10} AND city IN towns",
        lambda i: f"{i:064x}",
        lambda i: "acgt"[i % 4] * 100,
        lambda i: f"{prose(i)[:20]}    {prose(i + 1)[:20]}    {i:020d}",
        lambda i: f"The river {i % 90 + 10} is long, wide and old, and it has a bridge to the town",
        # Closed, or closed by the answer; announcements of a few.
        lambda i: f"```python\nprint({i})\n```",
        lambda i: f"{prose(i)}\n1. One.\n2. Two:" if i % 9 == 0 else prose(i),
        lambda i: f"def area_{i}(width, height):",
    ],
)
def test_forms_of_one_length_are_no_cuts(answer: Callable[[int], str]) -> None:
    assert "answer-broken-off" not in found([plain(i, answer(i)) for i in range(60)])


def test_an_answer_may_close_the_block_that_its_prompt_opened() -> None:
    rows = [plain(i, f"print({i})\n```", f"Go on:\n```python\nx = {i}\n") for i in range(60)]
    assert found(rows) == {}


def test_one_long_answer_to_all_questions() -> None:
    rows = [plain(i, long(1) + " " + long(2)) for i in range(60)]
    told = found(rows)
    assert told["answers-identical"].count == 60
    assert "match the questions with their own answers" in told["answers-identical"].fix
    # Told once: their likeness is that of the answer.
    every = {f.code for f in ask(conversations, DataFacts(rows))}
    assert every == {"answers-identical"}
    # Replies to a few intents are chosen from.
    intents = [plain(i, long(i % 4) + " " + long(i % 4 + 9)) for i in range(60)]
    assert "answers-identical" not in found(intents)


def test_lessons_about_wrong_characters() -> None:
    bad = "\u00c3\u00a9"
    lesson = [
        plain(i, f"UTF-8 was read as Latin-1: \u00e9 becomes {bad}. {i}", f"Why {bad}? {i}")
        for i in range(60)
    ]
    assert found(lesson) == {}
    # Only one of the two: a word about encodings, or the letter elsewhere.
    named = [plain(i, f"The encoding of caf{bad} number {i} is an old one.") for i in range(60)]
    other = [plain(i, f"The caf\u00e9 and the caf{bad} number {i} are old.") for i in range(60)]
    assert set(found(named)) == set(found(other)) == {"text-mojibake"}


def left_open(i: int) -> Conversation:
    """The cut left whole words, which end a sentence as well as any."""
    return plain(i, f"{long(i)} It went on through the whole of that long grey morning")


def test_sentences_left_open_count_where_words_are_cut() -> None:
    opened = [left_open(1000 + i) for i in range(10)]
    rows = [*sound(100), *opened]
    assert found(rows) == {}
    rows += [cut_in_word(2000 + i) for i in range(6)]
    assert found(rows)["answer-broken-off"].count == 16
    # Who leaves out the last full stop everywhere has not cut everything.
    rows += [left_open(3000 + i) for i in range(20)]
    assert found(rows)["answer-broken-off"].count == 6
    captions = [titled(4000 + i) for i in range(12)]
    told = found([*sound(100), *captions, *(cut_in_word(2000 + i) for i in range(6))])
    assert told["answer-broken-off"].count == 6


@pytest.mark.parametrize(
    "end",
    [
        "\n\n1. The river.\n2. The bridge.\n3.",
        "\n\n1. The river runs on.\n2. The bridge stands.\n3. Unsu",
        "It went on. Through the whole of the long-aw",
    ],
)
def test_items_and_short_answers_left_open(end: str) -> None:
    text = end if end[0] != "\n" else long(3) + end
    rows = [*sound(100), *(cut_in_word(2000 + i) for i in range(6)), plain(7, text)]
    assert found(rows)["answer-broken-off"].count == 7
    # Items without marks.
    listed = [plain(600 + i, f"1. Old {i}\n2. River\n3. Bread") for i in range(6)]
    assert found([*rows, *listed])["answer-broken-off"].count == 7
    # Where half of the short lines have no mark, they say nothing; nor does a number by itself.
    open_lines = [plain(300 + i, f"{prose(i, 9)[:-1].lower()} towns") for i in range(15)]
    whole = [plain(400 + i, f"{long(i)}\n\n{i}.") for i in range(6)]
    told = found([*sound(60), *open_lines, *whole, *(cut_in_word(500 + i) for i in range(6))])
    assert told["answer-broken-off"].count == 6


def test_refusals_are_called_by_their_name() -> None:
    told = found([*sound(400), *(refusal(1000 + i) for i in range(48))])
    assert "48 times" in told["answers-identical"].what
    assert "refusals" in told["answers-identical"].why


def test_sound_rows_raise_nothing() -> None:
    assert found(sound()) == {}
    assert found([]) == {}
    assert found([Conversation((), f"t:{i}", text=prose(i)) for i in range(40)]) == {}


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("name", sorted(p.name for p in DATA.glob("*.json*")))
def test_published_sets_raise_no_warning(name: str) -> None:
    told = found(list(load(DATA / name).conversations))
    assert [f.what for f in told.values() if f.level != "note"] == []
