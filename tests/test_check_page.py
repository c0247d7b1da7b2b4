"""The page of a checkup: complete, self-contained, and deaf to what rows would have it do."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from truetune.cli.check_page import page
from truetune.errors import UsageError
from truetune.findings import Finding
from truetune.reporting.html import write_document
from truetune.run.checkup import Checkup

EVIL = "<script>alert(1)</script>\u202e\x1b[31m\"'&"


class Seen(HTMLParser):
    """Tags and their balance."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


def checkup(text: str = "plain") -> Checkup:
    finding = Finding("a-code", "error", text, text, 3, text, text, rows=(text, "b:2"))
    damage = {
        "limit": 100,
        "rows": 10,
        "cut": 4,
        "stops": 4,
        "answers": 4,
        "gone": 1,
        "thoughts": 2,
        "with_thoughts": 4,
        "tokens_kept": 0.9,
    }
    lengths = {
        "p50": 50,
        "p95": 150,
        "p99": 190,
        "longest": 200,
        "examples": 10,
        "keeps_99_percent": 192,
        "limit": damage,
        "limits": [damage],
        "histogram": [{"from": 1, "to": 100, "rows": 6}, {"from": 101, "to": 200, "rows": 4}],
    }
    run = {"model": text, "data": text, "learning_rate": 1e-4, "lora": True, "epochs": None}
    return Checkup([finding, Finding("b", "note", text)], {"run": run, "lengths": lengths})


@pytest.mark.parametrize("text", ["plain", EVIL])
def test_the_page_is_whole_and_fetches_nothing(text: str) -> None:
    html = page(checkup(text).as_dict())
    seen = Seen()
    seen.feed(html)
    assert seen.open == []
    assert "script" not in seen.tags
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in seen.attributes}
    assert "http" not in html.replace("http-equiv", "")
    assert "\u202e" not in html
    assert "\x1b" not in html


def test_the_page_has_every_fact() -> None:
    html = page(checkup().as_dict())
    assert "not ok" in html
    assert "1 error, 1 note" in html
    assert "a-code" in html
    assert "(and 2 more)" in html
    assert "<li>b:2</li>" in html
    assert ">40 %<" in html  # rows cut
    assert ">50 %<" in html  # of those with reasoning, never closed
    assert "limit 100" in html
    assert "1e-04" in html or "0.0001" in html


def test_a_page_of_nothing() -> None:
    assert "nothing found" in page(Checkup([], {}).as_dict())


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("a file where the folder would be")
    with pytest.raises(UsageError, match="cannot be written"):
        write_document(tmp_path / "none" / "page.html", page(checkup().as_dict()))
    write_document(tmp_path / "page.html", page(checkup("\ud800").as_dict()))
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
