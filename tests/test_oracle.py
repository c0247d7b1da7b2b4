"""The oracle is not blind, and under it no template and no mutant of one is silently wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import mutant_table

import oracle
import oracle_rows as judged
import template_corpus as corpus
import template_mutants
from oracle import Trained, Wrong, judge
from truetune import PromptContract

pytestmark = pytest.mark.filterwarnings("error")
REMAKE = "remake it: python scripts/mutant_table.py"
BAD = (judged.WRONG, judged.CRASHED)


# ---------------------------------------------------------------- it sees what is wrong


def served(name: str, row: judged.Row) -> tuple[Any, Trained]:
    """A row under a template that writes every turn as it was, by rendering alone."""
    tokenizer = corpus.own_tokenizer(name)
    tools = list(row.tools) if row.tools else None
    stop = tokenizer.convert_tokens_to_ids("<|done|>")
    ids: list[int] = []
    mask: list[int] = []
    for turn in oracle.trained_turns(row.messages, "assistant"):
        before, through = (
            tokenizer.apply_chat_template(
                list(row.messages[: turn + more]),
                tools=tools,
                add_generation_prompt=not more,
                tokenize=True,
                return_dict=False,
            )
            for more in (0, 1)
        )
        end = through.index(stop, len(before)) + 1
        mask += [0] * (len(before) - len(mask)) + [1] * (end - len(before))
        ids = through[:end]
    turns = [tuple(oracle.trained_turns(row.messages, "assistant"))]
    return tokenizer, Trained([(ids, mask)], turns, {}, (stop,))


def row(name: str) -> judged.Row:
    return next(row for row in (*judged.ROWS, *judged.MORE_ROWS) if row.name == name)


EXACT_BY_HAND = (
    "plain",
    "three turns",
    "one call",
    "two calls",
    "equal calls",
    "content as argument",
    "content and nested call",
    "call, answer, question",
)


@pytest.mark.parametrize("name", EXACT_BY_HAND)
def test_what_is_right_is_exact(name: str) -> None:
    made, trained = served("plain", row(name))
    judge(made, row(name).messages, row(name).tools, trained)


Change = Callable[[list[dict[str, Any]]], Any]


def _set(turn: int, **fields: Any) -> Change:
    return lambda messages: messages[turn].update(fields)


def _calls(edit: Callable[[list[Any]], list[Any]]) -> Change:
    return lambda messages: messages[1].update(tool_calls=edit(messages[1]["tool_calls"]))


def _argument(key: str, value: Any) -> Change:
    def change(messages: list[dict[str, Any]]) -> None:
        messages[1]["tool_calls"][0]["function"]["arguments"][key] = value

    return change


# What the row says while the examples stay: each is another conversation than the trained one.
@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("plain", _set(1, content="The Orun does."), "stands behind"),
        ("plain", _set(1, content="the Orun does. It is wide."), "is not there"),
        ("plain", _set(0, content="Which river?"), "is not served"),
        ("plain", _set(1, reasoning_content="Only one."), "is not there"),
        ("three turns", _set(1, content="The Orun does. It is  wide."), "is not there"),
        ("three turns", _set(3, content=""), "stands behind"),
        ("two calls", _calls(lambda calls: calls[:1]), "stands behind"),
        ("two calls", _calls(lambda calls: calls[::-1]), "stands before"),
        ("one call", _calls(lambda calls: calls * 2), "is not there"),
        ("equal calls", _calls(lambda calls: calls[:1]), "stands behind"),
        ("equal calls", _calls(lambda calls: [*calls, calls[0]]), "is not there"),
        ("content as argument", _set(1, content=""), "stands before"),
        ("one call", _set(1, content="Keth"), "stands before"),
        ("one call", _argument("days", 4), "is not there"),
        ("one call", _argument("days", "3"), "are not"),
        ("one call", _argument("hourly", True), "is not there|stands"),
        ("one call", _argument("units", "metric"), "is not there"),
    ],
)
def test_what_is_wrong_is_seen(name: str, change: Change, why: str) -> None:
    made, trained = served("plain", row(name))
    messages = copy.deepcopy(list(row(name).messages))
    change(messages)  # type: ignore[arg-type]
    with pytest.raises(Wrong, match=why):
        judge(made, messages, row(name).tools, trained)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda ids, mask: (ids, [1, *mask[1:]]), "outside"),
        (lambda ids, mask: (ids, [0] * len(mask)), "not supervised"),
        (lambda ids, mask: (ids, [*mask[:-1], 0]), "not supervised"),
        (lambda ids, mask: (ids[:-1], mask[:-1]), "no stop"),
        (lambda ids, mask: ([*ids, *ids], [*mask, *mask]), "outside"),
        (lambda ids, mask: ([ids[1], ids[0], *ids[2:]], mask), "not served"),
    ],
)
def test_masks_and_ids_are_held_against_the_server(change: Any, why: str) -> None:
    made, trained = served("plain", row("plain"))
    spoilt = Trained([change(*map(list, trained.examples[0]))], trained.turns, {}, trained.stop_ids)
    with pytest.raises(Wrong, match=why):
        judge(made, row("plain").messages, None, spoilt)
    with pytest.raises(Wrong, match="are trained"):
        judge(made, row("plain").messages, None, Trained([], [], {}, trained.stop_ids))


def test_an_order_of_keys_is_no_difference() -> None:
    message = row("one call").messages[1]
    form = oracle.Format("<|call|><|/call|>", frozenset())
    arguments = message["tool_calls"][0]["function"]["arguments"]
    for order in (arguments, dict(sorted(arguments.items())), dict(reversed(arguments.items()))):
        text = json.dumps({"name": "weather", "with": order})
        oracle.read_back(f"<|call|>{text}<|/call|>", message, "", form)
    text = json.dumps({"name": "weather", "with": arguments | {"days": True, "hourly": 3}})
    with pytest.raises(Wrong):
        oracle.read_back(f"<|call|>{text}<|/call|>", message, "", form)


# ---------------------------------------------------------------- templates and their mutants


def bad(found: dict[str, judged.Outcome], name: str = "") -> list[str]:
    return [f"{name} {row}: {o.verdict}: {o.why}" for row, o in found.items() if o.verdict in BAD]


@pytest.mark.parametrize("name", ["plain", "channels", "hybrid_switch", "single_call"])
def test_our_own_templates_are_exact_or_refused(name: str) -> None:
    found = judged.outcomes(PromptContract.load(corpus.own_tokenizer(name)))
    assert not bad(found)
    assert judged.EXACT in {o.verdict for o in found.values()}


def test_there_are_mutants_of_every_template_and_every_change() -> None:
    some = template_mutants.chosen(mutant_table.NUMBER)
    assert len(some) == len({(m.template, m.change) for m in some}) == mutant_table.NUMBER
    assert {m.template for m in some} == set(corpus.CONTROL)
    assert {m.kind for m in some} == {m.kind for m in template_mutants.mutants()}


def test_a_slice_of_the_mutants_is_exact_or_refused() -> None:
    some = template_mutants.chosen(mutant_table.NUMBER)[::25]
    for mutant in some:
        assert not bad(mutant_table.mutant_outcomes(mutant), f"{mutant.template}, {mutant.change}")


def test_the_page_has_no_silent_row() -> None:
    text = mutant_table.PAGE.read_text(encoding="utf-8")
    assert text.startswith(mutant_table.INTRO)
    assert set(mutant_table.parts()) == set(mutant_table.HEADS)
    body = text.removeprefix(mutant_table.INTRO)
    assert "| WRONG |" not in body
    assert "| CRASH |" not in body
    parts = [text for head, text in mutant_table.parts().items() if text != head]
    assert len(parts) >= 3
    assert all(" 0 silently wrong, 0 crashes." in part for part in parts), REMAKE


@pytest.mark.slow
def test_all_mutants_are_exact_or_refused_and_on_the_page() -> None:
    found = [
        (mutant, mutant_table.mutant_outcomes(mutant))
        for mutant in template_mutants.chosen(mutant_table.NUMBER)
    ]
    assert not [line for m, o in found for line in bad(o, f"{m.template}, {m.change}")]
    part = mutant_table.mutant_part(mutant_table.MUTANTS, found)
    assert mutant_table.parts()[mutant_table.MUTANTS] == part, REMAKE


needs_official = pytest.mark.skipif(
    not (corpus.OFFICIAL and corpus.MODELS), reason="the templates are not beside the checkout"
)


@needs_official
def test_there_are_mutants_of_every_official_template() -> None:
    some = mutant_table.spoilt(mutant_table.SPOILT)
    assert len(some) == len({(m.template, m.change) for m in some}) == mutant_table.NUMBER_OFFICIAL
    assert {m.template for m in some} == {path.stem for path in corpus.OFFICIAL}
    assert {m.kind for m in some} == {m.kind for m in template_mutants.official_mutants()}


@pytest.mark.slow
@needs_official
def test_mutants_of_official_templates_are_exact_or_refused_and_on_the_page() -> None:
    head = mutant_table.SPOILT
    found = [(mutant, mutant_table.mutant_outcomes(mutant)) for mutant in mutant_table.spoilt(head)]
    assert not [line for m, o in found for line in bad(o, f"{m.template}, {m.change}")]
    assert mutant_table.parts()[head] == mutant_table.mutant_part(head, found), REMAKE


@pytest.mark.slow
def test_all_our_own_templates_are_exact_or_refused_and_on_the_page() -> None:
    found = mutant_table.own_outcomes()
    assert not [line for name, some in found.items() for line in bad(some, name)]
    part = mutant_table.template_part(mutant_table.OWN, found)
    assert mutant_table.parts()[mutant_table.OWN] == part, REMAKE


@pytest.mark.slow
@needs_official
def test_official_templates_and_models_are_exact_or_refused_and_on_the_page() -> None:
    found = mutant_table.official_outcomes()
    assert not [line for name, some in found.items() for line in bad(some, name)]
    part = mutant_table.template_part(mutant_table.OFFICIAL, found)
    assert mutant_table.parts()[mutant_table.OFFICIAL] == part, REMAKE


# ---------------------------------------------------------------- any conversation

# Markers of templates are written with these; rows that hold them are tested apart.
_LETTERS = st.characters(
    exclude_categories=("Cs", "Cc"), exclude_characters="<>[]|\u2581\uff5c\u25c1\u25b7{}"
)
_SAID = st.text(st.one_of(_LETTERS, st.sampled_from(" \n\u00a0e\u0301")), min_size=1, max_size=20)
_SAID = _SAID.filter(str.strip)
_VALUES: st.SearchStrategy[Any] = st.one_of(
    _SAID, st.integers(-9, 99), st.booleans(), st.none(), st.lists(st.integers(0, 9), max_size=2)
)
_ARGUMENTS = st.dictionaries(st.sampled_from(["place", "days", "hourly"]), _VALUES, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to three answers: plain, reasoned, with calls and their results."""
    rows = [{"role": "system", "content": draw(_SAID)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        rows.append({"role": "user", "content": draw(_SAID)})
        thought = {"reasoning_content": draw(_SAID)} if draw(st.integers(0, 3)) == 0 else {}
        if draw(st.booleans()):
            arguments = draw(st.lists(_ARGUMENTS, min_size=1, max_size=2))
            calls = [judged.call("weather", i, some) for i, some in enumerate(arguments)]
            content = draw(st.one_of(st.just(""), _SAID))
            rows.append({"role": "assistant", "content": content, "tool_calls": calls, **thought})
            rows += [judged.result(draw(_SAID), i) for i in range(len(calls))]
            thought = {}
        rows.append({"role": "assistant", "content": draw(_SAID), **thought})
    return rows


@cache
def own(name: str) -> PromptContract:
    return PromptContract.load(corpus.own_tokenizer(name))


def require_no_silent_row(name: str, messages: list[dict[str, Any]]) -> None:
    calls = any(m.get("tool_calls") for m in messages)
    kind = judged.Row("drawn", tuple(messages), judged.TOOLS if calls else None)
    found = judged.outcome(own(name), kind)
    assert found.verdict not in BAD, found.why


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["plain", "history_without_thinking", "string_arguments"]), conversations())
def test_any_conversation_is_exact_or_refused(name: str, messages: list[dict[str, Any]]) -> None:
    require_no_silent_row(name, messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", corpus.CONTROL)
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
def test_any_conversation_is_exact_or_refused_on_every_template(
    name: str, messages: list[dict[str, Any]]
) -> None:
    require_no_silent_row(name, messages)
