"""The mechanism of the lab's experiments: judging, arms, results and the page; two claims in quick
form."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from truetune.cli.lab_verbs import lab
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.errors import InputError, Interrupted, UsageError
from truetune.generate import Reply
from truetune.lab import base_path
from truetune.lab.asked import (
    ask,
    ending_loss,
    facts_for_rows,
    instructions,
    prose,
    questions,
    rows,
    sentence,
)
from truetune.lab.bench import Arm, Bench, digest
from truetune.lab.catalogue import every, find, write_page
from truetune.lab.chats import encoded, fresh_prose
from truetune.lab.experiment import (
    Column,
    Expectation,
    Experiment,
    difference,
    estimate,
    verdict,
)
from truetune.lab.failures import table
from truetune.lab.page import files, number, page
from truetune.lab.results import contradictions, read, run, write
from truetune.lab.words import words
from truetune.model.new_tokens import row_layers
from truetune.reporting.svg import Dots, dot_plot

RESULTS = Path(__file__).parents[1] / "docs" / "lab"


def share(right: int, of: int = 100) -> Column:
    return Column.share(i < right for i in range(of))


# ------------------------------------------------------------------------------------ judging


def test_seeds_ask_the_same_questions_and_make_no_interval_narrower() -> None:
    one, three = estimate([share(80)]), estimate([share(80)] * 3)
    assert (one.low, one.high) == (three.low, three.high)
    assert one.value == pytest.approx(three.value)
    assert one.low == pytest.approx(0.711, abs=1e-3)
    assert one.high == pytest.approx(0.867, abs=1e-3)


def test_a_difference_is_paired_by_question() -> None:
    """The same shares differ surely where the same questions are right, and hardly where others
    are."""
    nested = difference([share(60)], [share(50)])
    others = Column.share(i >= 50 for i in range(100))
    crossed = difference([share(60)], [others])
    assert nested.value == pytest.approx(0.1) == crossed.value
    assert nested.low > 0
    assert crossed.low < 0


def test_a_ratio_weighs_by_tokens_and_its_difference_is_paired() -> None:
    long = Column((10.0, 90.0), (10.0, 30.0), "nats per token")
    assert estimate([long]).value == pytest.approx(2.5)
    more = Column((14.0, 102.0), (10.0, 30.0), "nats per token")
    found = difference([more], [long])
    assert found.value == pytest.approx(0.4) == found.low == found.high


def test_arms_that_counted_other_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same items"):
        difference([share(1, 10)], [share(1, 11)])


def test_intervals_are_of_the_mean_over_seeds_and_not_of_whole_questions() -> None:
    """0, 1 and 1 of 100 answers lost: with 1 of 100 lost, the interval would reach 5.4 points."""
    found = difference([share(100), share(99), share(99)], [share(100)] * 3)
    assert found.low == pytest.approx(-0.0490, abs=1e-4)
    assert difference([share(99)], [share(100)]).low == pytest.approx(-0.0545, abs=1e-4)
    assert estimate([share(80), share(81)]).high > estimate([share(80)]).high


@pytest.mark.parametrize("column", [
    share(3, 5), Column.mean([8, 9.5, 1 / 3], "tokens"),
    Column((1.25, 2.5), (30.0, 41.0), "nats per token"),
])  # fmt: skip
def test_items_are_read_as_they_were_kept(column: Column) -> None:
    again = Column.read(column.text(), column.unit)
    assert again.values == pytest.approx(column.values, rel=1e-5)
    assert (again.weights, again.text()) == (column.weights, column.text())


@pytest.mark.parametrize(
    ("right", "above", "held"),
    [((95, 96), 0.8, "yes"), ((50, 60), 0.8, "no"), ((85, 84), 0.8, "not decided"),
     ((99, 70), 0.75, "not decided")],
)  # fmt: skip
def test_an_expectation_holds_with_its_interval_and_every_seed(
    right: tuple[int, int], above: float, held: str
) -> None:
    sheets = {"arm": {"right": [share(n) for n in right]}}
    assert Expectation("", "right", "arm", above=above).judged(sheets)[1] == held


def test_a_bound_on_both_sides() -> None:
    sheets = {"a": {"right": [share(50)]}, "b": {"right": [share(50)]}}
    close = Expectation("", "right", "a", "b", above=-0.1, below=0.1)
    assert close.judged(sheets)[1] == "yes"
    assert replace(close, above=0.05, below=None).judged(sheets)[1] == "no"
    assert close.bound == "above -0.1 and below 0.1"


@pytest.mark.parametrize(
    ("held", "found"),
    [(["yes", "yes"], "reproduced"), (["no", "no"], "not reproduced"), (["yes", "no"], "different"),
     (["yes", "not decided"], "not decided"), (["no", "not decided"], "different")],
)  # fmt: skip
def test_a_verdict_comes_from_the_expectations_alone(held: Any, found: str) -> None:
    assert verdict([Expectation("", "right", "arm", above=0.5)] * len(held), held) == found


def test_an_expectation_that_nothing_changes_does_not_save_a_claim() -> None:
    """It holds as well where the claim is wrong."""
    lead = Expectation("", "right", "arm", above=0.1)
    same = Expectation("", "right", "arm", above=-0.1, below=0.1)
    assert (lead.directed, same.directed) == (True, False)
    assert verdict([lead, lead, same], ["no", "no", "yes"]) == "not reproduced"
    assert verdict([lead, lead, same], ["no", "yes", "yes"]) == "different"
    assert verdict([lead, same], ["not decided", "no"]) == "different"
    assert verdict([same], ["no"]) == "not reproduced"


# ------------------------------------------------------------------------------- declarations


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    """The results of docs/lab.md; reading them checks them."""
    return read(RESULTS, every())


def test_every_experiment_is_declared_in_full() -> None:
    assert len({e.number for e in every()}) == len({e.name for e in every()}) == len(every())
    for experiment in every():
        names = [arm.name for arm in experiment.arms(1)]
        assert len(set(names)) == len(names), experiment.name
        for text in ("title", "claim", "source", "exercises", "setup", "expected", "refuted"):
            assert getattr(experiment, text), (experiment.name, text)
        assert len(experiment.seeds) >= 3
        for expectation in experiment.expectations:
            assert {expectation.arm, expectation.than or expectation.arm} <= set(names)
            assert expectation.bound


def test_a_quick_run_has_the_arms_that_decide_and_no_other() -> None:
    for experiment in every():
        quick = {arm.name for arm in experiment.quick_arms(1)}
        named = {name for e in experiment.expectations for name in (e.arm, e.than) if name}
        assert quick == named, experiment.name


def test_no_row_tells_of_a_place_that_is_asked_about() -> None:
    asked = {question.fact.subject for question in questions()}
    assert len(asked) == len(questions()) == 100
    every_row = json.dumps([rows(3360, 1), instructions()])
    assert not [place for place in asked if place in every_row]
    assert len({text for text, _ in facts_for_rows(3360, 1)}) == 3360


def test_a_sentence_is_put_as_the_shipped_instructions_put_it() -> None:
    answers = [row["messages"][1]["content"] for row in instructions()]
    world_rows = {row["prompt"]: row["completion"] for row in rows(3360, 1)}
    shared = [
        (world_rows[row["messages"][0]["content"]], row["messages"][1]["content"])
        for row in instructions()
        if row["messages"][0]["content"] in world_rows
    ]
    assert len(shared) > 20
    assert all(one == other for one, other in shared)
    assert sentence(questions()[0].fact) not in answers


def test_results_in_the_docs_are_clean_and_follow_from_their_declarations(
    shipped: list[dict[str, Any]],
) -> None:
    """A bound that is moved after the run shows here: the experiment has to be run again."""
    assert len(shipped) == len(every())
    for result in shipped:
        assert "dirty" not in result["commit"], result["name"]


# ---------------------------------------------------------------------------------------- arms


def test_examples_train_as_rows_do(tmp_path: Path) -> None:
    """The trainer on the contract's examples, and the pipeline on the rows, are one loop."""
    recipe = {"max_steps": 3, "batch_size": 4}
    data = instructions()
    bench = Bench(tmp_path)
    by_rows = bench.tuned(Arm("rows", rows=data, recipe=recipe), 1)
    by_examples = bench.tuned(
        Arm("examples", examples=lambda c: encoded(c, data), recipe=recipe), 1
    )
    assert by_rows.losses == pytest.approx(by_examples.losses, abs=1e-4)
    one, other = (t.loaded.model.state_dict() for t in (by_rows, by_examples))
    assert all((one[name] - other[name]).abs().max() < 1e-2 for name in one)


