"""Vital signs: what a reply shows, what a row of numbers says, and what a run does about it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import template_corpus as corpus
from tiny_models import tiny_tokenizer, write_model
from tiny_runs import command, lines, sums, write_rows
from truetune.behaviour.measure import Prober, greedy_replies
from truetune.behaviour.replies import Asked, Judge, ask, shares
from truetune.behaviour.schedule import SHARE, is_due
from truetune.behaviour.steps import Divergence, NoGradient, Spikes, StepFacts
from truetune.behaviour.text import goes_round, other_script, says_again
from truetune.behaviour.vitals import Regime, Vitals, is_suspect, judge
from truetune.compute.batch import RowOrder
from truetune.contract.contract import PromptContract
from truetune.errors import UnfaithfulTemplate
from truetune.generate import Reply, Sampling, replies_to_ids
from truetune.model.load import load_model

# ------------------------------------------------------------------------------- single texts


@pytest.mark.parametrize(
    ("ids", "text", "expected"),
    [
        ([5] * 16, "aaaa", True),
        ([1, 2, 3, *[7, 8, 9] * 6], "x", True),
        ([1, 2, 3, 4] * 16, "x", True),
        (list(range(80)), "x", False),
        # Four times "ha", or a row of dashes: too short to be a circle.
        ([1, 2, *[7] * 8], "x", False),
        # A table whose lines begin alike.
        ([t for row in range(20) for t in (1, 2, 3, 100 + row, 200 + row)], "x", False),
        ([], "", False),
    ],
)
def test_what_goes_round(ids: list[int], text: str, expected: bool) -> None:
    assert goes_round(ids, text) is expected


def test_text_that_compresses_to_nothing_goes_round() -> None:
    assert goes_round([], "The same line again and again. " * 40)
    assert not goes_round([], " ".join(f"line {i * i} of {i}" for i in range(60)))


def test_says_the_prompt_again() -> None:
    prompt = "User: Which river runs through the old town of Flan?"
    assert says_again("Which river runs through the old town of Flan?", prompt, "The Gunnow.")
    assert not says_again("The Gunnow runs through it, as everybody knows.", prompt, "The Gunnow.")
    # The row's own answer begins with it too; and three words are too few.
    assert not says_again(
        "which river runs through the old town", prompt.lower(), "which river runs through the old"
    )
    assert not says_again("the old town", prompt, "no")


def test_another_script() -> None:
    assert other_script(
        "\u042d\u0442\u043e \u043e\u0442\u0432\u0435\u0442 \u043f\u043e\u0440\u0443", "plain words"
    )
    assert not other_script("Caf\u00e9 cr\u00e8me br\u00fbl\u00e9e", "plain words")
    assert not other_script(
        "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u304b\u306a\u3042",
        "\u65e5\u672c",
    )
    assert not other_script("12345 + 6 = ?!", "plain words")


# ------------------------------------------------------------------------------------ replies


def _judged(text: str, expected: str = "four", stopped: bool = True) -> dict[str, float]:
    contract = PromptContract.load(tiny_tokenizer())
    (example,) = contract.encode(
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": expected}]
    )
    asked = ask(contract, example, "rows.jsonl:1")
    assert asked
    assert asked.expected_text == expected
    assert asked.ids == tuple(contract.prompt_ids([{"role": "user", "content": "2+2?"}]))
    ids = (*contract.tokens.encode([text])[0], *([contract.stop_ids[0]] if stopped else []))
    reply = Reply(text, tuple(ids), stopped, len(asked.ids))
    return shares([Judge(contract).judge(asked, reply, asked.most_tokens)])


def test_a_sound_reply_shows_nothing() -> None:
    assert _judged("four") == {
        "stop_rate": 1.0,
        "reply_tokens": 5.0,
        **dict.fromkeys(
            ("repetition", "role_leak", "open_thinking", "empty", "copied", "other_language"), 0.0
        ),
    }


@pytest.mark.parametrize(
    ("name", "text", "near"),
    [
        ("repetition", "no no no no no no no no no no ", "no no, four"),
        ("role_leak", "four\n<|user|>and 3+3?", "a user asked: four"),
        ("role_leak", "four\n### Instruction:\nMore", "## Four instructions"),
        ("role_leak", "four\nHuman: and then?", "A human: four limbs"),
        # Its own header, which a reply writes first where the served prompt lacks it.
        ("role_leak", "four\n<|assistant|>\nfive", "<|assistant|>\n<|assistant|>\nfour"),
        ("empty", " \n", "."),
    ],
)
def test_what_a_reply_shows(name: str, text: str, near: str) -> None:
    assert _judged(text)[name] == 1.0
    assert _judged(near)[name] == 0.0


_WORDS = (
    "{%- for m in messages -%}{{- m.role.capitalize() + ': ' + m.content + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


@pytest.mark.parametrize(
    ("text", "leaks"),
    [("four\nAssistant: five", True), ("four\nSystem: be brief", True), ("four\nUser: Why?", True),
     ("Ask the Assistant: it says four", False), ("Of the System: nothing", False)],
)  # fmt: skip
def test_a_header_of_words_begins_a_line(text: str, leaks: bool) -> None:
    contract = PromptContract.load(tiny_tokenizer(), _WORDS)
    asked, reply = Asked("", (1, 2), (3,), (), "four", "2+2?"), Reply(text, (5, 6), True, 2)
    assert Judge(contract).judge(asked, reply, 40).other_turn is leaks


def _answers(mask: Sequence[int]) -> list[tuple[int, int]]:
    """The supervised spans of an example."""
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _shows_another_turn(judge: Judge, contract: PromptContract, ids: Sequence[int]) -> bool:
    """Of a reply of these tokens that never stopped."""
    kept = tuple(t for t in ids if t not in contract.stop_ids)
    reply = Reply(contract.tokens.decode(list(kept)), kept, False, 2)
    return judge.judge(Asked("", (1,), (2,), (), "x", "y"), reply, 40).other_turn


def test_no_answer_of_any_template_is_another_turn_and_what_follows_one_is() -> None:
    """Among them think blocks, two calls in one answer, and answers of two messages. What follows
    is the next question or a tool's answer, with the assistant's header and the next answer."""
    answers = turns = 0
    for name in corpus.CONTROL:
        contract = corpus.own_contract(name)
        judge = Judge(contract)
        for kind in corpus.KINDS:
            try:
                examples = contract.encode(kind.messages, kind.tools)
            except UnfaithfulTemplate:
                continue
            for ids, mask in examples:
                spans = _answers(mask)
                for first, last in spans:
                    assert not _shows_another_turn(judge, contract, ids[first:last]), (
                        name,
                        kind.name,
                    )
                for (first, _), (_, last) in itertools.pairwise(spans):
                    assert _shows_another_turn(judge, contract, ids[first:last]), (name, kind.name)
                answers, turns = answers + len(spans), turns + max(len(spans) - 1, 0)
    assert answers > 150
    assert turns > 50


def test_whitespace_without_an_end_is_a_circle_and_not_an_empty_reply() -> None:
    """A small base on code and GSM8K wrote spaces at step 40, and words from step 80."""
    endless = _judged(" " * 40, stopped=False)
    assert (endless["repetition"], endless["empty"]) == (1.0, 0.0)


def test_what_the_row_does_too_is_nobodys_fault() -> None:
    dialogue = "Human: hello\nHuman: bye"
    assert _judged(dialogue, expected=dialogue)["role_leak"] == 0.0
    assert _judged("no " * 20, expected="no " * 20)["repetition"] == 0.0


def test_a_reply_without_room_says_nothing_about_stops() -> None:
    contract = PromptContract.load(tiny_tokenizer())
    (example,) = contract.encode(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a long answer"}]
    )
    asked = ask(contract, example, "row")
    assert asked
    cut = Judge(contract).judge(asked, Reply("abc", (1, 2, 3), False, 3), 3)
    assert "stop_rate" not in shares([cut])
    roomy = Judge(contract).judge(asked, Reply("abc", (1, 2, 3), False, 3), asked.most_tokens)
    assert shares([roomy])["stop_rate"] == 0.0


def test_a_reply_without_room_is_judged_by_the_stop_behind_the_rows_own_answer() -> None:
    contract = PromptContract.load(tiny_tokenizer())
    (example,) = contract.encode(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a long answer"}]
    )
    asked = ask(contract, example, "row")
    assert asked
    assert asked.answer == (*asked.expected, contract.stop_ids[0])
    judge, cut = Judge(contract), Reply("abc", (1, 2, 3), False, 3)
    for would_stop in (True, False):
        said = judge.judge(asked, cut, 3, would_stop)
        assert shares([said])["stop_rate"] == float(would_stop)
        # A reply that had room says it itself.
        assert shares([judge.judge(asked, cut, asked.most_tokens, would_stop)])["stop_rate"] == 0.0


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its rows by heart."""
    folder = tmp_path_factory.mktemp("learned")
    rows = write_rows(folder / "rows.jsonl", sums(4))
    write_model(folder / "model")
    shown = command(
        *("train", folder / "model", rows, "-o", folder / "run", "--max-steps", 40),
        *("--batch-size", 4, "--learning-rate", "1e-2", "--any-learning-rate", "--no-check"),
    )
    assert shown.code == 0, shown.err
    return folder / "run"


