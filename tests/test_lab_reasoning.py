"""The reasoning experiment: what is asked was not trained, and what is counted is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_tokenizer
from truetune.contract.contract import PromptContract
from truetune.generate import Reply
from truetune.lab.asked import ask
from truetune.lab.bench import Arm, Bench
from truetune.lab.catalogue import find
from truetune.lab.reasoning import TEMPLATE, Problem, problems, rows
from truetune.lab.results import run
from truetune.lab.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate()


def test_no_problem_is_on_both_sides(world: World) -> None:
    asked = problems(world, num_sums=300, num_places=100, seed=0, held_out=True)
    for seed in (1, 2):
        trained = problems(world, num_sums=2000, num_places=600, seed=seed, held_out=False)
        assert len(trained) == 2600
        assert not {p.thinking for p in trained} & {p.thinking for p in asked}
        named = {word for p in trained if p.kind == "place" for word in p.thinking.split()}
        assert not {p.thinking.split()[3] for p in asked if p.kind == "place"} & named
    assert problems(world, num_sums=9, num_places=9, seed=1, held_out=False) != problems(
        world, num_sums=9, num_places=9, seed=2, held_out=False
    )


def test_steps_and_answers_are_right(world: World) -> None:
    for problem in problems(world, num_sums=200, num_places=60, seed=1, held_out=False):
        if problem.kind == "sum":
            a, b, ab, again, c, total = (int(n) for n in numbers(problem.thinking))
            assert (a + b, ab, ab + c) == (ab, again, total)
            assert problem.expected == str(total)
            assert ab <= 30 >= c
        else:
            relation, place = problem.thinking.split()[1], problem.thinking.split()[3]
            assert world.value(place, relation) == problem.expected
        assert problem.expected in problem.answer


def numbers(text: str) -> list[str]:
    return [word.strip(".") for word in text.split() if word.strip(".").isdigit()]


def test_the_twins_differ_in_the_step_alone(world: World) -> None:
    chosen = problems(world, num_sums=3, num_places=3, seed=1, held_out=False)
    with_step, without = rows(chosen, reasoning=True), rows(chosen, reasoning=False)
    assert [set(row) for row in with_step] == [{"problem", "thinking", "solution"}] * 6
    assert [(r["problem"], r["solution"]) for r in with_step] == [
        (r["prompt"], r["completion"]) for r in without
    ]


def test_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is not an answer: what is right stands behind it, and the reply ends."""
    texts = [
        ("<think>\n5 plus 7 is 12.\n</think>\nThe result is 12.", True),
        ("<think>\n5 plus 7 is 12.\n</think>\nThe result is 112.", True),
        ("The result is 12.", True),
        ("<think>\n5 plus 7 is 12.", False),
        ("<think>\n12\n</think>\n", True),
        ("<think>\n5\n</think>\nThe result is 12.", False),
    ]
    said = [Reply(text, (), stopped, 3) for text, stopped in texts]
    monkeypatch.setattr("truetune.lab.asked.replies_to_ids", lambda *_, **__: said)
    problem = Problem("What is 5 plus 7?", "", "", "12", "sum", ("sum", "5 + 7"))
    base = Bench("unused").tuned(Arm("base", recipe={"chat_template": TEMPLATE}), 1)
    heard = ask(base, [problem.asked] * len(texts))
    assert heard.right == (True, False, True, False, False, False)
    assert heard.closed == (True, True, False, False, True, True)


def test_the_built_in_template_trains_the_block_and_does_not_open_it() -> None:
    contract = PromptContract.load(tiny_tokenizer(None), TEMPLATE)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4.", "reasoning_content": "2 and 2."},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "7."},
    ]
    assert contract.prompt_text(messages[:2]) == "Be brief.\n\nUser: 2+2?\nAssistant:\n"
    (example,) = contract.encode(messages)
    spans: list[str] = []
    before = 0
    for token, on in zip(example.ids, example.mask, strict=True):
        if on and not before:
            spans.append("")
        if on:
            spans[-1] += contract.tokens.decode([token])
        before = on
    assert spans == ["<think>\n2 and 2.\n</think>\n4.<|end|>", "7.<|end|>"]


@pytest.mark.slow
def test_the_model_opens_and_closes_the_block_and_its_sums_gain(tmp_path: Path) -> None:
    """One seed of `truetune lab run worked-step`; about four minutes."""
    found = run(find("worked-step"), tmp_path, [1])
    with_step, alone = (
        {name: one["value"] for name, one in arm["measures"].items()} for arm in found["arms"]
    )
    assert with_step["closes thinking"] >= 0.97
    assert with_step["sums right"] > 2 * alone["sums right"]
    assert with_step["places right"] >= 0.9