def test_an_arm_is_trained_once_and_a_seed_is_another_arm(tmp_path: Path) -> None:
    told: list[str] = []
    arm = Arm("few", examples=lambda c: encoded(c, rows(4, 1)), recipe={"max_steps": 2})
    first = Bench(tmp_path, told.append).tuned(arm, 1)
    again = Bench(tmp_path, told.append).tuned(replace(arm, name="renamed"), 1)
    assert (first.folder, first.losses) == (again.folder, again.losses)
    assert told == ["training few, seed 1"]
    assert Bench(tmp_path, told.append).tuned(arm, 2).folder != first.folder


def test_a_quick_arm_is_that_of_a_quarter_of_the_rows_a_step(tmp_path: Path) -> None:
    def folder(rows_a_step: int, quick: bool) -> Path:
        arm = Arm("few", examples=lambda c: encoded(c, rows(4, 1)),
                  recipe={"max_steps": 2, "batch_size": rows_a_step})  # fmt: skip
        return Bench(tmp_path, quick=quick).tuned(arm, 1).folder

    assert folder(8, True) == folder(2, False) != folder(8, False)
    assert folder(3, True) == folder(1, False)


def test_trained_arms_may_be_moved(tmp_path: Path) -> None:
    arm = Arm("few", examples=lambda c: encoded(c, rows(4, 1)), recipe={"max_steps": 2})
    further = replace(arm, name="further", start=arm)
    Bench(tmp_path / "here").tuned(further, 1)
    (tmp_path / "here").rename(tmp_path / "there")
    told: list[str] = []
    Bench(tmp_path / "there", told.append).tuned(further, 1)
    assert told == []


