"""Tasks of lm-evaluation-harness: asked through the contract, held to the harness's own model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import truetune
from tiny_models import write_model
from tiny_runs import command
from truetune.errors import UsageError
from truetune.lab import base_path

HERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HERE, reason="needs lm-evaluation-harness: pip install 'truetune[eval]'"
)

DOCS = [
    {"question": f"What is the {what} of Carthel?", "choices": [a, b], "gold": gold}
    for what, a, b, gold in (
        ("river", "Gunnow", "Flemble", 0),
        ("ruler", "Yoson", "Jailette", 1),
        ("animal", "eagle", "the red fox of the hills", 0),
        ("banner", "black", "coral", 1),
        ("craft", "ropemaking", "carving", 0),
        ("food", "dumplings", "soup", 1),
        ("hill", "Ossel", "Mard", 0),
    )
]
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
fewshot_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
CHOICES = """task: own_choices
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
OPEN = """task: own_open
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [" of", "."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
ROLLING = """task: own_text
output_type: loglikelihood_rolling
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, str]:
    """Files of tasks that need no network."""
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS), encoding="utf-8")
    files = {}
    for name, own in (("choices", CHOICES), ("open", OPEN), ("rolling", ROLLING)):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(own + COMMON.format(docs=docs), encoding="utf-8")
    return {name: str(file) for name, file in files.items()}


def test_without_the_harness_it_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    with pytest.raises(UsageError) as caught:
        truetune.evaluate_tasks("embedded", "arc_easy", quiet=True)
    assert caught.value.code == "extra-missing"
    assert "truetune[eval]" in caught.value.why


