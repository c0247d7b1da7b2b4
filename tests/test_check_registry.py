"""A check is a function in a module of a room: nothing else has to know of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from truetune.checks import coming_run, conversations, labels, saved_model
from truetune.checks.conversations import roles
from truetune.checks.conversations.rows import DataFacts
from truetune.checks.registry import ask, checks_of

NEW = '''
from truetune.checks.registry import check
from truetune.findings import rows_finding


@check(lambda facts: len(facts.train) > 1)
def shouting(facts):
    """Nobody shouts."""
    yield rows_finding(facts.names, [0], code="shouting", level="note", what="somebody shouts")
'''


def test_a_new_file_in_a_room_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_check_data import sound

    before = checks_of(conversations)
    (tmp_path / "zz_new.py").write_text(NEW)
    monkeypatch.setattr(conversations, "__path__", [*conversations.__path__, str(tmp_path)])
    try:
        assert len(checks_of(conversations)) == len(before) + 1
        two, one = DataFacts(sound(2)), DataFacts(sound(1))
        assert "shouting" in {finding.code for finding in ask(conversations, two)}
        # Its condition does not hold.
        assert "shouting" not in {finding.code for finding in ask(conversations, one)}
    finally:
        sys.modules.pop("truetune.checks.conversations.zz_new", None)
    monkeypatch.undo()
    assert checks_of(conversations) == before


def test_rooms_have_their_families_and_a_family_its_own() -> None:
    sizes = {len(checks_of(room)) for room in (labels, conversations, coming_run, saved_model)}
    assert min(sizes) > 3
    own = checks_of(roles)
    assert [one.judge.__name__ for one in own][:2] == [
        "one_question_at_a_time",
        "one_answer_at_a_time",
    ]
    assert set(own) < set(checks_of(conversations))