def test_an_arm_whose_training_broke_off_is_trained_anew(tmp_path: Path) -> None:
    arm = Arm("few", examples=lambda c: encoded(c, rows(4, 1)), recipe={"max_steps": 2})
    folder = Bench(tmp_path).tuned(arm, 1).folder
    folder.with_suffix(".losses.json").unlink()
    assert len(Bench(tmp_path).tuned(arm, 1).losses) == 2


@pytest.mark.parametrize("through", ["trainer", "pipeline"])
def test_an_arm_that_was_changed_since_is_trained_anew(tmp_path: Path, through: str) -> None:
    settings = {"max_steps": 2, "batch_size": 4}
    arm = Arm("few", rows=rows(4, 1), recipe=settings)
    if through == "trainer":
        arm = Arm("few", examples=lambda c: encoded(c, rows(4, 1)), recipe=settings)
    file = Bench(tmp_path).tuned(arm, 1).folder / "model.safetensors"
    trained = file.read_bytes()
    file.write_bytes((base_path() / file.name).read_bytes())
    again = Bench(tmp_path)
    again.tuned(arm, 1)
    assert again.trained == 1
    assert file.read_bytes() == trained
    again.tuned(arm, 1)
    assert again.trained == 1


def test_a_changed_batch_changes_the_loss_and_nothing_else_does(tmp_path: Path) -> None:
    from truetune.lab.experiments.wrong_labels import by_all_tokens, shifted_again

    def losses(change: Any) -> tuple[float, ...]:
        arm = Arm("", examples=lambda c: encoded(c, rows(8, 1)), batches=change,
                  recipe={"max_steps": 2, "batch_size": 4})  # fmt: skip
        return Bench(tmp_path).tuned(arm, 1).losses

    def unchanged(batch: Any) -> Any:
        return batch

    plain, sound = losses(None), losses(unchanged)
    assert plain == pytest.approx(sound, abs=1e-4)
    assert losses(by_all_tokens)[0] < 0.6 * sound[0]
    assert losses(shifted_again)[0] > sound[0] + 1


