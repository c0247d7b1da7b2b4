"""Rows to artifact: what a run leaves, and what it does when rows, weights or disk fail it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_models import NUM_TOKENS, tiny_tokenizer, write_model
from tiny_runs import Shown, command, lines, sums, write_rows
from truetune.errors import BadRows, CheckFailed, OutputExists, RecipeError
from truetune.findings import Finding
from truetune.listener import Listener
from truetune.recipe.settings import setting_names
from truetune.recipe.sources import make_recipe, read_recipe
from truetune.run.pipeline import RunResult, train
from truetune.run.prepare import survey
from truetune.run_dir import RunDir, sha256

STEPS = 6


class Ear(Listener):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.stages: list[str] = []
        self.saved_paths: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def finding(self, finding: Finding) -> None:
        self.findings.append(finding)

    def saved(self, path: str) -> None:
        self.saved_paths.append(path)

    def codes(self) -> list[str]:
        return [finding.code for finding in self.findings]


def small(model: Path, data: Path, output: Path, **settings: Any) -> RunResult:
    """A run through the library."""
    ear = settings.pop("listener", None)
    given = {"batch_size": 4, "max_steps": 2, "model": str(model), "data": str(data)}
    return train(make_recipe(("test", {**given, "output": str(output), **settings})), ear)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder / "tiny", dtype="bfloat16")
    write_rows(folder / "rows.jsonl", sums(120))
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request: pytest.FixtureRequest, place: Path) -> tuple[RunDir, Shown, str]:
    """A run with held-out rows, checkpoints and evaluations; what it showed; full or lora."""
    run = place / request.param
    words = ["--lora", "--lora-r", "4"] if request.param == "lora" else []
    shown = command(
        *("train", place / "tiny", place / "rows.jsonl", "-o", run, "--batch-size", "8"),
        *("--max-steps", STEPS, "--save-steps", "2", "--eval-steps", "3", *words),
    )
    return RunDir(run), shown, request.param


# The run directory.


def test_a_run_ends_well_and_says_how_to_go_on(trained: tuple[RunDir, Shown, str]) -> None:
    run, shown, kind = trained
    assert (shown.code, shown.err) == (0, "")
    artifact = run.path / ("adapter" if kind == "lora" else "model")
    assert f'from_pretrained("{artifact}")' in shown.out
    assert f"chat    truetune chat {run.path}" in shown.out
    assert "serve   vllm serve" in shown.out
    assert "114 for training, 6 held out" in shown.out
    assert "8 examples per step, packed to 1,024 tokens per forward pass" in shown.out


def test_a_run_is_complete(trained: tuple[RunDir, Shown, str]) -> None:
    run, _, kind = trained
    artifact = "adapter" if kind == "lora" else "model"
    assert {path.name for path in run.path.iterdir()} == {
        *("recipe.yaml", "contract.json", "data.json", "env.json", "metrics.jsonl"),
        *("findings.jsonl", "samples.jsonl", "checkpoints", artifact, "manifest.json"),
        *("verify_rows.jsonl", "verify.json", "report.html"),
    }
    assert run.finished
    assert run.artifact() == run.path / artifact


def test_the_manifest_covers_all_and_is_written_last(trained: tuple[RunDir, Shown, str]) -> None:
    run, _, _ = trained
    manifest = json.loads(run.file("manifest.json").read_text())
    files = {
        path.relative_to(run.path).as_posix(): path
        for path in run.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(manifest["files"]) == set(files)
    assert all(manifest["files"][name]["sha256"] == sha256(path) for name, path in files.items())
    written = run.file("manifest.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= written for path in files.values())
    assert manifest["steps"] == STEPS
    step, evaluation, probe = lines(run.file("metrics.jsonl"))[-3:]
    assert manifest["train_loss"] == step["loss"]
    assert manifest["eval_loss"] == evaluation["eval_loss"] == probe["held_out_loss"]


def test_metrics_have_every_fact_of_every_step(trained: tuple[RunDir, Shown, str]) -> None:
    run, _, _ = trained
    metrics = lines(run.file("metrics.jsonl"))
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    names = ["loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "seconds"]
    for line in steps:
        assert list(line) == ["step", *names]
        assert all(math.isfinite(line[name]) for name in names)
        assert line["tokens"] > line["supervised_tokens"] > 0
        assert line["seconds"] > 0
    assert [line["step"] for line in metrics if "eval_loss" in line] == [0, 3, 6]
    assert [line["step"] for line in metrics if line.get("probe")] == [0, 3, 6]
    # The order is that of time.
    assert [line["step"] for line in metrics] == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 6]


def test_samples_are_answers_to_held_out_prompts(
    trained: tuple[RunDir, Shown, str], place: Path
) -> None:
    run, _, _ = trained
    samples = lines(run.file("samples.jsonl"))
    assert [sample["step"] for sample in samples] == [0] * 8 + [3] * 8 + [6] * 8
    # Six rows are held out; the others are trained ones.
    assert [sample["held_out"] for sample in samples[:8]] == [True] * 6 + [False] * 2
    rows = {f"{place / 'rows.jsonl'}:{i}": row for i, row in enumerate(sums(120), 1)}
    for sample in samples:
        assert sample["expected"] == rows[sample["where"]]["completion"]
        asked = [{"role": "user", "content": rows[sample["where"]]["prompt"]}]
        assert sample["messages"] == (asked if sample["held_out"] else [])
        assert rows[sample["where"]]["prompt"] in sample["prompt"]
        assert isinstance(sample["answer"], str)
        assert isinstance(sample["stopped"], bool)


def test_data_json_counts_and_hashes(trained: tuple[RunDir, Shown, str], place: Path) -> None:
    run, _, _ = trained
    data = json.loads(run.file("data.json").read_text())
    (file,) = data["files"]
    assert file["sha256"] == sha256(place / "rows.jsonl")
    assert (data["schema"], data["rows_read"], data["dropped"]) == ("prompt-completion", 120, [])
    assert (data["train"]["examples"], data["held_out"]["examples"]) == (114, 6)
    assert data["train"]["tokens"] > data["train"]["supervised_tokens"]
    # One epoch is more than the run: each step's tokens are part of the whole.
    metrics = [line for line in lines(run.file("metrics.jsonl")) if "loss" in line]
    assert sum(line["tokens"] for line in metrics) < data["train"]["tokens"]
    assert data["train"]["sha256"] != data["held_out"]["sha256"]


def test_env_json_names_versions_and_no_secrets(
    trained: tuple[RunDir, Shown, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    run, _, kind = trained
    env = json.loads(run.file("env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
    assert env["check"] == "passed"
    assert (env["trainable_parameters"] < env["parameters"]) == (kind == "lora")
    assert all({"name", "value", "reason"} == set(choice) for choice in env["choices"])
    assert "HOME" not in run.file("env.json").read_text()


def test_the_recipe_holds_value_and_origin_and_can_be_read(
    trained: tuple[RunDir, Shown, str], place: Path
) -> None:
    run, _, kind = trained
    rows = yaml.safe_load(run.file("recipe.yaml").read_text())
    assert list(rows) == list(setting_names())
    assert all(set(row) == {"value", "origin"} for row in rows.values())
    assert rows["batch_size"] == {"value": 8, "origin": "command line"}
    assert rows["learning_rate"]["value"] == (3e-3 if kind == "lora" else 3e-4)
    assert rows["learning_rate"]["origin"].startswith("default: ")
    data = json.loads(run.file("data.json").read_text())
    longest = max(data[part]["longest"] for part in ("train", "held_out"))
    assert rows["max_length"]["value"] == longest
    given = read_recipe(run.file("recipe.yaml"))
    assert given["model"] == str(place / "tiny")
    assert "learning_rate" not in given
    assert make_recipe(("again", given)).max_steps == STEPS


def test_the_contract_is_recorded(trained: tuple[RunDir, Shown, str]) -> None:
    run, _, _ = trained
    contract = json.loads(run.file("contract.json").read_text())
    assert contract["stop"] == [{"id": 257, "token": "<|end|>"}]
    assert contract["template"]["source"] == tiny_tokenizer().chat_template
    assert len(contract["fingerprint"]) == 64


def test_every_checkpoint_opens_in_other_peoples_libraries(
    trained: tuple[RunDir, Shown, str],
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _, kind = trained
    opener = AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM
    folders = [*run.checkpoints(), run.artifact()]
    assert [folder.name for folder in run.checkpoints()] == ["step-00000002", "step-00000004"]
    logits = []
    for folder in folders:
        model = opener.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            logits.append(model(ids).logits)
    # Three states of one model: each was saved as it then was.
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1].float(), logits[2].float())


def test_the_artifact_has_the_type_that_the_model_came_in(
    trained: tuple[RunDir, Shown, str],
) -> None:
    from safetensors import safe_open

    run, _, kind = trained
    artifact = run.artifact()
    assert artifact
    with safe_open(next(artifact.glob("*.safetensors")), "pt") as file:
        kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert kinds == ({"torch.float32"} if kind == "lora" else {"torch.bfloat16"})
    told = [line["code"] for line in lines(run.file("findings.jsonl"))]
    assert ("weights-rounded" in told) == (kind == "full")


def test_training_lowers_the_loss(place: Path, tmp_path: Path) -> None:
    result = small(
        place / "tiny",
        place / "rows.jsonl",
        tmp_path / "run",
        max_steps=40,
        learning_rate=1e-2,
        eval_steps=40,
        save_steps=40,
    )
    metrics = lines(result.run.file("metrics.jsonl"))
    first = next(line["loss"] for line in metrics if "loss" in line)
    assert result.train_loss < 0.7 * first
    assert result.eval_loss is not None
    assert result.eval_loss < 0.7 * first


def test_save_total_limit(place: Path, tmp_path: Path) -> None:
    for limit, kept in ((1, [4]), (3, [2, 3, 4])):
        ear = Ear()
        run = small(
            place / "tiny",
            place / "rows.jsonl",
            tmp_path / str(limit),
            max_steps=5,
            save_steps=1,
            eval_steps=5,
            save_total_limit=limit,
            max_train_samples=20,
            listener=ear,
        ).run
        assert [int(path.name.removeprefix("step-")) for path in run.checkpoints()] == kept
        assert len(ear.saved_paths) == 5  # four checkpoints and the artifact


def test_few_rows_hold_nothing_out(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(99))
    result = small(place / "tiny", data, tmp_path / "run")
    assert result.eval_loss is None
    assert json.loads(result.run.file("data.json").read_text())["held_out"]["examples"] == 0
    # Trained rows are asked instead.
    samples = lines(result.run.file("samples.jsonl"))
    assert samples
    assert not any(sample["held_out"] for sample in samples)


def test_logging_steps(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    result = small(place / "tiny", data, tmp_path / "run", max_steps=5, logging_steps=2)
    metrics = lines(result.run.file("metrics.jsonl"))
    assert [line["step"] for line in metrics if "loss" in line] == [2, 4, 5]


# Overwriting.


def test_overwrite_replaces_a_run_and_keeps_strangers(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    out = tmp_path / "run"
    first = small(place / "tiny", data, out, lora=True).run
    with pytest.raises(OutputExists):
        small(place / "tiny", data, out)
    (out / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"adapter/mine\.txt"):
        small(place / "tiny", data, out, overwrite=True)
    assert (first.file("adapter") / "adapter_model.safetensors").is_file()
    (out / "adapter" / "mine.txt").unlink()
    small(place / "tiny", data, out, overwrite=True)
    assert not (out / "adapter").exists()
    assert (out / "model").is_dir()


def test_a_run_is_not_overwritten_by_one_that_starts_from_it(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    run = small(place / "tiny", data, tmp_path / "run").run
    with pytest.raises(OutputExists) as caught:
        small(run.file("model"), data, run.path, overwrite=True)
    assert caught.value.code == "output-is-input"
    assert (run.file("model") / "model.safetensors").is_file()


def test_a_failure_before_the_start_keeps_the_old_run(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    run = small(place / "tiny", data, tmp_path / "run").run
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "x", "completion": None}])
    with pytest.raises(BadRows):
        small(place / "tiny", bad, run.path, overwrite=True)
    assert run.finished


# Rows.


def test_dropped_rows_are_counted_with_place_and_reason(place: Path, tmp_path: Path) -> None:
    rows: list[Any] = sums(20)
    rows[4] = {"messages": [{"role": "user", "content": "x"}]}
    rows[9] = {"prompt": "x", "completion": "a<|end|>b"}
    rows[14] = '"text"'
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadRows) as caught:
        small(place / "tiny", data, tmp_path / "run")
    # Rows that are broken as they stand in the file are refused before the model is opened.
    assert {f.code for f in caught.value.findings} == {"mixed-schemas", "row-not-an-object"}
    assert not (tmp_path / "run").exists()
    settings = {"model": str(place / "tiny"), "data": str(data)}
    found = survey(make_recipe(("test", settings)), Listener()).prepared
    listed = {f.code for f in found.findings if f.level == "error"}
    assert listed >= {"mixed-schemas", "stop-in-answer", "row-not-an-object"}  # `check` lists all
    ear = Ear()
    run = small(place / "tiny", data, tmp_path / "run", bad_rows="drop", listener=ear).run
    found = json.loads(run.file("data.json").read_text())
    assert found["rows_read"] == 20
    assert found["train"]["examples"] == 17
    drops = {drop["where"].split(":")[1].split(",")[0]: drop["code"] for drop in found["dropped"]}
    assert drops == {"5": "mixed-schemas", "10": "stop-in-answer", "15": "row-not-an-object"}
    assert all(drop["what"] for drop in found["dropped"])
    warnings = [f for f in ear.findings if f.level == "warning"]
    told = [f for f in warnings if f.code not in ("rows-not-learned", "answers-do-not-end")]
    assert {f.code for f in told} == set(drops.values())
    assert all(f.what.startswith("dropped: ") for f in told)


def test_no_row_left_is_an_error_even_when_dropping(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": None}])
    with pytest.raises(BadRows, match="no row is left"):
        small(place / "tiny", data, tmp_path / "run", bad_rows="drop")


def test_own_held_out_rows(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    held = write_rows(tmp_path / "held.jsonl", [*sums(22)[18:], {"prompt": "q", "completion": 5}])
    ear = Ear()
    run = small(
        place / "tiny",
        data,
        tmp_path / "run",
        eval_data=str(held),
        bad_rows="drop",
        listener=ear,
    ).run
    facts = json.loads(run.file("data.json").read_text())
    assert facts["train"]["examples"] == 20
    # Two of the four are trained; the fifth is no row. Each is a drop with a reason.
    assert facts["held_out"]["examples"] == 2
    assert sorted(drop["where"].rpartition(":")[2] for drop in facts["dropped"]) == ["1", "2", "5"]
    assert "eval-overlaps-train" in ear.codes()
    # Only rows that are measured are asked.
    samples = lines(run.file("samples.jsonl"))
    assert {sample["where"] for sample in samples if sample["held_out"]} == {
        f"{held}:3",
        f"{held}:4",
    }


def test_held_out_rows_that_cannot_be_asked_do_not_end_the_run(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    held = write_rows(
        tmp_path / "held.jsonl",
        [
            {"prompt": "x" * 300, "completion": "beyond the model's context"},
            {"prompt": "a", "completion": "b<|end|>c"},
            {"prompt": "fine", "completion": "fine"},
        ],
    )
    result = small(place / "tiny", data, tmp_path / "run", eval_data=str(held), bad_rows="drop")
    samples = lines(result.run.file("samples.jsonl"))
    assert {s["where"] for s in samples if s["held_out"]} == {f"{held}:3"}
    facts = json.loads(result.run.file("data.json").read_text())
    assert {d["code"] for d in facts["dropped"]} == {"rows-overlong", "stop-in-answer"}


def test_the_longest_held_out_row_counts_for_the_length(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sums(20))
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "x" * 100, "completion": "y"}])
    result = small(place / "tiny", data, tmp_path / "run", eval_data=str(held))
    assert result.plan.max_length > 100
    assert result.eval_loss is not None


# Length.


def long_rows(short: int, long: int) -> list[dict[str, str]]:
    return [*sums(short), *({"prompt": "x" * 60, "completion": "y"} for _ in range(long))]


def test_losing_more_than_five_percent_stops_with_the_table(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", long_rows(18, 2))
    with pytest.raises(CheckFailed) as caught:
        small(place / "tiny", data, tmp_path / "run", max_length=40)
    (finding,) = caught.value.findings
    assert finding.code == "rows-overlong"
    assert finding.count == 2
    assert "10.0 % of the examples" in finding.what
    assert "256 keeps 20 examples and 100.0 % of the answers" in finding.why
    # Their prompts are long, not their answers.
    assert finding.fix == (
        "--max-length 64 keeps 99 % of the rows whole; or cut the beginning of 2 prompts with "
        "--overlong truncate-prompt; or accept the loss with --max-dropped 0.1"
    )
    assert not (tmp_path / "run").exists()
    result = small(place / "tiny", data, tmp_path / "run", max_length=40, max_dropped=0.1)
    facts = json.loads(result.run.file("data.json").read_text())
    assert [drop["code"] for drop in facts["dropped"]] == ["rows-overlong"] * 2
    assert facts["train"]["examples"] == 18
    (told,) = [f for f in result.findings if f.code == "rows-overlong"]
    assert told.level == "warning"
    assert "were dropped" in told.what


def test_losing_five_percent_is_a_warning(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", long_rows(19, 1))
    result = small(place / "tiny", data, tmp_path / "run", max_length=40)
    assert [f.level for f in result.findings if f.code == "rows-overlong"] == ["warning"]


def test_five_percent_of_the_answers_counts_too(place: Path, tmp_path: Path) -> None:
    rows = [*sums(39), {"prompt": "x", "completion": "y" * 60}]  # 2.5 % of the rows
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(CheckFailed) as caught:
        small(place / "tiny", data, tmp_path / "run", max_length=40)
    (finding,) = caught.value.findings
    # Where the answer is what is too long, no prompt can be cut for it.
    assert "truncate-prompt" not in finding.fix
    share = finding.fix.partition("--max-dropped ")[2]
    run = small(place / "tiny", data, tmp_path / "run", max_length=40, max_dropped=float(share))
    assert [f.level for f in run.findings if f.code == "rows-overlong"] == ["warning"]


def test_a_length_that_leaves_nothing_is_an_error_at_any_price(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    with pytest.raises(CheckFailed):
        small(place / "tiny", data, tmp_path / "run", max_length=3, max_dropped=1)


@pytest.mark.parametrize("overlong", ["error", "truncate-prompt"])
def test_other_policies(place: Path, tmp_path: Path, overlong: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", long_rows(39, 1))

    def go() -> RunResult:
        return small(place / "tiny", data, tmp_path / "run", max_length=40, overlong=overlong)

    if overlong == "error":
        with pytest.raises(CheckFailed) as caught:
            go()
        assert caught.value.findings[0].fix.endswith("or drop them with --overlong drop")
        return
    facts = json.loads(go().run.file("data.json").read_text())
    assert facts["train"]["truncated_prompts"] == 1
    assert (facts["train"]["examples"], facts["train"]["longest"]) == (40, 40)


@pytest.mark.parametrize("overlong", ["drop", "error", "truncate-prompt", "split-text"])
def test_plain_text_is_never_dropped(place: Path, tmp_path: Path, overlong: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "z" * 500}, {"text": "short"}])
    result = small(place / "tiny", data, tmp_path / "run", max_length=64, overlong=overlong)
    facts = json.loads(result.run.file("data.json").read_text())
    assert facts["dropped"] == []
    assert facts["train"]["split_texts"] == 1
    # Every token is a target once, but for each text's first; the end token comes on top.
    assert facts["train"]["supervised_tokens"] == len("z" * 500) + len("short")
    assert "rows-split" in {f.code for f in result.findings}


def test_a_length_beyond_the_context_is_told(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    far = small(place / "tiny", data, tmp_path / "far", max_length=257)
    near = small(place / "tiny", data, tmp_path / "near", max_length=256)
    assert "length-beyond-context" in {f.code for f in far.findings}
    assert "length-beyond-context" not in {f.code for f in near.findings}


# What is told.


def test_settings_without_effect_are_told(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    without = small(place / "tiny", data, tmp_path / "a", lora_r=8)
    with_lora = small(place / "tiny", data, tmp_path / "b", lora_r=8, lora=True)
    assert [f.what for f in without.findings if f.code == "setting-without-effect"] == [
        "lora_r has no effect without --lora"
    ]
    assert "setting-without-effect" not in {f.code for f in with_lora.findings}


def test_a_stop_that_an_adapter_cannot_bring_is_told(place: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", generation={"eos_token_id": 256}, eos_token_id=256)
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    for name, stop in (("auto", None), ("named", ["<|end|>"])):
        shown = command(
            *("train", folder, data, "-o", tmp_path / name, "--lora", "--max-steps", "1"),
            *(["--stop", *stop] if stop else []),
        )
        assert shown.code == 0
        assert "warning[adapter-stop-unread]" in shown.out
        assert "requests need stop_token_ids=[256, 257]" in shown.out
        # The model stops on no token of its own template: it is a base.
        assert f"{folder} (base)" in shown.out
    unchecked = command(
        *("train", folder, data, "-o", tmp_path / "c", "--lora", "--max-steps", "1", "--no-check")
    )
    assert "requests need stop_token_ids" in unchecked.out


def test_weights_that_rounding_would_undo_are_saved_as_trained(tmp_path: Path) -> None:
    """One step of a low rate on the embedded base, which comes in bfloat16."""
    import torch
    from safetensors.torch import load_file

    facts = [{"prompt": f"The code of box {i}?", "completion": f"It is {i}."} for i in range(30)]
    path, out = write_rows(tmp_path / "rows.jsonl", facts), tmp_path / "run"
    words = ("train", "embedded", path, "-o", out, "--max-steps", 1)
    shown = command(*words, "--learning-rate", 1e-4)
    assert shown.code == 0, shown.err
    said = " ".join((shown.out + shown.err).split())
    assert "warning[saved-unrounded]: the weights are saved in float32" in said
    assert f"vllm serve {out}/model --dtype float32" in said
    weights = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any((value.bfloat16().float() != value).any() for value in weights.values())
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "float32"
    assert command("verify", out).code == 0
    # What rounding leaves as it was is served as before.
    shown = command(*words, "--learning-rate", 3e-4, "--overwrite")
    assert shown.code == 0, shown.err
    assert "saved-unrounded" not in shown.out + shown.err
    weights = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_no_check_is_recorded(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    run = small(place / "tiny", data, tmp_path / "run", learning_rate=0.05, no_check=True).run
    assert json.loads(run.file("env.json").read_text())["check"] == "skipped by --no-check"
    assert lines(run.file("findings.jsonl")) == [
        line
        for line in lines(run.file("findings.jsonl"))
        if line["code"] in ("weights-rounded", "rows-not-learned", "answers-do-not-end")
    ]


def test_the_stages_come_in_order(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    ear = Ear()
    small(place / "tiny", data, tmp_path / "run", listener=ear)
    assert ear.stages == [
        *(
            "reading the rows",
            "opening the model's files",
            "encoding and checking the rows",
            "checking the run",
        ),
        *("loading the weights", "probing the model and its memory"),
        *["answering fixed prompts"] * 3,
        "answering training prompts",
        *("saving and reloading", "verifying in a fresh process"),
    ]


def test_what_has_no_default_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="model, data, output"):
        train(make_recipe())


@pytest.mark.parametrize(
    ("variable", "code"), [("SHELL", "no-launcher"), ("ACCELERATE_USE_FSDP", "sharding")]
)
def test_processes_that_would_not_train_as_asked_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, code: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "true")
    shown = command("train", place / "tiny", place / "rows.jsonl", "-o", tmp_path / "run")
    assert shown.code == 2
    assert f"error[{code}]" in shown.err
    assert not (tmp_path / "run").exists()


# Losses that are no numbers.


def poison(folder: Path, token: int) -> None:
    """Make the embedding of one token infinite: rows that hold it have no loss."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name][token] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})