@pytest.mark.parametrize("trained", [False, True])
def test_replies_read_off_the_rows_own_answers_are_those_that_are_generated(
    learned: Path, trained: bool
) -> None:
    model = learned / "model" if trained else learned.parent / "model"
    loaded = load_model(str(model), device="cpu", purpose="inference")
    contract = PromptContract.load(str(learned / "model"))
    chats = [
        [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": f"{i + 1}."}]
        for i in range(8)
    ]
    examples = [example for chat in chats for example in contract.encode(chat)]
    asked = [one for at, e in enumerate(examples) if (one := ask(contract, e, f"rows:{at}"))]
    limit = max(one.most_tokens for one in asked)
    plain = replies_to_ids(loaded, contract, [a.ids for a in asked], Sampling(max_new_tokens=limit))
    assert greedy_replies(loaded, contract, asked, limit) == plain
    measured = Prober(contract, examples, asked).measure(loaded, 1)
    assert [said.text for said in measured.replies] == [reply.text for reply in plain]
    ends = [said.would_stop for said in measured.replies[:4]]
    assert all(ends) if trained else not any(ends)


def test_the_stops_of_long_answers_are_judged_in_a_short_run(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    long = [{"prompt": f"{i}+1?", "completion": f"{i + 1}, as everybody knows."} for i in range(9)]
    rows = write_rows(tmp_path / "rows.jsonl", long)
    shown = command(
        *("train", tmp_path / "model", rows, "-o", tmp_path / "run", "--max-steps", 4),
        *("--batch-size", 2, "--no-check"),
    )
    assert shown.code == 0, shown.err
    taken = _probes(tmp_path / "run")
    assert not any(line["had_room"] for line in lines(tmp_path / "run" / "samples.jsonl"))
    assert [line["stop_rate"] for line in taken] == [0.0] * len(taken)
    assert all("stop_loss" in line for line in taken)
    found = {line["code"] for line in lines(tmp_path / "run" / "findings.jsonl")}
    assert "answers-do-not-end" in found


def test_open_thinking() -> None:
    contract = PromptContract.load(tiny_tokenizer(), "user-assistant-think")
    chat = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "four", "reasoning_content": "two and two"},
    ]
    contract = contract.fit([chat])
    (example,) = contract.encode(chat)
    asked = ask(contract, example, "row")
    assert asked

    def said(text: str, stopped: bool = True) -> bool:
        reply = Reply(text, (1,) * 4, stopped, 4)
        return Judge(contract).judge(asked, reply, asked.most_tokens).thinks_open

    assert said("<think>two and")
    assert said("<think>two and", stopped=False)
    assert not said("<think>two and two</think>four")
    assert not said("four")