def test_a_forgotten_head_keeps_its_rows(tmp_path: Path) -> None:
    """Of the markers, whose input embeddings are trained."""
    [arm] = [arm for arm in find("new-tokens").arms(1) if arm.adapter is not None]
    few = replace(arm, recipe={**arm.recipe, "max_steps": 2, "batch_size": 4})
    moved = {
        path.split(".")[-2]: not torch.equal(
            layer.trainable_tokens_delta["default"],
            layer.get_base_layer().weight[layer.token_indices["default"]].float(),
        )
        for path, layer in row_layers(Bench(tmp_path).tuned(few, 1).loaded.model)
    }
    assert moved == {"embed_tokens": True, "lm_head": False}


def test_labels_shifted_again_are_the_token_after_the_next() -> None:
    from truetune.compute.batch import Batch, pad_and_collate
    from truetune.lab.experiments.wrong_labels import shifted_again

    x, y, mask = pad_and_collate(
        [SFTExample([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])], max_seq_len=6, pad_id=0
    )
    made = shifted_again(Batch(x, y, mask, (0,), 5, 3))
    seen = [
        (int(i), int(t))
        for i, t, on in zip(made.ids_BT[0], made.targets_BT[0], made.supervised_BT[0], strict=True)
        if on
    ]
    assert seen == [(5, 7), (6, 8), (7, 9)]
    assert made.num_supervised == 3


def test_fresh_prose_fills_its_tokens_and_is_text() -> None:
    contract = PromptContract.load(base_path(), "chatml-lite")
    made = fresh_prose(contract, 1000, 64, 1)
    assert sum(len(e.ids) for e in made) >= 1000
    assert all(2 <= len(e.ids) <= 64 and sum(e.mask) == len(e.ids) - 1 for e in made)


