"""The verbs as functions: the options' names, one mechanism with the command line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import truetune
from fresh_process import in_this_process  # noqa: F401  (a fixture)
from tiny_models import write_model
from tiny_runs import command, sums, write_rows
from truetune.recipe.settings import setting_names
from truetune.recipe.spelling import in_python

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facade")
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl", sums(12))
    return folder


def settings_of(run: Path) -> dict[str, Any]:
    found = yaml.safe_load((run / "recipe.yaml").read_text())
    return {name: row["value"] for name, row in found.items() if name != "output"}


def test_a_run_by_keywords_is_the_run_of_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = truetune.train(
        place / "tiny", place / "rows.jsonl", lora=True, max_steps=2, stop=["<|end|>"],
        output=tmp_path / "mine", quiet=True,
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    theirs = tmp_path / "theirs"
    words = ["--lora", "--max-steps", "2", "--stop", "<|end|>", "-o", theirs]
    assert command("train", place / "tiny", place / "rows.jsonl", *words).code == 0
    assert settings_of(tmp_path / "mine") == settings_of(theirs)
    origins = yaml.safe_load((tmp_path / "mine" / "recipe.yaml").read_text())
    assert origins["lora"]["origin"] == "argument"
    assert "2 steps, loss" in repr(result)
    assert result.verdict is not None
    assert truetune.verify(tmp_path / "mine").passed
    merged = truetune.export(tmp_path / "mine", tmp_path / "merged", quiet=True)
    assert (merged.folder / "model.safetensors").is_file()
    assert "merged onto the base's original weights" in repr(merged)
    talk = truetune.chat(tmp_path / "mine", max_new_tokens=4)
    answer = talk("1+1?")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"] == answer
    assert "1+1?" in repr(talk)
    assert truetune.chat(tmp_path / "mine", "1+1?", max_new_tokens=4) == answer


def test_the_screen_is_shown_unless_quiet(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truetune.train(place / "tiny", place / "rows.jsonl", max_steps=1, output=tmp_path / "run")
    assert "reading the rows" in capsys.readouterr().out


def test_check_and_inspect_print_well(place: Path) -> None:
    found = truetune.check(place / "tiny", place / "rows.jsonl", lora=True, quiet=True)
    assert repr(found).splitlines()[-1].startswith("ok: ")
    facts = truetune.inspect(place / "tiny")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert "architecture" in repr(facts)
    assert facts._repr_html_().startswith("<pre>")


def test_inspect_shows_rows_as_they_are_trained(place: Path, tmp_path: Path) -> None:
    """Every option of the command line is a keyword argument."""
    rows = truetune.inspect(place / "tiny", data=place / "rows.jsonl", row=2, ids=True)
    assert [view.number for view in rows.views] == [2]
    assert "row 2 of" in repr(rows)
    assert rows._repr_html_().startswith("<!")
    page = tmp_path / "rows.html"
    many = truetune.inspect(place / "tiny", place / "rows.jsonl", html=page, loss_on="last")
    assert len(many.views) > 1
    assert page.read_text(encoding="utf-8").startswith("<!")


def test_the_embedded_base_has_a_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert truetune.inspect("embedded")["num_layers"] == 6
    # A folder of one's own with that name wins.
    (tmp_path / "embedded").symlink_to(place / "tiny")
    assert truetune.inspect("embedded")["num_layers"] != 6


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda p: truetune.inspect(p / "tiny", row=1), "rows-without-data"),
        (lambda p: truetune.inspect(p / "tiny", p / "rows.jsonl", row=10**6), "no-such-row"),
        (lambda p: truetune.train(p / "no", p / "rows.jsonl", output="x"), "model-not-found"),
        (lambda p: truetune.train(p / "tiny", p / "rows.jsonl", lorra=True), "recipe"),
        (lambda p: truetune.train(p / "tiny", [{"prompt": "a"}], output="x"), "not-a-path"),
        (lambda p: truetune.chat(p / "tiny", chat_template=5), "not-a-path"),
        (lambda p: truetune.train(p / "tiny", p / "rows.jsonl", learning_rate=5.0), "recipe"),
        (lambda p: truetune.train(resume=p / "no", lora=True), "resume-with-settings"),
        (lambda p: truetune.check(p / "tiny", p / "no.jsonl"), "no-such-file"),
        (lambda p: truetune.chat(p / "no"), "model-not-found"),
        (lambda p: truetune.export(p / "tiny", p / "x", onto="sand"), "export-onto"),
        (lambda p: truetune.evaluate(p / "no", p / "rows.jsonl"), "model-not-found"),
        (lambda p: truetune.evaluate(p / "tiny", p / "rows.jsonl", match="x"), "match-unknown"),
    ],
)
def test_errors_are_those_of_the_command_line(place: Path, call: Any, code: str) -> None:
    with pytest.raises(truetune.TruetuneError) as caught:
        call(place)
    assert caught.value.code == code


def test_files_are_given_as_paths(place: Path, tmp_path: Path) -> None:
    """Whatever is a file on the command line may be a Path."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        encoding="utf-8",
    )
    model, rows = place / "tiny", place / "rows.jsonl"
    given: dict[str, Any] = {"chat_template": template}
    found = truetune.evaluate(
        model, rows, **given, limit=2, max_new_tokens=2, match="none", quiet=True
    )
    assert found.as_dict()["settings"]["chat_template"] == str(template)
    assert str(template) in truetune.inspect(model, **given)["template"]
    assert "[user] " in repr(truetune.inspect(model, rows, **given))
    assert truetune.chat(model, **given).contract.prompt_text([]) == "[assistant] "
    assert truetune.PromptContract.load(model, template).prompt_text([]) == "[assistant] "
    adapter = truetune.train(
        model, rows, lora=True, max_steps=1, output=tmp_path / "run", quiet=True, **given
    ).artifact
    assert truetune.verify(adapter, base=model).passed