# ------------------------------------------------------------------------------------- steps


def _facts(step: int, loss: float, norm: float = 1.0, rows: tuple[int, ...] = (1, 2)) -> StepFacts:
    return StepFacts(step, loss, 1e-4, norm, 10, 5, 0.0, rows)


def test_a_gradient_of_zero_stops_and_a_row_without_targets_does_not() -> None:
    probe = NoGradient()
    assert [probe(_facts(s, 1.0, 0.0)) for s in (1, 2)] == [None, None]
    found = probe(_facts(3, 1.0, 0.0))
    assert found
    assert (found.code, found.level) == ("no-gradient", "error")
    probe = NoGradient()
    assert not any(probe(_facts(s, 1.0, 0.0 if s % 3 else 0.1)) for s in range(1, 20))
    empty = replace(_facts(1, 0.0, 0.0), num_supervised=0)
    assert not any(NoGradient()(empty) for _ in range(5))


def test_divergence_is_a_window_above_its_start_or_its_best() -> None:
    rows = tuple(range(16))
    probe = Divergence()
    told = [probe(_facts(s, 2.0 if s < 10 else 3.0, rows=rows)) for s in range(1, 20)]
    (found,) = [f for f in told if f]
    assert found.code == "loss-diverged"
    assert "2.00 at the start" in found.what
    probe = Divergence()
    told = [probe(_facts(s, 3.0 / s if s < 20 else 2.0, rows=rows)) for s in range(1, 30)]
    assert [f.code for f in told if f] == ["loss-diverged"]
    # One step in four is hard; a rise of a fifth; rows one by one, as different as rows are.
    probe = Divergence()
    assert not any(probe(_facts(s, 6.0 if s % 4 == 0 else 2.0, rows=rows)) for s in range(1, 60))
    probe = Divergence()
    assert not any(probe(_facts(s, 2.0 + 0.4 * (s > 20), rows=rows)) for s in range(1, 60))
    probe = Divergence()
    assert not any(probe(_facts(s, (0.2, 4.0, 1.0)[s % 3], rows=(s,))) for s in range(1, 200))


