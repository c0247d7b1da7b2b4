"""Settings: every spelling, every source, every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from truetune.cli.options import canonical
from truetune.errors import InputError, RecipeError
from truetune.recipe.settings import Recipe, setting_names, settings
from truetune.recipe.sources import make_recipe, read_recipe, recorded_recipe

# One value of each setting, as YAML has it and as the command line has it.
VALUES: dict[str, tuple[Any, str]] = {
    "model": ("some/model", "some/model"),
    "data": ("rows.jsonl", "rows.jsonl"),
    "revision": ("v2", "v2"),
    "split": ("test", "test"),
    "schema": ("alpaca", "alpaca"),
    "columns": ({"prompt": "q", "completion": "a"}, "prompt=q, completion=a"),
    "bad_rows": ("drop", "drop"),
    "max_train_samples": (7, "7"),
    "eval_data": ("held.jsonl", "held.jsonl"),
    "eval_split": ("dev", "dev"),
    "chat_template": ("chatml-lite", "chatml-lite"),
    "stop": (["<|a|>", "<|b|>"], "<|a|>,<|b|>"),
    "loss_on": ("last", "last"),
    "template_arg": ({"enable_thinking": False}, "enable_thinking=false"),
    "reasoning": ("inline", "inline"),
    "think_markers": (["<r>", "</r>"], "<r>,</r>"),
    "history": ("no-reasoning", "no-reasoning"),
    "merge_system": (True, "true"),
    "template_words": ("keep", "keep"),
    "content_specials": ("error", "error"),
    "date": ("2026-11-20", "2026-11-20"),
    "lora": (True, "true"),
    "lora_r": (8, "8"),
    "lora_alpha": (4.5, "4.5"),
    "lora_dropout": (0.1, "0.1"),
    "target_modules": (["q_proj", "v_proj"], "q_proj, v_proj"),
    "rslora": (True, "true"),
    "dora": (True, "true"),
    "qlora": (True, "true"),
    "load_in_8bit": (True, "true"),
    "add_token": (["<think>"], "<think>"),
    "full_fingerprint": (True, "true"),
    "max_length": (128, "128"),
    "overlong": ("truncate-prompt", "truncate-prompt"),
    "max_dropped": (0.5, "0.5"),
    "epochs": (1.5, "1.5"),
    "max_steps": (9, "9"),
    "batch_size": (8, "8"),
    "tokens_per_step": (4096, "4096"),
    "micro_batch_size": (4, "4"),
    "micro_batch_tokens": (512, "512"),
    "packing": (False, "false"),
    "gradient_accumulation_steps": (2, "2"),
    "learning_rate": (1e-4, "1e-4"),
    "any_learning_rate": (True, "true"),
    "warmup_ratio": (0.1, "0.1"),
    "warmup_steps": (3, "3"),
    "lr_scheduler_type": ("linear", "linear"),
    "weight_decay": (0.01, "1e-2"),
    "max_grad_norm": (0.0, "0"),
    "optim": ("sgd", "sgd"),
    "gradient_checkpointing": (True, "true"),
    "seed": (1, "1"),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "eval_steps": (5, "5"),
    "save_steps": (6, "6"),
    "save_total_limit": (3, "3"),
    "logging_steps": (2, "2"),
    "keep_text": ("prose.txt", "prose.txt"),
    "patience": (3, "3"),
    "on_collapse": ("rewind", "rewind"),
    "report_to": (["tensorboard", "wandb"], "tensorboard,wandb"),
    "output": ("runs/x", "runs/x"),
    "overwrite": (True, "true"),
    "verify": (False, "false"),
    "no_check": (True, "true"),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_table_above_names_every_setting() -> None:
    assert set(VALUES) == set(setting_names())


@pytest.mark.parametrize("name", list(VALUES))
def test_each_setting_comes_from_yaml_and_from_text(tmp_path: Path, name: str) -> None:
    value, text = VALUES[name]
    file = write(tmp_path / "r.yaml", yaml.safe_dump({name: value}))
    from_file = make_recipe(("r.yaml", read_recipe(file)))
    from_line = make_recipe(("command line", {name: text}))
    assert getattr(from_file, name) == getattr(from_line, name) == value
    assert getattr(Recipe(), name) != value
    assert type(getattr(from_file, name)) is type(getattr(from_line, name))
    assert from_file.origin(name) == "r.yaml"
    assert from_line.origin(name) == "command line"
    assert from_line.given(name)
    assert not from_line.given("model" if name != "model" else "data")


@pytest.mark.parametrize(
    ("alias", "name"),
    [(alias, field.name) for field in settings() for alias in field.metadata["aliases"]],
)
def test_other_spellings(alias: str, name: str) -> None:
    value, text = VALUES[name]
    assert getattr(make_recipe(("f", {alias: value})), name) == value
    # On the command line with dashes or underscores, and with = or without.
    for spelled in (f"--{alias}", "--" + alias.replace("_", "-")):
        wanted = "--" + name.replace("_", "-")
        assert canonical([spelled, text]) == [wanted, text]
        assert canonical([f"{spelled}={text}"]) == [f"{wanted}={text}"]


def test_the_aliases_that_people_type() -> None:
    aliases = {alias for field in settings() for alias in field.metadata["aliases"]}
    assert {
        "per_device_train_batch_size",
        "num_train_epochs",
        "lr",
        "model_name_or_path",
        "output_dir",
        "max_seq_length",
    } <= aliases


def test_later_sources_win_and_origins_tell() -> None:
    recipe = make_recipe(
        ("r.yaml", {"learning_rate": 1e-3, "seed": 1, "lora": True}),
        ("command line", {"lr": "5e-5", "lora": False}),
    )
    assert (recipe.learning_rate, recipe.seed, recipe.lora) == (5e-5, 1, False)
    assert recipe.origin("learning_rate") == recipe.origin("lora") == "command line"
    assert recipe.origin("seed") == "r.yaml"
    assert recipe.origin("epochs") == "default"


def test_epochs_of_a_recipe_give_way_to_steps_of_the_command_line() -> None:
    recipe = make_recipe(
        ("r.yaml", {"epochs": 3, "warmup_ratio": 0.1}),
        ("command line", {"max_steps": 5, "warmup_steps": 1}),
    )
    assert (recipe.epochs, recipe.max_steps) == (None, 5)
    assert (recipe.warmup_ratio, recipe.warmup_steps) == (None, 1)
    assert not recipe.given("epochs")


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_scientific_notation_in_yaml(tmp_path: Path, written: str) -> None:
    # PyYAML reads 1e-4 as text.
    file = write(tmp_path / "r.yaml", f"learning_rate: {written}\n")
    assert make_recipe(("f", read_recipe(file))).learning_rate == 1e-4


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "max_length", "max_steps", "stop", "target_modules", "batch_size", "epochs"],
)
def test_auto_is_as_if_nobody_had_set_it(name: str) -> None:
    value = VALUES[name][0]
    recipe = make_recipe(("r.yaml", {name: value}), ("command line", {name: "auto"}))
    assert getattr(recipe, name) is None
    assert not recipe.given(name)


def test_auto_stays_where_it_is_a_value() -> None:
    recipe = make_recipe(("f", {"device": "auto", "dtype": "auto", "schema": "auto"}))
    assert (recipe.device, recipe.dtype, recipe.schema) == ("auto", "auto", "auto")


def test_null_sets_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "learning_rate: null\nlora_r:\n")
    recipe = make_recipe(("f", read_recipe(file)))
    assert recipe == Recipe()


def test_value_and_origin_are_read_back(tmp_path: Path) -> None:
    values = {name: value for name, (value, _) in VALUES.items() if name != "max_steps"}
    others = ("warmup_steps", "load_in_8bit", "tokens_per_step")
    values = {k: v for k, v in values.items() if k not in others}
    recipe = make_recipe(("a.yaml", {"seed": 5}), ("command line", values))
    derived = Recipe(
        **{**values, "max_steps": 9}, origins={**recipe.origins, "max_steps": "default: x"}
    )
    file = write(tmp_path / "recipe.yaml", yaml.safe_dump(derived.rows(), sort_keys=False))
    rows = yaml.safe_load(file.read_text())
    assert list(rows) == list(setting_names())
    assert rows["max_steps"] == {"value": 9, "origin": "default: x"}
    # As input, what was derived is derived again.
    assert read_recipe(file) == values
    # Of the same run, every value keeps its origin.
    again = recorded_recipe(file)
    assert again == recipe
    assert dict(again.origins) == dict(recipe.origins)


def test_a_recorded_recipe_that_was_edited_by_hand(tmp_path: Path) -> None:
    file = write(
        tmp_path / "recipe.yaml",
        "seed: {value: 5, origin: command line}\nlearning_rate: 1e-3\nlora: true\n",
    )
    recipe = recorded_recipe(file)
    assert (recipe.seed, recipe.learning_rate, recipe.lora) == (5, 1e-3, True)
    assert recipe.origin("seed") == "command line"
    assert recipe.origin("lora") == str(file)


def test_local_inputs_are_recorded_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", "{}")
    recipe = make_recipe(("f", {"data": "rows.jsonl", "model": "owner/name", "output": "out"}))
    rows = recipe.rows()
    assert rows["data"]["value"] == str(tmp_path / "rows.jsonl")
    assert rows["model"]["value"] == "owner/name"
    assert rows["output"]["value"] == "out"


def problems(*sources: tuple[str, dict[str, Any]]) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(*sources)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return f"{caught.value.what}\n{caught.value.why}"


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [("lerning_rate", "learning_rate"), ("batch-sise", "batch_size"), ("epoch", "epochs")],
)
def test_unknown_settings(spelled: str, meant: str) -> None:
    text = problems(("my.yaml", {spelled: 1}))
    assert f"unknown setting {spelled!r} in my.yaml" in text
    assert f"did you mean {meant!r}?" in text


def test_an_unknown_setting_like_no_other_gets_no_guess() -> None:
    assert "did you mean" not in problems(("f", {"zzzzzz": 1}))


def test_all_problems_come_in_one_error() -> None:
    text = problems(
        ("my.yaml", {"nope": 1, "lora_r": "x", "epochs": 2, "max_steps": 3}),
        ("command line", {"optim": "adam", "learning_rate": -1}),
    )
    assert text.startswith("5 settings are wrong")
    for part in (
        "unknown setting 'nope' in my.yaml",
        "lora_r must be a whole number, not 'x'",
        "epochs and max_steps",
        "optim must be adamw, adamw_bf16, adamw_8bit, paged_adamw_8bit or sgd, not 'adam'",
        "learning_rate must be above 0",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lora_r", 1.5, "a whole number"),
        ("lora_r", True, "a whole number"),
        ("epochs", True, "a number"),
        ("epochs", "many", "a number"),
        ("lora", "maybe", "true or false"),
        ("loss_on", "prompt", "assistant, last or all"),
        ("stop", 5, "a list of strings"),
        ("columns", "prompt", "pairs such as"),
        ("columns", ["prompt"], "pairs such as"),
        ("model", 5, "text"),
        ("learning_rate", "nan", "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("max_grad_norm", float("inf"), "finite"),
        ("learning_rate", 0, "above 0"),
        ("lora_alpha", 0, "above 0"),
        ("epochs", 0, "above 0"),
        ("lora_dropout", 1, "below 1"),
        ("lora_dropout", -0.1, "at least 0"),
        ("max_dropped", 5, "at most 1"),
        ("warmup_ratio", 1.1, "at most 1"),
        ("max_length", 1, "at least 2"),
        ("max_steps", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**40, "at most"),
        ("save_total_limit", 0, "at least 1"),
    ],
)
def test_wrong_types_and_ranges(name: str, value: Any, told: str) -> None:
    text = problems(("f", {name: value}))
    assert name in text
    assert told in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_r", "8"),
        ("epochs", 2),
        ("lora_dropout", 0),
        ("max_dropped", 1),
        ("warmup_ratio", 0),
        ("max_length", 2),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("lora", "yes"),
        ("weight_decay", 0),
        ("max_grad_norm", 0),
    ],
)
def test_values_at_the_edge_are_right(name: str, value: Any) -> None:
    assert make_recipe(("f", {name: value})).given(name)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"batch_size": 16, "micro_batch_size": 3, "gradient_accumulation_steps": 4}, "= 12"),
        ({"batch_size": "16", "micro_batch_size": "32"}, "is more than"),
        ({"batch_size": 10, "gradient_accumulation_steps": 3}, "cannot be divided into 3"),
        ({"tokens_per_step": 4096, "batch_size": 16}, "both set the size of a step"),
        ({"tokens_per_step": "4096", "gradient_accumulation_steps": 2}, "both set the size"),
        ({"tokens_per_step": 512, "micro_batch_tokens": 513}, "more than tokens_per_step 512"),
    ],
)
def test_contradicting_batch_sizes(sizes: dict[str, Any], told: str) -> None:
    assert told in problems(("f", sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_size": 12, "micro_batch_size": 3, "gradient_accumulation_steps": 4},
        {"batch_size": 16, "micro_batch_size": 16},
        {"batch_size": 10, "micro_batch_size": 4},
        {"batch_size": 10, "gradient_accumulation_steps": 5},
        {"tokens_per_step": 512, "micro_batch_tokens": 512, "micro_batch_size": 3},
    ],
)
def test_agreeing_batch_sizes(sizes: dict[str, Any]) -> None:
    recipe = make_recipe(("f", sizes))
    assert {name: getattr(recipe, name) for name in sizes} == sizes


def test_tokens_of_the_command_line_replace_rows_of_the_file_and_back() -> None:
    rows, tokens = {"batch_size": 8, "gradient_accumulation_steps": 2}, {"tokens_per_step": 512}
    recipe = make_recipe(("file", rows), ("line", tokens))
    assert (recipe.batch_size, recipe.gradient_accumulation_steps) == (None, None)
    recipe = make_recipe(("file", tokens), ("line", {"batch_size": 8}))
    assert (recipe.batch_size, recipe.tokens_per_step) == (8, None)


def test_what_an_optimizer_of_bfloat16_weights_does_not_go_with() -> None:
    told = problems(("f", {"optim": "adamw_bf16", "dora": True, "dtype": "float32"}))
    assert "adamw_bf16 trains all weights" in told
    assert "adamw_bf16 computes in bfloat16" in told
    for others in ({"dtype": "bfloat16"}, {"lora": False}, {}):
        make_recipe(("f", {"optim": "adamw_bf16", **others}))


def test_one_setting_spelled_twice_in_one_source() -> None:
    assert "lr and learning_rate in f are the same setting" in problems(
        ("f", {"lr": 1, "learning_rate": 1})
    )


@pytest.mark.parametrize(
    ("text", "told", "line"),
    [
        ("model: a\n  data: [1\n", "not valid YAML", ":2"),
        ("- a\n- b\n", "not a list of settings", ""),
        ("", "not a list of settings", ""),
        ("just words", "not a list of settings", ""),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, told: str, line: str) -> None:
    file = write(tmp_path / "r.yaml", text)
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert told in caught.value.what
    assert caught.value.where == f"{file}{line}"
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "binary.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot read the recipe"):
            read_recipe(path)


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_recipe(file)


def test_template_arguments_are_json_where_they_can_be() -> None:
    given = ("thinking=false", "effort=low", 'tools=["a", "b"]', "level=3")
    recipe = make_recipe(("command line", {"template_arg": given}))
    assert recipe.template_arg == {
        "thinking": False,
        "effort": "low",
        "tools": ["a", "b"],
        "level": 3,
    }
    with pytest.raises(RecipeError, match="pairs such as enable_thinking=false"):
        make_recipe(("command line", {"template_arg": ("thinking",)}))


def test_an_option_given_twice_adds_up() -> None:
    recipe = make_recipe(("command line", {"stop": ("<|a|>", "<|b|>,<|c|>")}))
    assert recipe.stop == ["<|a|>", "<|b|>", "<|c|>"]
    recipe = make_recipe(("command line", {"columns": ("prompt=q", "completion=a")}))
    assert recipe.columns == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"date": "20. November"}, "YYYY-MM-DD"),
        ({"reasoning": "inline", "think_markers": ["<r>"]}, "think_markers needs two markers"),
        ({"reasoning": "some"}, "reasoning must be auto, inline, empty or drop"),
    ],
)
def test_prompt_settings_that_cannot_hold(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(("recipe.yaml", given))
    assert told in str(caught.value)


def test_yaml_dates_are_dates(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("date: 2026-11-20\n")
    assert make_recipe((str(path), read_recipe(path))).date == "2026-11-20"


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"learning_rate": 5}, True),
        ({"learning_rate": "0.2", "optim": "adamw_8bit"}, True),
        ({"learning_rate": 50, "optim": "sgd"}, True),
        ({"learning_rate": 0.1}, False),
        ({"learning_rate": 5, "optim": "sgd"}, False),
        ({"learning_rate": 5, "any_learning_rate": True}, False),
    ],
)
def test_a_rate_beyond_any_sane_value_needs_consent(given: dict[str, Any], refused: bool) -> None:
    if not refused:
        assert make_recipe(("f", given)).learning_rate == given["learning_rate"]
        return
    with pytest.raises(RecipeError, match="add --any-learning-rate"):
        make_recipe(("f", given))
