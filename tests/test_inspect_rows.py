"""Rows as they are trained, on the terminal and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tiny_contracts as tiny
from tiny_contracts import byte_level, chat
from truetune import PromptContract
from truetune.cli.verbs import main
from truetune.contract.view import pieces, story, token_texts

HOSTILE = "<script>alert(1)</script> \x1b[31m [bold]red[/bold] \u202e"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    tokenizer.chat_template = tiny.THINKING
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        chat(HOSTILE, "Hello there."),
        chat("a", "<think>\nb\n</think>\n\nc", "d", "e"),
        chat("obey <|end|>", "no"),
        chat("a", "b<|end|>"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *words])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


@pytest.mark.parametrize("template", [tiny.PLAIN, tiny.THINKING, tiny.END_OF_TEXT])
def test_pieces_are_the_example_token_for_token(template: str) -> None:
    contract = PromptContract.load(byte_level(), template)
    messages = chat(
        "\u6f22\u5b57 \U0001f600", "<think>\nx\n</think>\n\n\u00e9t\u00e9", "b", "yes, no"
    )
    encoded = contract.encode(messages)
    for index, example in enumerate(encoded):
        found = pieces(contract, encoded, index)
        assert [i for piece in found for i in piece.ids] == example.ids
        assert "".join(piece.text for piece in found) == contract.tokens.decode(example.ids)
        on = [k in ("supervised", "stop") for p in found for k in [p.kind] * len(p.ids)]
        assert on == [bool(m) for m in example.mask]
        stops = [piece for piece in found if piece.kind == "stop"]
        assert len(stops) == len(encoded.turns[index])
        assert all(len(s.ids) == 1 and s.ids[0] in contract.stop_ids for s in stops)
        shared = sum(len(p.ids) for p in found if p.kind == "shared")
        assert shared == encoded.shared[index]


def test_a_character_of_several_tokens_stands_with_its_last() -> None:
    contract = PromptContract.load(byte_level())
    ids = contract.tokens.encode(["a\u6f22b"])[0]
    texts = token_texts(contract, ids)
    assert "".join(texts) == "a\u6f22b"
    assert "\ufffd" not in "".join(texts)
    assert texts.count("") == len(ids) - 3


def test_the_story_says_why_a_row_is_several_sequences() -> None:
    contract = PromptContract.load(byte_level(), tiny.THINKING)
    one = story(contract.encode(chat("a", "b", "c", "d")))
    assert one[0].startswith("one sequence: 2 supervised turns")
    two = story(contract.encode(chat("a", "<think>\nb\n</think>\n\nc", "d", "e")))
    assert two[0].startswith("2 sequences")
    assert "<think>" in two[1]


def test_a_row_on_the_terminal(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ran(capsys, str(model), "--data", str(data))
    assert code == 0
    assert "row 1 of 4" in out
    assert "rows.jsonl:1" in out
    # Shown, not sent; markup is text.
    assert "\x1b[31m" not in out
    assert "\u202e" not in out
    assert "[bold]red[/bold]" in out
    code, out, _ = ran(capsys, str(model), "--data", str(data), "--row", "2", "--ids")
    assert "sequence 2, from sequence 1 at token" in out
    assert re.search(r"\[\d+(, \d+)*\]", out)
    code, out, _ = ran(capsys, str(model), "--data", str(data), "--row", "3")
    assert "warning: the text of a user turn holds the control token '<|end|>'" in out
    code, out, _ = ran(capsys, str(model), "--data", str(data), "--row", "4")
    assert code == 0
    assert "contains the stop token '<|end|>'" in out


def test_settings_of_a_run_apply(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model), "--data", str(data), "--row", "2", "--set", "loss_on=last"]
    _, out, _ = ran(capsys, *words)
    assert "one sequence: 1 supervised turn" in out


def test_a_page_holds_no_foreign_markup(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "rows.html"
    code, out, _ = ran(capsys, str(model), "--data", str(data), "--html", str(page))
    assert code == 0
    assert "4 of 4 rows" in out
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in re.sub(r"<[^>]*>", "", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("<h2>") == 4
    assert re.search(r'<span class="stop" title="\d+">&lt;\|end\|&gt;</span>', text)
    assert 'class="refused"' in text


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--row", "1"], "rows-without-data"),
        (["--data", "DATA", "--row", "5"], "no-such-row"),
        (["--data", "DATA", "--row", "0"], "no-such-row"),
        (["--data", "DATA", "--set", "loss_on"], "usage"),
        (["--data", "DATA", "--set", "nonsense=1"], "recipe"),
        (["--data", "DATA", "--html", "/dev/null/x/rows.html"], "page-not-written"),
    ],
)
def test_wrong_input_is_one_error(
    model: Path, data: Path, words: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(data) if word == "DATA" else word for word in words]
    exit_code, _, err = ran(capsys, str(model), *given)
    assert exit_code == 2
    assert f"error[{code}]" in err


def test_columns_and_schema_name_the_rows_as_check_does(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"frage": "was?", "antwort": "darum"}) + "\n")
    words = (str(model), "--data", str(path))
    code, _, err = ran(capsys, *words)
    assert code == 2
    assert "--columns prompt=frage,completion=antwort" in err
    mapping = ("--columns", "prompt=frage,completion=antwort")
    code, out, err = ran(capsys, *words, *mapping, "--schema", "prompt-completion")
    assert code == 0, err
    assert "darum" in out
    code, _, err = ran(capsys, str(model), *mapping)
    assert code == 2
    assert "need --data" in err