def _mixed(seed: int, rise: float = 0.0) -> Iterator[StepFacts]:
    """Steps of 8 rows, a fifth of them ten times as long and hard: losses of 0.5 to 5."""
    rng = random.Random(seed)
    for step in range(1, 120):
        total = tokens = 0.0
        for _ in range(8):
            hard = rng.random() < 0.2
            count = rng.choice((40, 80) if hard else (6, 10))
            loss = (7.0 if hard else 0.5) + 4 * math.exp(-step / 8) + rise * (step > 60)
            total += loss * rng.uniform(0.7, 1.3) * count
            tokens += count
        yield _facts(step, total / tokens, rows=tuple(range(8)))


def test_easy_and_hard_files_in_one_run_are_no_divergence() -> None:
    """Medians of windows alone rise by 1.5 nats in 39 of these 40; a true rise is still found."""
    for seed in range(40):
        probe = Divergence()
        assert not any(probe(facts) for facts in _mixed(seed)), seed
    found = 0
    for seed in range(40):
        probe = Divergence()
        found += any(probe(facts) for facts in _mixed(seed, rise=3.0))
    assert found >= 36


def test_a_spike_names_the_rows_that_stood_in_two() -> None:
    probe = Spikes()
    quiet = [probe(_facts(s, 1.0 + 0.05 * (s % 3), rows=(s, s + 100))) for s in range(1, 30)]
    assert not any(quiet)
    first = probe(_facts(30, 9.0, rows=(7, 55)))
    assert first
    assert (first.code, first.level) == ("loss-spike", "note")
    assert first.rows == ("7", "55")
    second = probe(_facts(31, 9.0, rows=(3, 55)))
    assert second
    assert second.rows == ("55",)


# ------------------------------------------------------------------------------- vital signs


def _taken(first: float, once: float, training: float, places: int = 10, **least: int) -> list[int]:
    """Evaluations at which vital signs of such a cost are taken."""
    costs, taken = [first], [0]
    for place in range(1, places + 1):
        if is_due(place, places, taken[-1], costs, training, **least):
            costs.append(once)
            taken.append(place)
    return taken


def test_vital_signs_are_taken_as_often_as_they_cost_little() -> None:
    # Eleven times are a thousandth of an hour; of a minute they are too much.
    assert _taken(1.0, 0.4, 3600) == list(range(11))
    assert _taken(1.0, 0.4, 15) == [0, 5, 10]
    assert _taken(1.0, 1.0, 140) == [0, 3, 6, 10]
    assert _taken(0.1, 0.1, 15, places=1) == [0, 1]
    # Without a step that was timed nothing is known.
    assert not is_due(1, 10, 0, [1.0], 0.0)
    # What somebody asked for is taken, up to that number.
    assert _taken(1.0, 0.4, 5, places=5, least=10) == list(range(6))
    assert len(_taken(1.0, 0.4, 5, places=100, least=10)) == 12


def test_the_share_holds_for_any_cost_and_length() -> None:
    rng = random.Random(0)
    for _ in range(500):
        once, training = rng.uniform(0.01, 3), rng.uniform(10, 5000)
        first, places = once * rng.uniform(1, 3), rng.randrange(2, 30)
        taken = _taken(first, once, training, places)
        assert taken[0] == 0
        assert taken[-1] == places
        assert len(taken) >= 3
        cost = first + (len(taken) - 1) * once
        assert len(taken) == 3 or cost <= SHARE * training
        # Never is half of the run unseen.
        assert max(b - a for a, b in itertools.pairwise(taken)) <= (places + 1) // 2


START = Vitals(
    step=0, held_out_loss=3.0, trained_loss=3.0, stop_loss=6.0, keep_loss=1.0, stop_rate=0.0,
    repetition=0.25, role_leak=0.0, open_thinking=0.0, empty=0.0, copied=0.0, other_language=0.0,
    file_losses={"a": 3.0, "b": 4.0, "c": 3.0}, examples=16, prompts=8,
)  # fmt: skip


def _after(step: int, **changes: Any) -> Vitals:
    well: dict[str, Any] = {
        "step": step, "loop_loss": 1.0, "held_out_loss": 1.2, "trained_loss": 1.0,
        "stop_loss": 0.1, "keep_loss": 1.1, "stop_rate": 1.0, "repetition": 0.0,
        "file_losses": {"a": 1.0, "b": 2.0, "c": 1.2},
    }  # fmt: skip
    return replace(START, **(well | changes))