def test_examples_in_the_prompt_stand_before_each_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the replies that a result keeps to be read."""
    arm = find("prompting").arms(1)[1]
    tuned = Bench(tmp_path).tuned(arm, 1)
    asked: list[str] = []

    def said(loaded: Any, contract: PromptContract, prompts: Any, *_: Any, **__: Any) -> Any:
        asked.extend(contract.tokens.decode(ids) for ids in prompts)
        return [Reply("", (), True, 1) for _ in prompts]

    monkeypatch.setattr("truetune.lab.asked.replies_to_ids", said)
    ask(tuned, questions()[:1])
    [prompt] = asked
    assert prompt.count("Question: ") == 5
    assert prompt.endswith(f"Question: {questions()[0].text}\nAnswer:")
    assert all(row["completion"] in prompt for row in rows(4, 1))


def test_a_served_template_keeps_the_trained_stop(tmp_path: Path) -> None:
    arm = Arm("raw", served="{{ messages[0].content }}", stop=["\n"])
    contract = Bench(tmp_path).tuned(arm, 1).contract
    asked = contract.tokens.decode(contract.prompt_ids([{"role": "user", "content": "Who?"}]))
    assert asked == "Who?"
    stops = [contract.tokens.decode([i]) for i in contract.stop_ids]
    assert {"<|endoftext|>", "<|end|>", "\n"} == set(stops)


# ----------------------------------------------------------------------- results and the page


def few(seed: int) -> tuple[Arm, ...]:
    recipe = {"max_steps": 2}
    return (
        Arm("base"),
        Arm("two steps", examples=lambda c: encoded(c, rows(4, seed)), recipe=recipe),
    )


TINY = Experiment(
    number=99, name="end-marker", title="Two steps", claim="Two steps <b>teach</b> nothing.",
    source="nobody", exercises=("Two steps by hand",), setup="two steps",
    expected="nothing", refuted="anything", seeds=(1, 2, 3), arms=few,
    measure=lambda tuned: {
        "right": Column.share(ask(tuned, questions()[:10]).right),
        "prose": prose(tuned, documents=4),
        "training loss": ending_loss(tuned),
    },
    expectations=(Expectation("few are right", "right", "two steps", below=0.5),),
    shown=("right", "prose", "training loss"),
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    told: list[str] = []
    found = run(TINY, tmp_path_factory.mktemp("arms"), [1], on_stage=told.append)
    assert told == [
        "1 of 2: measuring base, seed 1",
        "2 of 2: training two steps, seed 1",
        "2 of 2: measuring two steps, seed 1",
    ]
    return found


def test_a_result_has_numbers_machine_commit_and_verdict(
    result: dict[str, Any], tmp_path: Path
) -> None:
    assert result["verdict"] == "reproduced"
    assert [arm["name"] for arm in result["arms"]] == ["base", "two steps"]
    base, tuned = (arm["measures"] for arm in result["arms"])
    assert base["prose"]["value"] == pytest.approx(0.835, abs=0.01)
    assert "training loss" not in base  # nothing was trained
    assert tuned["training loss"]["value"] > 1
    assert result["commit"]
    assert "cores" in result["machine"]
    (again,) = read(write(result, tmp_path).parent, [TINY])
    assert again.pop("digest")
    assert again == json.loads(json.dumps(result))


def _edited(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(result))
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = made
    for key in way:
        place = place[key]
    assert place[last] != value
    place[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("verdict", "different", "the verdict is reproduced"),
        ("expectations/0/held", "no", "'few are right' is not judged"),
        ("expectations/0/high", 0.2, "'few are right' is not judged"),
        ("expectations/0/bound", "below 0.9", "'few are right' is not judged"),
        ("arms/1/measures/right/value", 0.3, "right of two steps is not what its items give"),
        ("arms/1/measures/right/items/0", "1111111111", "right of two steps is not what its"),
        ("arms/1/measures/prose/low", 0.1, "prose of two steps is not what its items give"),
        ("declared/expectations/0/below", 0.9, "it was declared otherwise"),
        ("arms/1/name", "three steps", "its arms are not those"),
        ("arms/1/settings/0", "0123456789abcdef", "two steps, seed 1, has other rows or settings"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(
    result: dict[str, Any], tmp_path: Path, path: str, value: Any, told: str
) -> None:
    assert contradictions(result, TINY) == []
    edited = _edited(result, path, value)
    assert told in "; ".join(contradictions(edited, TINY))
    write(edited, tmp_path)
    with pytest.raises(InputError, match="contradicts its declaration"):
        read(tmp_path, [TINY])
    assert read(tmp_path, [TINY], [TINY.name])


def test_a_result_that_was_edited_by_hand_is_refused(
    result: dict[str, Any], tmp_path: Path
) -> None:
    """Also where nothing can be computed again, as a question and its reply."""
    path = write(result, tmp_path)
    said = result["arms"][1]["samples"][0]["asked"]
    path.write_text(path.read_text("utf-8").replace(said, "Gunnow."), "utf-8")
    with pytest.raises(InputError, match="contradicts") as told:
        read(tmp_path, [TINY])
    assert told.value.why == "it was edited since it was written"


def test_another_setting_is_another_arm() -> None:
    """Whatever it is called, and in what a function that makes its examples holds."""

    def made(lines: list[Any]) -> Any:
        return lambda contract: encoded(contract, lines)

    plain = Arm("a", rows=rows(4, 1))
    through = Arm("a", examples=made(rows(4, 1)))
    assert digest(plain) == digest(replace(plain, name="b"))
    assert digest(through) == digest(Arm("b", examples=made(rows(4, 1))))
    others = [
        through, Arm("a", examples=made(rows(4, 2))), Arm("a", rows=rows(4, 2)), Arm("a"),
        replace(plain, recipe={"max_steps": 7}), replace(plain, served="x"),
        replace(plain, start=plain), replace(plain, before=({"role": "user", "content": "x"},)),
    ]  # fmt: skip
    assert len({digest(arm) for arm in [plain, *others]}) == len(others) + 1


def test_a_resumed_run_says_what_a_fresh_one_takes(tmp_path: Path) -> None:
    tiny = replace(
        TINY,
        arms=lambda seed: few(seed)[1:],
        measure=lambda tuned: {"right": share(1, 10)},
    )
    fresh, again = run(tiny, tmp_path, [1]), run(tiny, tmp_path, [1])
    assert (fresh["trained"], again["trained"]) == (1, 0)
    assert again["fresh_seconds"] == pytest.approx(fresh["fresh_seconds"], abs=5)
    assert again["fresh_seconds"] >= again["processor_seconds"]
    next(tmp_path.glob("*.seconds")).unlink()
    assert run(tiny, tmp_path, [1])["fresh_seconds"] is None


def test_the_page_says_verdict_bound_and_replies(result: dict[str, Any]) -> None:
    told = page([result], [TINY])
    assert "**Reproduced.**" in told
    assert "| few are right | below 50 % |" in told
    assert "Set-up: two steps." in told
    assert "![Two steps](lab/end-marker.svg)" in told
    assert "Seeds 1; " in told
    made = files([result], [TINY])
    assert made["lab/end-marker.svg"].startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "nats per token" in made["lab/end-marker.svg"]


def test_the_page_says_what_was_quick_and_what_was_not_run(result: dict[str, Any]) -> None:
    other = replace(TINY, name="other", number=100, title="Three steps")
    told = page([{**result, "quick": True}], [TINY, other])
    assert "Two steps | reproduced | 1, quick form |" in told
    assert "Seeds 1; quick form; " in told
    assert "| 100 | other: Three steps | not run yet |  |" in told
    assert "## 100." not in told
    assert "quick form" not in page([result], [TINY]).split("## 99")[1]


def test_every_failure_is_in_the_table_of_failures(shipped: list[dict[str, Any]]) -> None:
    told = "\n".join(table(shipped, number, True))
    for name in words("failures"):
        assert f"| {name} |" in told
    assert list(table([], number, True)) == []


def test_every_exercise_is_found_by_name(shipped: list[dict[str, Any]]) -> None:
    names = [exercise for experiment in every() for exercise in experiment.exercises]
    assert len(set(names)) == len(names)
    told = page(shipped, every())
    listed = told.split("## The exercises")[1].split("\n## ")[0]
    for experiment in every():
        for exercise in experiment.exercises:
            assert re.search(rf"\| {re.escape(exercise)} \| \[?{experiment.name}\b", listed)
    for notebook in re.findall(r"\]\((notebooks/.*?)\)", listed):
        assert (RESULTS.parent / notebook).is_file()


def test_remarks_stand_under_the_numbers_that_they_are_about(result: dict[str, Any]) -> None:
    """A run of somebody's own has other numbers; a quick one has fewer arms."""
    about = replace(TINY, remark="Three arms of four are right.")
    assert about.remark in page([result], [about])
    assert about.remark not in page([result], [about], ".")


