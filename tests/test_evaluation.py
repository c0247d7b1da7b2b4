"""`truetune eval`: what is asked, how it is compared, and what tells two models apart."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import truetune
from tiny_families import APART, FAMILIES, MORE
from tiny_models import TEMPLATE, write_model
from tiny_runs import command, lines, sums, write_rows
from tiny_speakers import write_speaker
from truetune import PromptContract, TruetuneError
from truetune.behaviour.replies import Thinking
from truetune.cli.eval_screen import require_writable
from truetune.data.load import load
from truetune.errors import OutputExists
from truetune.evaluation.interval import Bootstrap, interval, score, score_difference
from truetune.evaluation.match import Match, has_math_verify
from truetune.evaluation.questions import questions_of
from truetune.evaluation.read_answer import holds, json_value, last_number, with_json_values
from truetune.evaluation.result import Judgement, RowResult, measures_of, values_of
from truetune.evaluation.subject import Subject


def judged(kind: str, *pairs: tuple[str, str], pattern: str | None = None) -> list[bool]:
    match: Any = kind
    return [one.right for one in Match(match, pattern).judge(pairs)]


# ------------------------------------------------------------------ matchers


def test_exact_is_the_same_text_whitespace_aside() -> None:
    assert judged("exact", (" a\n b", "a b"), ("cafe\u0301", "caf\u00e9")) == [True, True]
    assert judged("exact", ("A b", "a b"), ("a b.", "a b"), ("", "a")) == [False, False, False]


def test_contains_is_whole_words() -> None:
    assert judged("contains", ("It is the Rill.", "Rill"), ("a  b c", "a b")) == [True, True]
    near = (("Rillford", "Rill"), ("Rill-side", "Rill"), ("-5", "5"), ("15", "5"), ("rill", "Rill"))
    assert judged("contains", *near) == [False] * 5
    # Nor does a part of a number; of a list and of a date it does.
    parts = (("It is 3.5.", "3"), ("3,000", "3"), ("1,100", "100"), ("3/4", "3"), ("1.5", "5"))
    assert judged("contains", *parts) == [False] * 5
    wholes = (("It is 3.", "3"), ("3,4,5", "4"), ("12/05/2024", "2024"), ("1,100.", "1,100"))
    assert judged("contains", *wholes) == [True] * 4
    # A later place may be a whole word; scripts without spaces have no words to be whole.
    assert judged("contains", ("Rillford on the Rill", "Rill")) == [True]
    assert holds("\u9996\u90fd\u662f\u5317\u4eac\u3002", "\u5317\u4eac")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 1,234.50 dollars.", Fraction(2469, 2)),
        ("\u2212 7 and \u22127", -7),
        ("10-12", 12),
        ("-$5", -5),
        ("3/4", Fraction(3, 4)),
        ("\\dfrac{3}{4}", Fraction(3, 4)),
        ("\\boxed{12} is more than 13", 12),
        ("\\boxed{\\frac{1}{2}}", Fraction(1, 2)),
        ("\\boxed{yes} 4", 4),
        ("1e3", 1000),
        ("3 \\times 10^{5}", 300_000),
        ("1{,}000 or 2\u202f000", 2000),
        ("5kg", 5),
        ("50%", 50),
        ("#### 18", 18),
        ("x2 is H2O", None),
        ("\\boxed{10^3}", 1000),
        ("10**3 or 10\u00b3", 1000),
        ("10^{-3}", Fraction(1, 1000)),
        ("9\u00b2", 81),
        ("5 m^2, 5 m\u00b2, 5 m^{2}", 5),
        ("2 1/2", Fraction(5, 2)),
        ("2\u00bd", Fraction(5, 2)),
        ("page 2 3/2", Fraction(3, 2)),
        ("\\frac12", Fraction(1, 2)),
        ("1 000 000", 1_000_000),
        ("rows 12 345", 345),
        ("1.2.3", Fraction(6, 5)),
        ("4/0", 4),
        ("none", None),
        ("9" * 500, None),
    ],
)
def test_the_last_number(text: str, value: Fraction | int | None) -> None:
    assert last_number(text) == value


@pytest.mark.skipif(has_math_verify(), reason="math-verify compares numbers here")
def test_numbers_are_equal_as_numbers() -> None:
    pairs = [("It is 1,000.0 m.", "#### 1000"), ("1/2", "0.5"), ("7 or 8", "7"), ("no", "7")]
    assert judged("number", *pairs) == [True, True, False, False]


def test_mathematics_is_compared_by_math_verify_where_it_is_installed() -> None:
    pytest.importorskip("math_verify")
    pairs = [("\\boxed{\\sqrt{4}}", "$2$"), ("\\boxed{3}", "$2$"), ("no", "$2$")]
    assert judged("number", *pairs) == [True, False, False]


def test_json_is_compared_as_values() -> None:
    same = [('{"a": 1.0, "b": [1]}', '{"b": [1], "a": 1}'), ("so:\n```json\n[1]\n```", "[1]")]
    assert judged("json", *same, ('Here: {"a": 1} done', '{"a": 1}')) == [True] * 3
    near = [("[1, 2]", "[2, 1]"), ("true", "1"), ('"1"', "1"), ("[1", "[1]"), ("NaN", "NaN")]
    assert judged("json", *near, ('{"a": 2, "a": 1}', '{"a": 1}')) == [False] * 6
    assert json_value("1e400") == json_value("10e399")
    assert json_value("[" * 100_000) is None
    assert json_value("1234567890123456789012345678901") != json_value("1e30")


def test_json_spellings_of_one_value() -> None:
    same = [
        ('{"b": 1e3, "a": "caf\\u00e9"}  \n', ' {"a":"caf\u00e9","b":1000}'),
        ("0.10", "1e-1"),
        ("-0", "0.0"),
        ('{"a": [1.50, null]}', '{"a": [1.5, null]}'),
    ]
    assert judged("json", *same) == [True] * 4
    near = [("false", "0"), ("null", "0"), ("Infinity", "Infinity"), ('{"a": NaN}', '{"a": NaN}')]
    assert judged("json", *near, ("1000.0001", "1e3"), ('"1e3"', "1000")) == [False] * 6


def test_values_in_a_text_have_one_form() -> None:
    call = '<tool_call>\n{"name": "roll", "arguments": {"sides": 6.0, "of": ["a"]}}\n</tool_call>'
    same = '<tool_call>\n{"arguments": {"of": ["a"], "sides": 6}, "name": "roll"}\n</tool_call>'
    assert with_json_values(call) == with_json_values(same)
    for near in ('"6"', "true", "6.5", "NaN"):
        other = call.replace("6.0", near)
        assert with_json_values(other) != with_json_values(call)
    assert with_json_values('{"a": true}') != with_json_values('{"a": 1}')
    for plain in ("no value: {a} and [b", "", "[" * 100_000):
        assert with_json_values(plain) == plain


def test_patterns_are_the_rows_own_or_one_for_all() -> None:
    assert judged("regex", ("a cat", "c.t"), ("a dog", "c.t")) == [True, False]
    assert judged("regex", ("Answer: 4", "x"), ("4", "x"), pattern="^Answer") == [True, False]
    pairs = [("A: B\nno, A: C", "A: C"), ("A: B", "A: C"), ("A: C", "C"), ("C", "A: C")]
    assert judged("regex", *pairs, pattern=r"A: (\w)") == [True, False, True, False]


def test_a_pattern_that_runs_for_ever_is_stopped_and_told() -> None:
    hostile = ("a" * 40 + "b", "^(a+)+$")
    found = Match("regex").judge([("aa", "^(a+)+$"), hostile, ("b", "b")])
    assert [(one.right, one.slow) for one in found] == [(True, False), (False, True), (True, False)]


# ------------------------------------------------------------------ intervals


def rows_of(right: list[bool], tokens: list[int] | None = None) -> list[RowResult]:
    sizes = tokens or [3] * len(right)
    return [
        RowResult(
            f"r:{at}", "", "",
            (Judgement("", size, True, yes, False, str(yes), False, False, False, False, False),),
            1.0 if yes else 2.0, 4,
        )
        for at, (yes, size) in enumerate(zip(right, sizes, strict=True))
    ]  # fmt: skip


def against(first: list[RowResult], second: list[RowResult]) -> dict[str, str]:
    told = values_of([first, second], measures_of("exact", 1), 0)[1][1]
    return {name: difference.word for name, difference in told.items()}


def test_a_difference_is_told_from_the_same_rows() -> None:
    half = [at % 2 == 0 for at in range(40)]
    better = [True, *half[1:]]
    better[1:20:2] = [True] * 10
    told = against(rows_of(half), rows_of(better))
    assert (told["match"], told["loss"], told["ended"]) == (
        "better",
        "better",
        "inconclusive",
    )
    assert against(rows_of(better), rows_of(half))["match"] == "worse"
    # As many right answers on other rows are no difference.
    other = [not yes for yes in half]
    assert against(rows_of(half), rows_of(other))["match"] == "inconclusive"
    assert against(rows_of(half), rows_of(half, [9] * 40))["length_median"] == "longer"


@pytest.mark.parametrize(("different", "word"), [(5, "inconclusive"), (6, "better")])
def test_fewer_than_six_rows_tell_nothing(different: int, word: str) -> None:
    wrong, right = [False] * different, [True] * different
    assert against(rows_of(wrong), rows_of(right))["match"] == word


def test_losses_over_other_tokens_are_not_compared() -> None:
    first, second = rows_of([True] * 9), rows_of([False] * 9)
    other = [RowResult(r.where, "", "", r.replies, r.loss, 5) for r in second]
    assert against(first, second)["loss"] == "worse"
    assert against(first, other)["loss"] == "not comparable"


def test_intervals_follow_from_the_seed() -> None:
    import torch

    column = torch.arange(50.0)[:, None]
    once, again = Bootstrap(50, 3).sums(column), Bootstrap(50, 3).sums(column)
    assert torch.equal(once, again)
    assert not torch.equal(once, Bootstrap(50, 4).sums(column))
    found = interval(once[:, 0] / 50)
    assert found is not None
    # The mean of 0..49 is 24.5, its standard error 2.04.
    assert found.low == pytest.approx(20.5, abs=0.6)
    assert found.high == pytest.approx(28.5, abs=0.6)
    assert interval(torch.tensor([float("nan")])) is None


def test_shares_have_score_intervals() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857-872, table I), method 3.
    for yes, number, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                   (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
        found = score(yes, number)
        assert (found.low, found.high) == (
            pytest.approx(low, abs=1e-4),
            pytest.approx(high, abs=1e-4),
        )
    # One row in forty wrong leaves room on both sides, which resampled rows do not show.
    one_wrong = score(39, 40)
    assert 0.86 < one_wrong.low < 0.88
    assert 0.99 < one_wrong.high < 1.0
    ((values, _),) = values_of([rows_of([False] * 10)], measures_of("exact", 1), 0)
    told = values["match"].interval
    assert told is not None
    assert (values["match"].value, told.low) == (0.0, 0.0)
    assert told.high == pytest.approx(0.2775, abs=1e-4)


def test_differences_of_shares_have_score_intervals() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 2635-2650, table II), method 10.
    for counts, low, high in (
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((36, 14, 0, 0), 0.1528, 0.4167),
    ):
        found = score_difference(*counts)
        assert found.low == pytest.approx(low, abs=1e-4)
        assert found.high == pytest.approx(high, abs=1e-4)
    same = score_difference(53, 0, 0, 1)
    assert same.low == -same.high < 0
    # All against none: the difference is 100 %, and a hundred rows do not show more than 94.
    whole = score_difference(0, 100, 0, 0)
    assert 0.93 < whole.low < 0.96
    assert whole.high == 1.0
    told = values_of([rows_of([False] * 40), rows_of([True] * 40)], measures_of("exact", 1), 0)
    apart = told[1][1]["match"]
    assert apart.word == "better"
    assert apart.interval is not None
    assert apart.interval.low < 0.9


def test_quantiles_of_resampled_rows_are_those_of_their_values() -> None:
    import torch

    lengths = torch.tensor([[1, 9], [2, 8], [3, 7]])
    boot = Bootstrap(3, 0)
    found = boot.quantiles(lengths, (0.5,))
    for counts, value in zip(next(boot._counts()).tolist(), found[:, 0].tolist(), strict=False):
        drawn = sorted(
            x for n, row in zip(counts, lengths.tolist(), strict=True) for x in row * int(n)
        )
        assert value == drawn[2]


def test_most_votes_win_and_cut_replies_have_none() -> None:
    def reply(said: str | None, right: bool, ended: bool = True) -> Judgement:
        return Judgement("", 1, ended, right, False, said, False, False, False, False, False)

    def row(*replies: Judgement) -> RowResult:
        return RowResult("r", "", "", replies, None, 0)

    three, four = reply("3", True), reply("4", False)
    assert row(three, four, three).majority_right
    assert not row(four, three, four).majority_right
    assert row(three, four).majority_right
    assert not row(four, three).majority_right
    assert row(reply("4", False, ended=False), reply(None, False), three).majority_right
    assert not row(reply(None, False)).majority_right
    assert row(three, four, four, four).share_right == 0.25


# ------------------------------------------------------------------ questions


def test_shots_never_show_the_asked_row(tmp_path: Path) -> None:
    rows = [*sums(12), sums(1)[0] | {"completion": "one."}]
    loaded = load(write_rows(tmp_path / "rows.jsonl", rows))
    found, _ = questions_of(loaded, Match(), shots=4, seed=1)
    for question in found:
        contents = [m["content"] for m in question.asked.messages]
        assert len(contents) == 9
        assert contents.count(question.last_words) == 1
        assert len(set(zip(contents[:8:2], contents[1:8:2], strict=True))) == 4
    again, _ = questions_of(loaded, Match(), shots=4, seed=1, limit=3)
    assert again == found[:3]
    assert questions_of(loaded, Match(), shots=4, seed=2)[0] != found
    # Twelve others at most: the twin of the first row asks the same.
    assert questions_of(loaded, Match(), shots=11)[0]
    with pytest.raises(TruetuneError, match="needs that many other rows") as caught:
        questions_of(loaded, Match(), shots=12)
    assert caught.value.code == "too-few-shots"


def test_shots_stand_behind_the_system_message_and_before_the_rest(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    other = [{"role": "system", "content": "T"}, *({**m, "content": "x"} for m in talk[1:3])]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": talk}, {"messages": other}])
    found, _ = questions_of(load(path), Match(), shots=1, limit=1)
    assert [m["content"] for m in found[0].asked.messages] == ["S", "x", "x", "a", "b", "c"]
    assert found[0].expected == "d"


def test_a_prompt_is_the_one_that_is_served(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    subject = Subject.open(str(model), None, None)
    loaded = load(write_rows(tmp_path / "rows.jsonl", sums(5)))
    found, _ = questions_of(loaded, Match(), shots=2)
    for question, prompt in zip(found, subject.prompts(found), strict=True):
        assert not isinstance(prompt, str)
        served = PromptContract.load(str(model)).prompt_ids(question.asked.messages)
        assert list(prompt.ids) == served
        assert prompt.target is not None
        assert prompt.target.ids[len(served) :] == subject.tokenizer.encode(
            question.expected + "<|end|>"
        )


def test_thinking_is_taken_from_the_answer() -> None:
    pairs = (("<think>", "</think>"),)
    own, opened = Thinking(False, pairs), Thinking(True, pairs)
    assert own.split("<think>a</think>b") == (True, True, "b")
    assert own.split("<think>a") == (True, False, "")
    assert own.split("a</think>b") == (False, False, "a</think>b")
    assert opened.split("a</think>b") == (True, True, "b")
    assert opened.split("a") == (True, False, "")
    assert Thinking(False, ()).split("a") == (False, False, "a")


# ------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_speaker(folder / "yes", "<|assistant|>yes<|end|>")
    write_speaker(folder / "no", "<|assistant|>no<|end|>")
    write_speaker(folder / "on", "<|assistant|>yy")
    rows = [{"prompt": f"{at}?", "completion": "yes" if at < 15 else "maybe"} for at in range(20)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def test_models_side_by_side(place: Path, tmp_path: Path) -> None:
    found = truetune.evaluate(
        [place / "no", place / "yes", place / "on"], place / "rows.jsonl", quiet=True,
        max_new_tokens=9,
    )  # fmt: skip
    no, yes, on = found.models
    assert [m.values["match"].value for m in (no, yes, on)] == [0, 0.75, 0]
    assert [m.values["ended"].value for m in (no, yes, on)] == [1, 1, 0]
    assert [m.values["length_median"].value for m in (no, yes, on)] == [3, 4, 9]
    assert yes.against_first["match"].word == "better"
    assert yes.against_first["length_median"].word == "longer"
    assert on.against_first["ended"].word == "worse"
    assert on.against_first["match"].word == "inconclusive"
    assert "closed_thinking" not in yes.values
    assert found.num_rows == 20
    # "yes" and its end are certain to the model that says nothing else.
    assert yes.rows[0].loss == pytest.approx(0, abs=1e-3)
    assert yes.rows[0].loss_tokens == 4
    shown = repr(found)
    assert max(map(len, shown.splitlines())) <= 80
    assert "match: exact" in shown
    assert found._repr_html_().startswith("<pre>")
    assert found[str(place / "yes")] is yes


def test_the_loss_is_that_of_the_plain_forward_pass(place: Path, tmp_path: Path) -> None:
    import torch

    from truetune.model.load import load_model

    model = write_model(tmp_path / "m")
    rows = [{"prompt": "q" * (at + 1), "completion": "a" * (9 - at)} for at in range(6)]
    found = truetune.evaluate(model, write_rows(tmp_path / "r.jsonl", rows), quiet=True,
                              max_new_tokens=1)  # fmt: skip
    loaded = load_model(model, purpose="inference", device="cpu")
    contract = PromptContract.load(str(model))
    total, count = 0.0, 0
    for row, result in zip(rows, found.models[0].rows, strict=True):
        talk = [{"role": "user", "content": row["prompt"]}]
        (example,) = contract.encode([*talk, {"role": "assistant", "content": row["completion"]}])
        with torch.no_grad():
            log_TV = loaded.model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        losses = [
            -float(log_TV[at - 1, token])
            for at, (token, on) in enumerate(zip(example.ids, example.mask, strict=True))
            if on
        ]
        assert result.loss == pytest.approx(sum(losses), rel=1e-4)
        total, count = total + sum(losses), count + len(losses)
    assert found.models[0].values["loss"].value == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mamba2", "lfm2", "bloom"])
def test_losses_in_shared_passes_are_those_of_single_rows(kind: str, tmp_path: Path) -> None:
    from truetune.compare import measure, row_losses
    from truetune.model.load import load_model

    settings = FAMILIES.get(kind) or MORE.get(kind) or APART[kind][0]
    loaded = load_model(write_model(tmp_path / kind, kind, **settings), purpose="inference")
    rows = [
        ([65 + (at * place) % 90 for place in range(4 + 3 * at)], [0, *[1] * (3 + 3 * at)])
        for at in range(7)
    ]
    rows.append(([65, 66, 67], [0, 0, 0]))
    alone = [-sum(measure(loaded, [row]).logprobs[0]) for row in rows[:-1]]
    told: list[tuple[int, int]] = []
    found = row_losses(loaded, rows, lambda *facts: told.append(facts))
    assert found == pytest.approx([*alone, 0.0], rel=1e-4)
    assert told[-1] == (8, 8)


def test_rows_that_one_model_cannot_be_asked_are_left_out_for_all(
    place: Path, tmp_path: Path
) -> None:
    refusing = "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    picky = write_speaker(
        tmp_path / "picky", "<|assistant|>yes<|end|>", template=refusing + TEMPLATE
    )
    rows: list[Any] = [
        {"prompt": "fine?", "completion": "yes"},
        {"prompt": "bad?", "completion": "yes"},
        {"prompt": "x" * 200, "completion": "yes"},
        {"prompt": "x" * 118, "completion": "yes" * 9},
        {"prompt": "blank?", "completion": " "},
        "[1]",
        {"messages": [{"role": "user", "content": "open?"}]},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = truetune.evaluate([place / "yes", picky], data, quiet=True, max_new_tokens=20)
    assert [row.where.rpartition(":")[2] for row in found.models[0].rows] == ["1", "4"]
    told = {out.where.rpartition(":")[2]: (out.reason, out.model) for out in found.left_out}
    assert sum(out.count for out in found.left_out) == 5
    assert told["2"][1] == str(picky)
    assert "the template refuses the prompt" in told["2"][0]
    assert "no room in the context of 128 tokens" in told["3"][0]
    assert told["3"][1] == str(place / "yes")
    # The fourth row's prompt fits, its answer does not.
    (without,) = found.models[0].no_loss
    assert (without.count, without.reason) == (1, "prompt and answer are longer than the context")
    assert "remain for the reply after 1 prompt" in found.models[0].notes[0]
    asked = truetune.evaluate(place / "yes", data, match="none", quiet=True, max_new_tokens=5)
    assert [row.where.rpartition(":")[2] for row in asked.models[0].rows] == ["1", "2", "4"]
    assert "match" not in asked.models[0].values


def test_a_reply_that_does_not_end_is_never_right_and_told(tmp_path: Path) -> None:
    model = write_speaker(tmp_path / "m", "<|assistant|>yy")
    data = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "yyyy"}])
    found = truetune.evaluate(model, data, max_new_tokens=4, quiet=True)
    assert found.models[0].values["match"].value == 0
    said = found.models[0].notes[0]
    assert "contain the expected answer but did not end do not match (1 of them):" in said


def test_empty_and_copied_replies_are_counted(tmp_path: Path) -> None:
    silent = write_speaker(tmp_path / "silent", "<|assistant|><|end|>")
    parrot = write_speaker(tmp_path / "parrot", "<|assistant|>who<|end|>")
    rows = [
        {"prompt": "who", "completion": "me"},
        {"prompt": "who are", "completion": "you"},
        {"prompt": "who", "completion": "who"},
    ]
    data = write_rows(tmp_path / "r.jsonl", rows)
    found = truetune.evaluate([silent, parrot], data, quiet=True)
    assert [m.values["empty"].value for m in found.models] == [1, 0]
    assert [round(3 * m.values["copied"].value) for m in found.models] == [0, 1]


def test_thinking_that_does_not_end_is_counted(tmp_path: Path) -> None:
    thinks = TEMPLATE.replace("%}<|assistant|>{%", "%}<|assistant|><think>\n{%")
    assert thinks != TEMPLATE
    open_one = write_speaker(tmp_path / "open", "\naa", template=thinks)
    closing = write_speaker(tmp_path / "closing", "\n</think>yes<|end|>".replace("</think>", "</t"),
                            template=thinks)  # fmt: skip
    data = write_rows(tmp_path / "r.jsonl", [{"prompt": "q", "completion": "yes"}] * 2)
    found = truetune.evaluate([open_one, closing], data, quiet=True, max_new_tokens=8)
    assert [m.values["closed_thinking"].value for m in found.models] == [0, 0]
    assert found.models[0].rows[0].replies[0].thought


def test_samples_are_drawn_anew_and_repeat_with_the_seed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    data = write_rows(tmp_path / "r.jsonl", sums(4))

    def texts(**more: Any) -> list[list[str]]:
        found = truetune.evaluate(model, data, quiet=True, max_new_tokens=6, **more)
        return [[reply.text for reply in row.replies] for row in found.models[0].rows]

    three = texts(samples=3)
    assert [len(row) for row in three] == [3] * 4
    assert all(len(set(row)) > 1 for row in three)
    assert texts(samples=3) == three
    assert texts(samples=3, seed=1) != three
    assert texts() == texts(temperature=0)


def test_a_run_its_adapter_and_the_merged_model_say_the_same(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    truetune.train(
        place / "no", place / "rows.jsonl", lora=True, max_steps=30, learning_rate=0.02,
        output=run, quiet=True, on_collapse="continue", save_steps=10,
    )  # fmt: skip
    truetune.export(run, tmp_path / "merged", quiet=True, verify=False)
    found = truetune.evaluate(
        [place / "no", run, run / "adapter", tmp_path / "merged"], place / "rows.jsonl",
        quiet=True, max_new_tokens=9,
    )  # fmt: skip
    base, *same = found.models
    replies = [[row.replies for row in model.rows] for model in same]
    assert replies[0] == replies[1] == replies[2]
    assert replies[0] != [row.replies for row in base.rows]
    assert {m.against_first["loss"].word for m in same} == {"better"}
    losses = [model.values["loss"].value for model in same]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    # Of an unfinished run the last checkpoint is asked, and named.
    assert Subject.open(str(run), None, None).findings == ()
    shutil.rmtree(run / "adapter")
    (finding,) = Subject.open(str(run), None, None).findings
    assert (finding.code, finding.level) == ("checkpoint-evaluated", "warning")
    assert "checkpoint step-00000020" in finding.what


# ------------------------------------------------------------------ the command line


def test_the_command_line_writes_a_table_and_rows(place: Path, tmp_path: Path) -> None:
    words = ["eval", place / "no", place / "yes", "--data", place / "rows.jsonl"]
    shown = command(*words, "--show", 1, "-o", tmp_path / "out.jsonl")
    assert shown.code == 0, shown.err
    assert "75.0 [53.1, 88.8]" in shown.out
    assert "better" in shown.out
    assert max(map(len, shown.out.splitlines()[:20])) <= 80
    assert "maybe" in shown.out.rpartition("rows.jsonl:")[2]
    written = lines(tmp_path / "out.jsonl")
    assert len(written) == 40
    assert [row["model"] for row in written[:2]] == [str(place / "no"), str(place / "yes")]
    assert written[1]["replies"][0]["text"] == "yes"
    again = command(*words, "-o", tmp_path / "out.jsonl")
    assert (again.code, "output-exists" in again.err) == (2, True)
    as_json = command(*words, "--json", "-o", tmp_path / "out.jsonl", "--overwrite")
    facts = json.loads(as_json.out)
    assert facts["models"][1]["measures"]["match"]["value"] == 0.75
    assert facts["models"][1]["against_first"]["match"]["word"] == "better"
    assert lines(tmp_path / "out.jsonl") == written


def test_hostile_replies_do_not_reach_the_terminal(tmp_path: Path) -> None:
    model = write_speaker(tmp_path / "m", "<|assistant|>\x1b[2J\nok\x9b<|end|>")
    data = write_rows(tmp_path / "r.jsonl", [{"prompt": "\x1b]0;x\x07", "completion": "\x9b1m"}])
    shown = command("eval", model, "--data", data, "--show", 1)
    assert shown.code == 0, shown.err
    assert not any(char in shown.out for char in "\x1b\x07\x9b")
    assert "\\x1b" in shown.out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["yes"], "no-data"),
        (["yes", "--data", "none.jsonl"], "no-such-file"),
        (["none/at/all", "--data", "rows.jsonl"], "model-not-found"),
        (["yes", "yes", "--data", "rows.jsonl"], "model-twice"),
        (["model.gguf", "--data", "rows.jsonl"], "no-such-file"),
        (["http://127.0.0.1:9", "--data", "rows.jsonl"], "server-unreachable"),
        (["yes", "--data", "rows.jsonl", "--match", "fuzzy"], "match-unknown"),
        (["yes", "--data", "rows.jsonl", "--match", "regex", "--pattern", "(a"], "match-pattern"),
        (["yes", "--data", "rows.jsonl", "--pattern", "a"], "match-pattern"),
        (["yes", "--data", "rows.jsonl", "--samples", "0"], "evaluation-setting"),
        (["yes", "--data", "rows.jsonl", "--limit", "0"], "evaluation-setting"),
        (["yes", "--data", "rows.jsonl", "--samples", "2", "--temperature", "0"], "samples-greedy"),
        (["yes", "--data", "rows.jsonl", "--max-new-tokens", "0"], "sampling"),
        (["yes", "--data", "rows.jsonl", "-o", "none/out.jsonl"], "output-not-writable"),
        (["yes", "--data", "rows.jsonl", "-o", "yes"], "output-exists"),
        (["yes", "--data", "rows.jsonl", "--tasks", "mmlu"], "evaluation-setting"),
        (["yes", "--data", "rows.jsonl", "--chat-template", "none.jinja"], "no-such-template"),
        (["yes", "--data", "rows.jsonl", "--shots", "30"], "too-few-shots"),
        (["yes", "--data", "rows.jsonl", "--match", "json"], "nothing-to-ask"),
    ],
)
def test_wrong_input_is_refused_in_words(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: str
) -> None:
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.iterdir())
    shown = command("eval", *words)
    assert (shown.code, shown.out) == (2, "")
    assert f"error[{code}]" in shown.err
    assert "Traceback" not in shown.err
    assert sorted(path.name for path in place.iterdir()) == before


def test_what_is_wrong_is_said_before_torch_is_imported(place: Path) -> None:
    import subprocess
    import sys

    words = ["eval", str(place / "yes"), "--data", str(place / "none.jsonl")]
    code = (
        "import sys; from truetune.cli.verbs import main\n"
        f"try: main({words!r})\nexcept SystemExit as e: print(e.code)\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2"], done.stderr


def test_results_do_not_replace_the_data(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(OutputExists) as caught:
        require_writable(rows, str(rows), overwrite=True)
    assert caught.value.code == "output-is-input"
    require_writable(tmp_path / "out.jsonl", str(rows), overwrite=False)