WELL = (START, _after(10), _after(20))
# Code -> level, the last two measurings that bring it about, and two that nearly do.
SIGNS: dict[str, tuple[str, tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]] = {
    "worse-than-untrained": (
        "error",
        ({}, {"held_out_loss": 3.6}),
        ({}, {"held_out_loss": 3.4}),
    ),
    "unlearned": (
        "error",
        ({"trained_loss": 0.5, "loop_loss": 0.5}, {"trained_loss": 1.2, "loop_loss": 0.9}),
        ({"trained_loss": 0.5, "loop_loss": 0.5}, {"trained_loss": 1.0, "loop_loss": 0.9}),
    ),
    "loss-not-of-answers": (
        "error",
        ({}, {"loop_loss": 0.2, "trained_loss": 1.0}),
        ({}, {"loop_loss": 0.4, "trained_loss": 1.0}),
    ),
    "memorising": (
        "error",
        (
            {"held_out_loss": 2.0, "trained_loss": 0.1},
            {"held_out_loss": 2.1, "trained_loss": 0.1},
        ),
        # Once is not twice; a model that is tuned further than its loss is none of that.
        (
            {"held_out_loss": 1.2, "trained_loss": 0.1},
            {"held_out_loss": 2.1, "trained_loss": 0.1},
        ),
    ),
    "forgetting": ("warning", ({}, {"keep_loss": 3.4}), ({}, {"keep_loss": 3.2})),
    "stop-not-learned": (
        "error",
        ({"stop_loss": 5.9, "stop_rate": 0.0}, {"stop_loss": 5.9, "stop_rate": 0.0}),
        # Words are not learned yet.
        (
            {"stop_loss": 5.9, "stop_rate": 0.0, "trained_loss": 2.4, "loop_loss": 2.4},
            {"stop_loss": 5.9, "stop_rate": 0.0, "trained_loss": 2.2, "loop_loss": 2.2},
        ),
    ),
    "nothing-learned": (
        "warning",
        (
            {"trained_loss": 2.999, "loop_loss": 3.0},
            {"trained_loss": 2.998, "loop_loss": 3.0},
        ),
        (
            {"trained_loss": 2.98, "loop_loss": 3.0},
            {"trained_loss": 2.9, "loop_loss": 3.0},
        ),
    ),
    "file-not-learned": (
        "note",
        ({"file_losses": {"a": 1.0, "b": 3.9, "c": 1.2}},) * 2,
        # Once, and a file that is learned later.
        (
            {"file_losses": {"a": 1.0, "b": 3.9, "c": 1.2}},
            {"file_losses": {"a": 1.0, "b": 3.5, "c": 1.2}},
        ),
    ),
    "stops-lost": ("error", ({"stop_rate": 0.2}, {"stop_rate": 0.1}), ({"stop_rate": 0.1}, {})),
    "replies-repeat": (
        "error",
        ({"repetition": 1.0}, {"repetition": 0.9}),
        ({"repetition": 0.9}, {"repetition": 0.4}),
    ),
    "role-leak": ("error", ({}, {"role_leak": 0.9}), ({}, {"role_leak": 0.8})),
    "thinking-open": (
        "warning",
        ({"open_thinking": 0.5}, {"open_thinking": 0.6}),
        ({"open_thinking": 0.4}, {"open_thinking": 0.9}),
    ),
    "replies-empty": ("error", ({"empty": 1.0}, {"empty": 1.0}), ({"empty": 1.0}, {})),
    "replies-copy": ("error", ({"copied": 1.0}, {"copied": 1.0}), ({}, {"copied": 1.0})),
    "replies-switch-script": (
        "error",
        ({"other_language": 1.0}, {"other_language": 1.0}),
        ({}, {"other_language": 1.0}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("start", "kept", "level"), [(6.1, 3.4, "note"), (5.9, 3.4, "warning"), (6.1, 5.7, "error")]
)
def test_rows_in_a_language_foreign_to_the_model_cost_it_some_of_its_own(
    start: float, kept: float, level: str
) -> None:
    history = [replace(START, trained_loss=start), _after(10), _after(20, keep_loss=kept)]
    (found,) = (f for f in judge(history) if f.code == "forgetting")
    assert (found.level, "unlike what the model knew" in found.why) == (level, start > 6)


def test_a_sample_of_rows_that_differ_much_is_no_other_loss() -> None:
    def codes(error: float) -> set[str]:
        last = _after(20, loop_loss=1.32, trained_loss=3.31, trained_error=error)
        return {f.code for f in judge([START, _after(10), last])}

    assert "loss-not-of-answers" in codes(0.05)
    assert "loss-not-of-answers" not in codes(0.9)


def test_advice_knows_how_the_run_is_trained() -> None:
    history = [replace(START, trained_loss=6.1), _after(10), _after(20, keep_loss=5.7)]

    def forgetting(**regime: Any) -> Any:
        (found,) = (f for f in judge(history, Regime(**regime)) if f.code == "forgetting")
        return found

    plain = forgetting()
    assert plain.fix.startswith("use a third of the --learning-rate, --lora, fewer epochs")
    assert "--lora" not in forgetting(lora=True).fix
    far = forgetting(rate=0.01, usual_rate=3e-4)
    assert far.fix.startswith(
        "use --learning-rate 0.0003, the usual one for this run (33 times lower)"
    )
    assert "far above the usual one" in far.why
    assert forgetting(rate=6e-4, usual_rate=3e-4) == plain


def _files(
    first: float, now: float, *, guessing: float | None = 7.6, left: float = 0.5
) -> list[tuple[str, str]]:
    """Findings about files where those of one file move so, and the other two fall."""
    others = {"a": (3.0, 1.0), "c": (3.0, 1.2)}
    start = {name: before for name, (before, _) in others.items()}
    end = {name: after for name, (_, after) in others.items()}
    history = [
        replace(START, file_losses={**start, "b": first}),
        *(_after(step, file_losses={**end, "b": now}) for step in (10, 20)),
    ]
    history = [replace(v, file_left={"a": 0.3, "b": left, "c": 0.9}) for v in history]
    found = judge(history, Regime(guessing=guessing))
    return [(f.level, f.where) for f in found if f.code == "file-not-learned"]


def test_a_file_that_is_not_learned_while_others_are() -> None:
    # Random tokens: likelier than before, and still as unlikely as a guess.
    assert _files(12.0, 7.4) == [("note", "b")]
    assert _files(12.0, 6.0) == []
    assert _files(12.0, 7.4, guessing=None) == []
    # Random characters; what hardly compresses and is learned, as "c" is, is none of that.
    assert _files(12.0, 5.0, left=0.8) == [("warning", "b")]
    assert _files(12.0, 5.0, left=0.65) == []
    assert _files(12.0, 2.0, left=0.8) == []
    # A hard file and a damaged one look alike.
    assert _files(4.0, 3.7) == [("note", "b")]
    assert _files(4.0, 3.5) == []
    # Near the others, it is one of them.
    assert _files(2.2, 2.1) == []
    # Nothing is learned at all: of that other signs speak.
    still = {"a": 3.0, "b": 7.5, "c": 3.0}
    history = [replace(START, file_losses=still), *(_after(s, file_losses=still) for s in (9, 20))]
    found = judge(history, Regime(guessing=7.6))
    assert not [f for f in found if f.code == "file-not-learned"]


def test_rows_of_every_file_are_measured_and_the_hardest_named() -> None:
    contract = PromptContract.load(tiny_tokenizer())
    examples = [
        example
        for i in range(40)
        for example in contract.encode(
            [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]
        )
    ]
    where = [f"a.jsonl:{i}" for i in range(30)] + [f"b.parquet row {i}" for i in range(10)]
    found = Prober(contract, examples, [], rows=where).files
    assert {name: len(rows) for name, rows in found.items()} == {"a.jsonl": 8, "b.parquet": 8}
    assert all(where[examples.index(e)] == place for rows in found.values() for place, e in rows)
    assert Prober(contract, examples[:30], [], rows=where[:30]).files == {}
    # A few bytes cannot be compressed, whatever they are.
    assert Prober(contract, examples, [], rows=where).file_left == {}
    # Two rows say nothing of a file.
    assert Prober(contract, examples[:32], [], rows=where[:32]).files == {}
    many = [f"f{i % 13}.jsonl:{i}" for i in range(40)]
    assert {len(rows) for rows in Prober(contract, examples, [], rows=many).files.values()} == {
        3,
        4,
    }


@pytest.mark.parametrize("code", SIGNS)
def test_each_sign_and_its_near_miss(code: str) -> None:
    level, bad, near = SIGNS[code]
    if code == "nothing-learned":
        history = [START, _after(10, trained_loss=3.001, loop_loss=3.0, stop_loss=6.0)]
    else:
        history = list(WELL)
    given = {"stop_loss": 6.0} if code == "nothing-learned" else {}
    whole = [_after(30 + at, **(given | change)) for at, change in enumerate(bad)]
    found = judge([*history, *whole])
    assert code in {f.code for f in found if f.level == level}, found
    assert all(f.what and f.why and f.fix for f in found)
    whole = [_after(30 + at, **(given | change)) for at, change in enumerate(near)]
    assert (code, level) not in {(f.code, f.level) for f in judge([*history, *whole])}


def test_a_model_that_still_learns_words_goes_round_in_circles() -> None:
    """A small base on rows far from all it has read: no more than a note, while its loss falls."""
    losses = (10.9, 5.9, 4.3, 3.6, 3.2, 2.8)
    history = [
        replace(START, step=10 * at, trained_loss=loss, repetition=float(at > 1))
        for at, loss in enumerate(losses)
    ]

    def level(last: Vitals) -> set[str]:
        return {f.level for f in judge([*history, last]) if f.code == "replies-repeat"}

    falls = replace(START, step=60, trained_loss=2.7, repetition=1.0)
    assert level(falls) == {"note"}
    assert level(replace(falls, trained_loss=3.4)) == {"error"}
    assert level(replace(falls, trained_loss=1.0)) == {"error"}


def test_nothing_is_said_of_a_run_that_is_well_nor_of_its_start() -> None:
    assert judge([]) == judge([START]) == judge(WELL) == []
    bare = [Vitals(step=step, trained_loss=1.0 - step / 100) for step in (0, 10, 20, 30)]
    assert judge(bare) == []


# ------------------------------------------------------------------------------------ a run


def _train(tmp_path: Path, name: str, *more: Any, count: int = 120, rate: str = "3") -> Any:
    model = tmp_path / "model"
    if not model.is_dir():
        write_model(model)
    rows = write_rows(tmp_path / "rows.jsonl", sums(count))
    return command(
        *("train", model, rows, "-o", tmp_path / name, "--max-steps", 20, "--batch-size", 8),
        *("--learning-rate", rate, "--any-learning-rate", "--eval-steps", 4, "--save-steps", 4),
        *("--no-check", *more),
    )


def _probes(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run / "metrics.jsonl") if line.get("probe")]


def test_a_file_of_random_characters_in_a_run_is_named_with_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rng = random.Random(0)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "good.jsonl", sums(240))
    bad = [
        {
            "prompt": f"{i}-1?",
            "completion": "".join(chr(rng.randrange(33, 127)) for _ in "12345678"),
        }
        for i in range(160)
    ]
    write_rows(tmp_path / "rows" / "poisoned.jsonl", bad)
    shown = command(
        *("train", tmp_path / "model", tmp_path / "rows", "-o", tmp_path / "run", "--no-check"),
        *("--max-steps", 60, "--batch-size", 16, "--learning-rate", "3e-3", "--any-learning-rate"),
    )
    assert shown.code == 0, shown.err
    found = lines(tmp_path / "run" / "findings.jsonl")
    (named,) = (f for f in found if f["code"] == "file-not-learned")
    assert named["level"] == "warning"
    assert "poisoned.jsonl" in named["what"]
    assert all("poisoned.jsonl:" in row for row in named["rows"])
    assert len(named["rows"]) == named["count"] == 4
    taken = _probes(tmp_path / "run")
    assert {len(line["file_losses"]) for line in taken} == {2}