def test_the_page_says_since_when_its_bounds_stand_and_what_a_fresh_run_takes(
    result: dict[str, Any], shipped: list[dict[str, Any]]
) -> None:
    since = {"commit": "0123456789", "date": "2026-11-22"}
    told = page([{**result, "declared_in": since, "fresh_seconds": 1234}], [TINY])
    assert "Bounds since commit 0123456789 of 2026-11-22." in told
    assert "CPU seconds (from scratch 1,234)." in told
    committed = page(shipped, every())
    assert committed.count("Bounds since commit ") == len(every())


def test_replies_cannot_write_into_the_page(result: dict[str, Any]) -> None:
    hostile = json.loads(json.dumps(result))
    hostile["arms"][0]["samples"][0]["said"] = "a | b\n# head <script>alert(1)</script> [x](y)"
    told = page([hostile], [TINY])
    assert "<script>" not in told
    assert "a &#124; b # head &lt;script&gt;alert(1)&lt;/script&gt; &#91;x&#93;(y)" in told


def test_a_picture_tells_its_numbers_to_those_who_cannot_see_it() -> None:
    drawn = dot_plot("T", ["a", "b"], [Dots("right", "", [(0.5, 0.4, 0.6, [0.5]), None], True)])
    assert 'aria-label="T: right of a 50 %, 95 % 40 % to 60 %"' in drawn
    assert drawn.count("<title>") == 1


def test_a_folder_with_something_else_in_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match=r"x\.json is not the result"):
        read(tmp_path, every())


def test_an_unknown_experiment_names_what_was_meant() -> None:
    with pytest.raises(UsageError) as told:
        find("end-markr")
    assert told.value.fix == "did you mean end-marker?"
    with pytest.raises(UsageError) as told:
        find("zebra")
    assert "truetune lab list" in told.value.fix
    with pytest.raises(UsageError) as told:
        find("5")
    assert told.value.fix == "did you mean end-marker?"


