"""What a length limit costs, counted against rows whose lengths are known."""

from __future__ import annotations

import numpy as np
import pytest

from tiny_models import TEMPLATE, tiny_tokenizer
from truetune.checks.labels.table import TokenTable
from truetune.checks.lengths import (
    damage,
    damage_table,
    encoded_lengths,
    histogram,
    length_report,
    limit_keeping,
    percent,
    quantiles,
    report_lines,
    row_lengths,
)
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.contract.policy import Policy
from truetune.data.conversation import Conversation

THINK = 50


def example(prompt: int, thought: int, answer: int) -> SFTExample:
    """prompt tokens, then reasoning closed by THINK (none for 0), then the answer and its stop."""
    said = ([7] * (thought - 1) + [THINK] if thought else []) + [8] * (answer - 1) + [9]
    return SFTExample([6] * prompt + said, [0] * prompt + [1] * len(said))


def lengths(*examples: SFTExample):  # type: ignore[no-untyped-def]
    names = [f"row {i}" for i in range(len(examples))]
    return row_lengths(TokenTable.of_examples(examples, names), [THINK])


def test_damage_is_counted_by_what_is_lost() -> None:
    rows = lengths(example(10, 0, 10), example(10, 20, 10), example(40, 0, 5))
    # One token less than the longest, 45, takes its stop and nothing else.
    assert damage(rows, 45).cut == 0
    at = damage(rows, 44)
    assert (at.cut, at.stops, at.answers, at.gone, at.thoughts) == (1, 1, 0, 0, 0)
    at = damage(rows, 30)
    assert (at.cut, at.stops, at.answers, at.gone, at.thoughts) == (2, 2, 2, 1, 0)
    at = damage(rows, 29)
    assert (at.thoughts, at.with_thoughts) == (1, 1)
    assert at.tokens_kept == pytest.approx((20 + 29 + 29) / 105)


def test_a_cut_behind_the_answer_costs_nothing() -> None:
    ids, mask = example(5, 0, 5)
    rows = lengths(SFTExample([*ids, 1, 1, 1], [*mask, 0, 0, 0]))
    at = damage(rows, 10)
    assert (at.cut, at.stops) == (1, 0)
    assert at.line().endswith("none of them in an answer")


def test_the_run_that_never_learned_to_close_its_thinking() -> None:
    """788 of 1,000 reasoning rows are longer than 2,048 tokens."""
    rows = lengths(*[example(100, 2500, 200)] * 788, *[example(100, 900, 200)] * 212)
    assert damage(rows, 2048).line() == (
        "78.8 % of the rows (788 of 1,000) are cut at 2,048 tokens: 78.8 % lose the token that "
        "ends the answer, 78.8 % of those with reasoning never close it"
    )


def test_the_limit_that_keeps_most_rows() -> None:
    rows = lengths(*[example(10, 0, 90 + i) for i in range(100)])
    assert limit_keeping(rows, 1.0) == 199
    # 198 rounded up to a multiple of 64 is beyond the longest row.
    assert limit_keeping(rows, 0.99) == 199
    assert limit_keeping(rows, 0.5) == 192
    assert damage(rows, limit_keeping(rows, 0.5)).cut <= 50
    assert limit_keeping(lengths()) == 0


def test_the_table_covers_the_usual_limits_and_those_asked() -> None:
    rows = lengths(example(100, 0, 900))
    assert [d.limit for d in damage_table(rows, 700, None)] == [256, 512, 700, 1024]
    assert [d.cut for d in damage_table(rows)] == [1, 1, 0]


def test_quantiles_and_histogram() -> None:
    rows = lengths(*[example(10, 0, 90 + i) for i in range(100)])
    assert quantiles(rows) == {"p50": 149, "p95": 194, "p99": 198, "longest": 199}
    bins = histogram(rows, 4)
    assert sum(n for _, _, n in bins) == 100
    assert bins[0] == (1, 50, 0)
    assert bins[-1] == (151, 200, 49)
    assert histogram(lengths()) == []
    assert quantiles(lengths()) == {}


def test_rows_without_a_label_are_left_out() -> None:
    rows = lengths(SFTExample([1, 2, 3], [0, 0, 0]), example(3, 0, 3))
    assert rows.total.tolist() == [6]
    assert list(rows.where) == ["row 1"]


def test_lengths_of_what_a_contract_encoded() -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    contract = PromptContract.load(tokenizer)
    rows = [
        Conversation(
            ({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": said}), f"r:{i}"
        )
        for i, said in enumerate(("<think>a</think>yes", "yes"))
    ]
    encoded = contract.encode_all([*rows, Conversation((), "t:1", text="text")])
    found = encoded_lengths(encoded, contract)  # type: ignore[arg-type]
    # <|user|> H m ? <|assistant|> is 5 tokens, each byte is one, and so is the stop.
    assert found.total.tolist() == [5 + 19 + 1, 5 + 3 + 1]
    assert found.answer.tolist() == [5, 5]
    assert found.stop.tolist() == [24, 8]
    assert list(found.where) == ["r:0", "r:1"]
    # The marker is eight tokens here; the last may merge with what follows elsewhere.
    assert np.array_equal(found.thought, [5 + 8 + 6, -1])


def test_markers_of_ones_own_close_the_reasoning() -> None:
    contract = PromptContract.load(
        tiny_tokenizer(TEMPLATE), policy=Policy("inline", think_markers=("<|a|>", "<|b|>"))
    )
    turns = [
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "yes", "reasoning_content": "so"},
    ]
    encoded = contract.encode_all([Conversation(tuple(turns), "r:0")])
    report = length_report(encoded_lengths(encoded, contract), 14, None)  # type: ignore[arg-type]
    # 5 prompt tokens, then <|a|> newline s o newline <|b|>, of which the last byte is not asked.
    assert report["limit"] == next(d for d in report["limits"] if d["limit"] == 14)
    assert (report["limit"]["thoughts"], report["limit"]["with_thoughts"]) == (1, 1)
    names, texts = zip(*report_lines(report), strict=True)
    assert names == ("lengths", "limits")
    assert texts[1].startswith(
        "14 tokens: 100 % are cut; 100 % lose the end of the answer; 100 % of"
    )
    plain = length_report(encoded_lengths(encoded, contract), 400, None)  # type: ignore[arg-type]
    assert len(report_lines(plain)) == 1


def test_percent() -> None:
    assert [percent(p) for p in (0, 0.788, 0.25, 0.0001, 1)] == [
        *("0 %", "78.8 %", "25 %", "under 0.1 %", "100 %")
    ]