def test_a_loss_that_is_no_number_stops_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    folder = write_model(tmp_path / "m")
    broken = tiny_tokenizer()("Z")["input_ids"][0]
    assert broken < NUM_TOKENS
    poison(folder, broken)
    # Of a large tensor, not every number is looked at before training.
    monkeypatch.setattr("truetune.model.whole._require_finite", lambda *_, **__: None)
    data = write_rows(tmp_path / "rows.jsonl", [*sums(11), {"prompt": "Z", "completion": "z"}])
    shown = command(
        *("train", folder, data, "-o", tmp_path / "run", "--max-steps", "12", "--batch-size", "1"),
        *("--save-steps", "1", "--save-total-limit", "9", "--seed", "3", "--learning-rate", "1e-3"),
    )
    assert shown.code == 1
    assert "error[non-finite]" in shown.err
    assert f"{data}:12" in shown.err
    assert "1 of the step's 1 examples" not in shown.err
    assert "model.embed_tokens.weight" in shown.err
    run = RunDir(tmp_path / "run")
    kept = json.loads(run.file("non_finite_batch.json").read_text())
    (example,) = kept["examples"]
    assert example["where"] == f"{data}:12"
    assert example["text"] == "<|user|>Z<|assistant|>z<|end|>"
    assert len(example["ids"]) == len(example["mask"])
    # The steps before it are whole, and nothing of this one was taken.
    steps = [line["step"] for line in lines(run.file("metrics.jsonl")) if "loss" in line]
    assert kept["step"] == len(steps) + 1
    assert len(steps) >= 1
    weights = load_file(run.checkpoints()[-1] / "model.safetensors")
    finite = {name: torch.isfinite(value).all().item() for name, value in weights.items()}
    assert [name for name, all_finite in finite.items() if not all_finite] == [
        "model.embed_tokens.weight"
    ]
    assert not run.finished
    assert lines(run.file("findings.jsonl"))[-1]["code"] == "non-finite"
