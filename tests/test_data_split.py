"""Hashes of conversations, and held-out rows that training does not contain."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.conversation import Conversation
from truetune.data.split import hold_out, remove_overlap


def turn(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def chat(*contents: str, where: str = "f:1") -> Conversation:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return Conversation(tuple(turn(roles[i % 2], c) for i, c in enumerate(contents)), where)


def text(value: str) -> Conversation:
    return Conversation((), "f:1", text=value)


def test_key_is_the_prompt():
    base = chat("q", "a")
    assert base.key() == chat("q", "b", where="g:9").key()
    assert base.key() != chat("p", "a").key()
    assert chat("q", "a", "r", "b").turn_keys() == [base.key(), chat("q", "a", "r", "c").key()]
    # What follows the last answer is not its prompt; whether a turn is trained is not, either.
    assert base.key() == chat("q", "a", "more").key()
    marked = Conversation((turn("user", "q", train=False), turn("assistant", "a")), "f:1")
    assert marked.key() == base.key()
    # The order of a message's fields is no content.
    swapped = Conversation(({"content": "q", "role": "user"}, turn("assistant", "a")), "f:1")
    assert swapped.key() == base.key()
    assert text("a").key() == text("a").key() != text("b").key()
    assert chat("q").key() != chat("p").key()


def test_message_borders_are_hashed():
    one = Conversation((turn("user", "ab"), turn("assistant", "")), "f:1")
    two = Conversation((turn("user", "a"), turn("user", "b"), turn("assistant", "")), "f:1")
    assert one.key() != two.key()


def test_digest_is_everything_but_the_place():
    base = chat("q", "a")
    assert base.digest() == chat("q", "a", where="g:9").digest()
    others = [
        chat("q", "b"),
        dataclasses.replace(base, tools=({"type": "function", "function": {"name": "f"}},)),
        dataclasses.replace(base, template_kwargs={"enable_thinking": False}),
        Conversation((turn("user", "q"), turn("assistant", "a", train=True)), "f:1"),
        text("q"),
    ]
    assert len({base.digest(), *(c.digest() for c in others)}) == 6


def test_hashes_do_not_depend_on_the_process():
    assert chat("q", "a").key().startswith("90d13dd5")
    assert text("a").digest().startswith("6d85774f")


def test_none_held_out_of_few():
    rows = [chat(f"q{i}", "a") for i in range(99)]
    assert hold_out(rows, seed=0) == (rows, [])
    train, held = hold_out([*rows, chat("q99", "a")], seed=0)
    assert (len(train), len(held)) == (95, 5)


def test_number_held_out():
    rows = [chat(f"q{i}", "a") for i in range(5000)]
    assert len(hold_out(rows, seed=0)[1]) == 200
    assert len(hold_out(rows, seed=0, at_most=7)[1]) == 7
    assert len(hold_out(rows, seed=0, share=0.01)[1]) == 50
    assert hold_out(rows, seed=0, share=0.0)[1] == []
    with pytest.raises(ValueError, match="share"):
        hold_out(rows, seed=0, share=5)


def test_seed_decides_and_the_order_of_rows_does_not():
    rows = [chat(f"q{i}", "a") for i in range(200)]
    train, held = hold_out(rows, seed=1)
    assert hold_out(rows, seed=1) == (train, held)
    assert hold_out(rows, seed=2)[1] != held
    assert {c.key() for c in hold_out(rows[::-1], seed=1)[1]} == {c.key() for c in held}
    assert held == [c for c in rows if c in held]


def test_a_group_too_large_is_not_held_out():
    rows = [chat("same", str(i)) for i in range(100)]
    assert hold_out(rows, seed=0) == (rows, [])
    _, held = hold_out([*rows, *(chat(f"q{i}", "a") for i in range(20))], seed=0)
    assert len(held) == 6
    assert all(c.messages[0]["content"] != "same" for c in held)


def test_a_dialogue_in_part_stays_with_the_whole():
    rows = []
    for i in range(100):
        whole = (f"q{i}", "a", "r", "b", "s", "c")
        rows += [chat(*whole[:2]), chat(*whole[:4]), chat(*whole)]
    train, held = hold_out(rows, seed=0)
    assert len(held) == 15
    first = {c.messages[0]["content"] for c in train}
    assert not first & {c.messages[0]["content"] for c in held}


CONTENT = st.sampled_from("abc")
DIALOGUES = st.lists(CONTENT, min_size=2, max_size=6).map(lambda c: chat(*c))
TEXTS = CONTENT.map(text)


@given(st.lists(DIALOGUES | TEXTS, max_size=40), st.integers(), st.floats(0, 1))
def test_split_loses_nothing_and_overlaps_nowhere(rows, seed, share):
    train, held = hold_out(rows, seed=seed, share=share, at_least_rows=0)
    assert len(held) <= round(share * len(rows))
    ids = sorted([id(c) for c in train] + [id(c) for c in held])
    assert ids == sorted(id(c) for c in rows)
    assert not {c.key() for c in train} & {c.key() for c in held}
    assert remove_overlap(train, held) == (held, [])
    assert remove_overlap(held, train) == (train, [])


def test_remove_overlap():
    train = [chat("q", "a"), chat("p", "a", "r", "b"), text("t")]
    evaluation = [
        chat("new", "a"),
        chat("q", "other", where="eval:2"),
        chat("p", "a", where="eval:3"),
        text("t"),
    ]
    kept, (finding,) = remove_overlap(train, evaluation)
    assert kept == evaluation[:1]
    assert (finding.code, finding.level, finding.count) == ("eval-overlaps-train", "warning", 3)
    assert finding.where == "eval:2"
    # Near miss: the same answer to another question.
    assert remove_overlap(train, [chat("other", "a"), text("T")])[1] == []