@pytest.mark.parametrize("verb", ["train", "check"])
def test_every_setting_is_a_keyword(verb: str) -> None:
    parameters = inspect.signature(getattr(truetune, verb)).parameters
    assert set(setting_names()) <= set(parameters)
    assert parameters["lora_r"].default == 16


def test_a_room_of_the_same_name_does_not_take_the_functions_place() -> None:
    import truetune.checks.fit
    import truetune.exporting.merged
    import truetune.verification.artifact

    for name in ("check", "verify", "export"):
        assert inspect.isfunction(getattr(truetune, name))
    assert truetune.verification.artifact.__name__ == "truetune.verification.artifact"


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("raise --max-length 512, or give --lora", "raise max_length=512, or give lora=True"),
        ("leave them out with --bad-rows drop", "leave them out with bad_rows='drop'"),
        ("--no-packing pads them", "packing=False pads them"),
        ("leave --add-token out", "leave add_token out"),
        ("use --to gguf, or --limit 5", "use to='gguf', or limit=5"),
        ("--epochs 9 (this run: 3)", "epochs=9 (this run: 3)"),
        ("truetune train --resume runs/a", "truetune train --resume runs/a"),
        ("hf download a/b --repo-type dataset", "hf download a/b --repo-type dataset"),
    ],
)
def test_messages_name_arguments(option: str, argument: str) -> None:
    assert in_python(option) == argument


def test_errors_and_findings_name_arguments(place: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*sums(5), '{"prompt": "a", "completion": NaN}'])
    with pytest.raises(truetune.TruetuneError) as caught:
        truetune.train(place / "tiny", rows, output=tmp_path / "run", quiet=True)
    assert "bad_rows='drop'" in caught.value.fix
    assert "--" not in str(caught.value)
    found = truetune.check(place / "tiny", rows, max_length=2, bad_rows="drop", quiet=True)
    told = " ".join(finding.fix for finding in found.findings)
    assert "max_length=" in told
    assert "--" not in told