@needs_harness
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["embedded", "--tasks", "none.yaml"], "task-missing"),
        (["embedded", "--tasks", ","], "no-task"),
        (["none/at/all", "--tasks", "choices.yaml"], "model-not-found"),
        (["model.gguf", "--tasks", "choices.yaml"], "tasks-need-weights"),
        (["http://127.0.0.1:9", "--tasks", "choices.yaml"], "tasks-need-weights"),
        (["embedded", "embedded", "--tasks", "choices.yaml"], "model-twice"),
        (["embedded", "--tasks", "choices.yaml", "--data", "docs.jsonl"], "evaluation-setting"),
        (["embedded", "--tasks", "choices.yaml", "--samples", "4"], "evaluation-setting"),
        (["embedded", "--tasks", "choices.yaml", "--limit", "0"], "evaluation-setting"),
        (["embedded", "--tasks", "broken.yaml"], "task-unusable"),
        (["embedded", "--tasks", "elsewhere.yaml"], "task-unusable"),
    ],
)
def test_wrong_input_is_refused_in_words(
    tasks: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("task: broken\noutput_type: multiple_choice\n")
    Path("elsewhere.yaml").write_text(CHOICES + COMMON.format(docs="nowhere.jsonl"))
    shown = command("eval", *words)
    assert (shown.code, shown.out) == (2, "")
    assert f"error[{code}]" in shown.err
    assert "Traceback" not in shown.err


@needs_harness
def test_a_name_that_the_harness_does_not_know() -> None:
    shown = command("eval", "embedded", "--tasks", "arc_eazy")
    assert shown.code == 2
    assert "error[task-missing]" in shown.err
    assert "arc_easy" in shown.err


@needs_harness
def test_the_raw_prompt_is_what_the_harness_itself_asks(tasks: dict[str, str]) -> None:
    """The same numbers as lm-evaluation-harness's own model of the same weights."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
    loaded = TaskManager(include_defaults=False).load(list(tasks.values()))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=1)
        task.set_fewshot_seed(seed=0)
    expected = evaluate(theirs, loaded, bootstrap_iters=0)
    assert expected is not None
    found = truetune.evaluate_tasks("embedded", list(tasks.values()), shots=1, quiet=True)
    samples = found["embedded"].samples["raw prompt"]
    for task in ("own_choices", "own_open"):
        assert [s["arguments"] for s in samples[task]] == [
            s["arguments"] for s in expected["samples"][task]
        ]
    for ours, other in zip(samples["own_choices"], expected["samples"]["own_choices"], strict=True):
        for (a, greedy), (b, as_greedy) in zip(
            ours["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert a == pytest.approx(b, abs=2e-4)
            assert greedy == as_greedy
    assert [s["resps"] for s in samples["own_open"]] == [
        s["resps"] for s in expected["samples"]["own_open"]
    ]
    mine = {(m.task, m.metric): s for m, s in zip(found.metrics, _scores(found), strict=True)}
    for task, metric in (
        ("own_choices", "acc"),
        ("own_choices", "acc_norm"),
        ("own_open", "exact_match"),
        ("own_text", "word_perplexity"),
    ):
        assert mine[task, metric].value == pytest.approx(
            expected["results"][task][f"{metric},none"], rel=1e-4
        )


def _scores(found: Any) -> Any:
    return found["embedded"].scores["raw prompt"]


@needs_harness
def test_the_served_prompt_is_the_contracts(tasks: dict[str, str]) -> None:
    """What is scored stands right behind the served prompt, in the ids that are trained."""
    from truetune.compare import row_losses
    from truetune.model.load import load_model

    found = truetune.evaluate_tasks("embedded", tasks["choices"], shots=1, quiet=True)
    contract = truetune.PromptContract.load(str(base_path()))
    loaded = load_model(str(base_path()), device="cpu", purpose="inference")
    for sample in found["embedded"].samples["as served"]["own_choices"]:
        asked = f"Question: {sample['doc']['question']}\nAnswer:"
        for choice, (text, continuation), (score, _) in zip(
            sample["doc"]["choices"], sample["arguments"], sample["filtered_resps"], strict=True
        ):
            assert text.endswith(contract.prompt_text([{"role": "user", "content": asked}]))
            # One worked example: a question and its answer, as turns before.
            assert text.count("Question:") == 2
            assert continuation == choice
            ids = contract.tokens.encode([text])[0]
            more = contract.tokens.encode_completion(ids, choice)
            mask = [0] * len(ids) + [1] * len(more)
            assert score == pytest.approx(-row_losses(loaded, [([*ids, *more], mask)])[0], abs=2e-4)


@needs_harness
def test_models_side_by_side_on_the_screen_and_for_programs(
    tasks: dict[str, str], tmp_path: Path
) -> None:
    other = str(write_model(tmp_path / "other"))
    out = tmp_path / "out.jsonl"
    named = f"{tasks['choices']},{tasks['open']}"
    words = ["eval", "embedded", other, "--tasks", named, "--limit", "6"]
    shown = command(*words, "-o", str(out))
    assert (shown.code, shown.err) == (0, "")
    for part in ("own_choices: acc, %, 6 documents", "as served", "raw prompt", "against first"):
        assert part in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    written = [json.loads(line) for line in out.read_text().splitlines()]
    # Two tasks of six documents, two models, two ways of asking.
    assert len(written) == 2 * 6 * 2 * 2
    assert {line["asked"] for line in written} == {"as served", "raw prompt"}
    again = command(*words, "--json")
    facts = json.loads(again.out)
    first, second = facts["models"]
    assert [m["metric"] for m in first["metrics"]] == ["acc", "acc_norm", "exact_match"]
    assert first["metrics"][0]["documents"] == 6
    assert first["metrics"][0]["against_first"] is None
    assert second["metrics"][0]["against_first"]["word"] in ("better", "worse", "inconclusive")
    assert 0 <= first["metrics"][0]["served"]["value"] <= 1


@needs_harness
def test_prompts_beyond_the_context_are_cut_in_front_and_counted(
    tasks: dict[str, str], tmp_path: Path
) -> None:
    long = tmp_path / "docs.jsonl"
    text = "The river of Carthel runs through the town. " * 300
    long.write_text(json.dumps({**DOCS[0], "question": text}) + "\n", encoding="utf-8")
    found = truetune.evaluate_tasks("embedded", tasks["choices"], quiet=True)
    assert any("longer than the context" in note for note in found["embedded"].notes)