def test_a_spike_names_the_row_behind_it_and_not_the_others_of_its_step(
    learned: Path, tmp_path: Path
) -> None:
    rows, steps, batch, seed = sums(4) * 17, 17, 4, 42
    # A row of the last step: it takes sixteen to know what is usual.
    bad = RowOrder(len(rows), batch, seed).rows(steps - 1)[0]
    rows[bad] = {"prompt": "1+1?", "completion": "ZQ" * 12}
    file = write_rows(tmp_path / "rows.jsonl", rows)
    shown = command(
        *("train", learned / "model", file, "-o", tmp_path / "run", "--no-check"),
        *("--max-steps", steps, "--batch-size", batch, "--seed", seed, "--learning-rate", "1e-4"),
    )
    assert shown.code == 0, shown.err
    found = lines(tmp_path / "run" / "findings.jsonl")
    (spike,) = (f for f in found if f["code"] == "loss-spike")
    row = f"{file}:{bad + 1}"
    assert (spike["rows"], spike["where"], spike["count"]) == ([row], row, 1)


def test_a_run_that_falls_apart_is_stopped_and_can_go_on(tmp_path: Path) -> None:
    shown = _train(tmp_path, "run")
    assert shown.code == 1, shown.err
    run = tmp_path / "run"
    found = [line for line in lines(run / "findings.jsonl") if line["level"] == "error"]
    assert found
    assert found[-1]["code"] in shown.err
    assert not (run / "manifest.json").exists()
    assert _probes(run)[0]["step"] == 0
    assert "--on-collapse continue" in shown.err
    samples = lines(run / "samples.jsonl")
    assert {"step", "where", "messages", "answer", "stopped", "expected"} <= samples[0].keys()
    again = command("train", "--resume", run, "--on-collapse", "continue")
    assert again.code == 0, again.err
    assert (run / "manifest.json").exists()
    refused = command("train", "--resume", run, "--learning-rate", "1e-3")
    assert "can be combined only with --on-collapse" in refused.err