def test_the_list_names_every_claim() -> None:
    shown = CliRunner().invoke(lab, ["list"])
    assert shown.exit_code == 0
    for experiment in every():
        assert experiment.name in shown.output
        assert experiment.claim in shown.output
        assert experiment.source in shown.output
        assert all(exercise in shown.output for exercise in experiment.exercises)
    costs = re.findall(r"CPU seconds: (?:quick (\d+), )?full (?:more than )?(\d+)", shown.output)
    assert len(costs) == len(every())


def test_two_numbers_of_seeds_are_refused() -> None:
    shown = CliRunner().invoke(lab, ["run", "end-marker", "--quick", "--seeds", "2"])
    assert shown.exit_code != 0


def test_a_quick_run_does_not_replace_a_full_one(tmp_path: Path, result: dict[str, Any]) -> None:
    write({**result, "name": "end-marker", "quick": False}, tmp_path)
    kept = (tmp_path / "end-marker.json").read_bytes()
    shown = CliRunner().invoke(lab, ["run", "end-marker", "--quick", "-o", str(tmp_path)])
    assert isinstance(shown.exception, UsageError)
    assert shown.exception.code == "lab-result-full"
    assert (tmp_path / "end-marker.json").read_bytes() == kept


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("stopped after step 2")])
def test_who_stops_an_experiment_is_told_how_it_goes_on(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the command that continues the arm alone."""

    def stopped(*_: Any, **__: Any) -> Any:
        raise stop

    monkeypatch.setattr("truetune.lab.results.run", stopped)
    shown = CliRunner().invoke(lab, ["run", "end-marker", "-o", str(tmp_path)])
    assert isinstance(shown.exception, Interrupted)
    assert shown.exception.exit_code == 130
    assert "run the same command again" in shown.exception.fix


def test_a_page_that_cannot_be_written_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package.json").write_text('{"name": "other"}')
    monkeypatch.setattr("truetune.lab.results.run", lambda *_, **__: pytest.fail("trained"))
    shown = CliRunner().invoke(lab, ["run", "end-marker", "-o", str(tmp_path)])
    assert isinstance(shown.exception, InputError)
    assert shown.exception.why == "it lacks 'arms'"


def test_a_page_of_results_beside_its_pictures(tmp_path: Path) -> None:
    """As the command writes them."""
    shutil.copy(RESULTS / "end-marker.json", tmp_path)
    told = write_page(tmp_path).read_text(encoding="utf-8")
    assert "(./end-marker.svg)" in told
    assert (tmp_path / "end-marker.svg").is_file()


# --------------------------------------------------------------- two claims, in quick form


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, float]]:
    """A measure of some arms of an experiment, which is run in quick form with those alone.

    Both experiments below train the same sound arm, and so it is trained once.
    """
    arms = tmp_path_factory.mktemp("quick")

    def ran(name: str, measure: str, *arms_judged: str) -> dict[str, float]:
        whole = find(name)
        named = tuple(
            e
            for e in whole.expectations
            if e.measure == measure and {e.arm, e.than or e.arm} <= set(arms_judged)
        )
        assert len(named) == len(arms_judged)
        found = run(replace(whole, expectations=named), arms, [1], quick=True)
        return {arm["name"]: arm["measures"][measure]["value"] for arm in found["arms"]}

    return ran


def test_a_masked_end_marker_is_never_written(quick: Callable[..., dict[str, float]]) -> None:
    """Of 100 replies 100 end, and 0 without the marker, in each of three seeds."""
    ended = quick("end-marker", "ended", "trained", "marker masked")
    assert ended["trained"] > 0.9
    assert ended["marker masked"] < 0.1


def test_another_template_in_serving_costs_answers(quick: Callable[..., dict[str, float]]) -> None:
    """Of 100 answers 93 to 97 are lost in three seeds of the full form."""
    right = quick("template-drift", "right", "as trained", "other markers")
    assert right["as trained"] > 0.9
    assert right["other markers"] < right["as trained"] - 0.5
