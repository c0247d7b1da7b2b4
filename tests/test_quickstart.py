"""The quickstart: the embedded base before and after the hand-written instructions."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import truetune
from tiny_runs import write_rows
from truetune.cli import verbs as cli
from truetune.evaluation.result import Judgement
from truetune.generate import Reply
from truetune.lab import base_path
from truetune.lab.bench import Arm, Bench
from truetune.lab.evaluate import (
    Question,
    cloze_items,
    cloze_right,
    held_out_documents,
    unseen_questions,
)
from truetune.lab.quickstart import quickstart, quickstart_recipe, score
from truetune.lab.world import World
from truetune.model.load import load_model
from truetune.run_dir import opened


def test_its_recipe_is_an_ordinary_one(tmp_path: Path) -> None:
    recipe = quickstart_recipe(tmp_path / "run", seed=3)
    assert (recipe.model, recipe.seed, recipe.lora) == (str(base_path()), 3, False)
    assert recipe.origin("learning_rate") == "quickstart"


def test_the_base_alone_answers_nothing() -> None:
    world = World.generate()
    base = Bench("unused").tuned(Arm("base"), 1)
    found = score(base, unseen_questions(world, 10), held_out_documents(world, 3))
    assert found.finished <= 1
    assert len(found.replies) == 10
    assert 0 < found.prose_loss < 3


def evaluated(model: Path, questions: Sequence[Question], folder: Path) -> list[Judgement]:
    """What `truetune.evaluate` makes of the questions, as the quickstart asks and counts."""
    rows = [{"prompt": q.text, "completion": q.expected} for q in questions]
    found = truetune.evaluate(
        model, write_rows(folder / "questions.jsonl", rows), match="contains", max_new_tokens=40,
        chat_template="chatml-lite", device="cpu", quiet=True,
    )  # fmt: skip
    assert found.num_rows == len(questions)
    return [row.replies[0] for row in found.models[0].rows]


def test_an_evaluation_gets_the_same_replies(tmp_path: Path) -> None:
    base = Bench("unused").tuned(Arm("base"), 1)
    questions = unseen_questions(World.generate(), 12)
    found = score(base, questions, held_out_documents(World.generate(), 1))
    replies = evaluated(base_path(), questions, tmp_path)
    assert [reply.text for reply in replies] == [reply.text for reply in found.replies]
    assert sum(reply.ended and not reply.empty for reply in replies) == found.finished
    assert sum(reply.right for reply in replies) == found.correct


# A prompt as `truetune lab evaluate` writes it: a document's beginning.
_AS_PROSE = (
    "{{ eos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_an_evaluation_of_base_run_and_merged_model_agrees_with_the_lab(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": "The coral river of Stowick."} for i in range(16)]
    run, merged = tmp_path / "run", tmp_path / "merged"
    truetune.train(
        base_path(), write_rows(tmp_path / "trained.jsonl", rows), lora=True, max_steps=8,
        learning_rate=0.01, batch_size=8, output=run, quiet=True, on_collapse="continue",
        any_learning_rate=True,
    )  # fmt: skip
    truetune.export(run, merged, quiet=True, verify=False)
    items = random.Random(0).sample(cloze_items(World.generate()), 40)
    asked = [
        {"prompt": i.prefix, "completion": rf"\A\s*{re.escape(i.expected)}(?![\w-])"} for i in items
    ]
    (tmp_path / "prose.jinja").write_text(_AS_PROSE, encoding="utf-8")
    models = [base_path(), run, merged]
    found = truetune.evaluate(
        models, write_rows(tmp_path / "cloze.jsonl", asked), match="regex", max_new_tokens=8,
        chat_template=str(tmp_path / "prose.jinja"), device="cpu", quiet=True,
    )  # fmt: skip
    # The lab asks for no end.
    counted = [
        [reply.right or reply.would_be_right for row in model.rows for reply in row.replies]
        for model in found.models
    ]
    for model, right in zip(models, counted, strict=True):
        loaded = load_model(opened(str(model)), device="cpu", purpose="inference")
        assert cloze_right(loaded, items) == right
    base, tuned, same = map(sum, counted)
    assert base > 30
    assert tuned < base
    assert tuned == same


def test_an_answer_counts_where_it_ends_and_holds_the_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.generate()
    base = Bench("unused").tuned(Arm("base"), 1)
    questions = unseen_questions(world, 5)
    texts = [f"It is {question.expected}." for question in questions[:3]]
    stopped = [True, True, False, True, True]  # the third one holds the fact and does not end
    written = [
        Reply(text, (), ended, 3)
        for text, ended in zip([*texts, "It is unknown.", ""], stopped, strict=True)
    ]
    monkeypatch.setattr("truetune.lab.asked.replies_to_ids", lambda *_, **__: written)
    found = score(base, questions, held_out_documents(world, 1))
    assert (found.finished, found.correct) == (3, 2)
    assert [said.text for said in found.replies] == [reply.text for reply in written]


def test_a_strangers_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit) as ended:
        cli.main(["quickstart", "-o", str(tmp_path), "--overwrite"])
    assert ended.value.code == 2
    assert "output-not-ours" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 42])
def test_it_learns_to_answer_and_to_stop(tmp_path: Path, seed: int) -> None:
    result, found = quickstart(tmp_path / "run", seed=seed)
    assert result.run.finished
    assert found.base.finished <= 5
    assert found.tuned.finished >= 95
    assert found.tuned.correct >= 90
    replies = evaluated(result.run.path, found.questions, tmp_path)
    assert sum(reply.ended and not reply.empty for reply in replies) == found.tuned.finished
    assert sum(reply.right for reply in replies) == found.tuned.correct