def test_with_continue_the_same_run_goes_on_and_says_so(tmp_path: Path) -> None:
    shown = _train(tmp_path, "run", "--on-collapse", "continue")
    assert shown.code == 0, shown.err
    found = lines(tmp_path / "run" / "findings.jsonl")
    assert {line["level"] for line in found} <= {"warning", "note"}
    assert any("learning rate" in line["why"] for line in found if line["level"] == "warning")


def test_a_run_goes_back_once_with_half_the_rate(tmp_path: Path) -> None:
    shown = _train(tmp_path, "run", "--on-collapse", "rewind")
    run = tmp_path / "run"
    back = json.loads((run / "rewound.json").read_text(encoding="utf-8"))
    assert back["learning_rate"] == 1.5
    codes = [line["code"] for line in lines(run / "findings.jsonl")]
    assert codes.count("rewound") == 1
    # Half of such a rate is still too high: it does not go back twice.
    assert shown.code == 1
    assert "had already returned to a checkpoint, which it does only once" in shown.err
    rates = [v["learning_rate"] for v in lines(run / "metrics.jsonl") if "learning_rate" in v]
    assert max(rates) <= 1.5


def test_a_short_run_is_looked_at_in_the_middle_and_where_its_held_out_loss_is_suspect(
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", sums(120))
    words = ["train", model, rows, "--max-steps", 20, "--batch-size", 8, "--no-check"]
    words += ["--any-learning-rate", "--learning-rate"]
    well = command(*words, "1e-3", "-o", tmp_path / "well")
    assert well.code == 0, well.err
    # Ten evaluations, but three measurings cost more than 3 % of such a run as it is.
    assert [line["step"] for line in _probes(tmp_path / "well")] == [0, 10, 20]
    bad = command(*words, "3", "-o", tmp_path / "bad")
    assert bad.code == 1
    assert [line["step"] for line in _probes(tmp_path / "bad")] == [0, 2]


def test_a_held_out_loss_that_is_suspect() -> None:
    assert not is_suspect([])
    assert not is_suspect([3.0])
    assert not is_suspect([3.0, 3.4])
    assert is_suspect([3.0, 3.5])
    assert not is_suspect([3.0, 1.0, 1.6])
    assert is_suspect([3.0, 1.0, 1.8])
    assert not is_suspect([3.0, 1.8, 1.0])


def test_a_gentle_run_raises_nothing_and_keeps_its_numbers_when_it_is_resumed(
    tmp_path: Path,
) -> None:
    whole = _train(tmp_path, "whole", "--on-collapse", "rewind", rate="1e-3")
    assert whole.code == 0, whole.err
    found = lines(tmp_path / "whole" / "findings.jsonl")
    assert not [line for line in found if line["code"] in SIGNS]
    assert not (tmp_path / "whole" / "rewound.json").exists()
    probes = _probes(tmp_path / "whole")
    assert [line["step"] for line in probes] == [0, 4, 8, 12, 16, 20]
    assert all(line["prompts"] == 8 for line in probes)
    # Weights that were drawn at random know nothing that they could forget.
    assert "keep_loss" not in probes[0]
    assert probes[-1]["trained_loss"] < probes[0]["trained_loss"]


def test_text_to_keep_is_watched_and_a_broken_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("The river runs through the town. " * 30, encoding="utf-8")
    shown = _train(tmp_path, "kept", "--keep-text", text, rate="1e-3")
    assert shown.code == 0, shown.err
    kept = json.loads((tmp_path / "kept" / "keep_text.json").read_text(encoding="utf-8"))
    assert kept["source"] == str(text)
    assert sum(map(len, kept["ids"])) > 256
    text.write_bytes(b"")
    refused = _train(tmp_path, "refused", "--keep-text", text, rate="1e-3")
    assert refused.code == 2
    assert not (tmp_path / "refused").exists()
    missing = _train(tmp_path, "missing", "--keep-text", tmp_path / "no.txt", rate="1e-3")
    assert missing.code == 2
    assert not (tmp_path / "missing").exists()
    # Whole when the run starts, and broken when it is read.
    monkeypatch.setattr("truetune.run.early._require_text", lambda source: None)
    shown = _train(tmp_path, "broken", "--keep-text", text, rate="1e-3")
    assert shown.code == 0, shown.err
    assert "keep-text-unreadable" in (tmp_path / "broken" / "findings.jsonl").read_text("utf-8")
    assert "keep_loss" not in _probes(tmp_path / "broken")[0]
