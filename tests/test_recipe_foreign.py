"""Recipes of other trainers are recognised and translated key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import command
from truetune.recipe.foreign import translated
from truetune.recipe.sources import make_recipe

AXOLOTL: dict[str, Any] = {
    "base_model": "a/base",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "datasets": [{"path": "a/set", "type": "alpaca", "split": "train"}],
    "val_set_size": 0.05,
    "output_dir": "./out",
    "adapter": "qlora",
    "sequence_len": 4096,
    "sample_packing": True,
    "lora_r": 32,
    "lora_target_linear": True,
    "wandb_project": None,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "optimizer": "paged_adamw_8bit",
    "learning_rate": "2e-4",
    "bf16": "auto",
    "flash_attention": True,
    "gradient_checkpointing": "unsloth",
    "special_tokens": {"eos_token": "<|end|>"},
    "my_own_key": 3,
}
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "a/base",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "rows.json",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "output_dir": "saves/x",
    "logging_steps": 10,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine_with_restarts",
    "warmup_ratio": 0.1,
    "bf16": True,
    "report_to": "none",
}
TRL: dict[str, Any] = {
    "model_name_or_path": "a/base",
    "dataset_name": "a/set",
    "dataset_train_split": "train",
    "use_peft": True,
    "lora_target_modules": ["q_proj"],
    "max_length": 1024,
    "per_device_train_batch_size": 4,
    "max_steps": -1,
    "num_train_epochs": 2,
    "assistant_only_loss": True,
    "eos_token": "<|im_end|>",
    "report_to": ["wandb", "swanlab"],
    "output_dir": "out",
}


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        (
            "Axolotl",
            AXOLOTL,
            {
                "model": "a/base", "data": "a/set", "schema": "alpaca", "qlora": True,
                "lora_r": 32, "max_length": 4096, "micro_batch_size": 2, "learning_rate": 2e-4,
                "gradient_accumulation_steps": 4, "optim": "paged_adamw_8bit", "epochs": 1,
                "dtype": "bfloat16", "gradient_checkpointing": True, "stop": ["<|end|>"],
            },
        ),
        (
            "LLaMA-Factory",
            LLAMA_FACTORY,
            {
                "model": "a/base", "data": "rows.json", "lora": True, "lora_r": 8,
                "max_length": 2048, "max_train_samples": 1000, "overwrite": True,
                "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "epochs": 3.0,
            },
        ),
        (
            "TRL",
            TRL,
            {
                "model": "a/base", "data": "a/set", "split": "train", "lora": True,
                "target_modules": ["q_proj"], "loss_on": "assistant", "stop": ["<|im_end|>"],
                "report_to": ["wandb"], "epochs": 2,
            },
        ),
    ],
)  # fmt: skip
def test_a_foreign_recipe_becomes_one_of_ours(
    tool: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = translated(given)
    assert found is not None
    assert found.tool == tool
    assert {key: found.settings.get(key) for key in expected} == expected
    # Every key of theirs has a line, and what is made of it is a recipe that ours takes.
    named = [line.partition(":")[0] for line, _ in found.lines]
    # What they leave at their default of 1 is said too: ours would cut the default batch.
    assert [n for n in named if n != "gradient_accumulation_steps" or n in given] == list(given)
    recipe = make_recipe(("translated", yaml.safe_load(found.recipe())))
    assert recipe.model == "a/base"
    assert "max_steps" not in found.settings


def test_nothing_is_lost_between_the_lines() -> None:
    """A second data set, and the size of a batch that theirs cuts into nothing."""
    sets = [{"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl"}]
    found = translated({"base_model": "x", "datasets": sets, "micro_batch_size": 2})
    assert found is not None
    assert any("b.jsonl" in line and "no counterpart" in said for line, said in found.lines)
    recipe = make_recipe(("translated", yaml.safe_load(found.recipe())))
    assert (recipe.micro_batch_size, recipe.gradient_accumulation_steps) == (2, 1)


def test_what_has_no_counterpart_is_said() -> None:
    found = translated(AXOLOTL)
    assert found is not None
    said = dict(found.lines)
    assert said["my_own_key: 3"] == "no counterpart"
    assert said["flash_attention: true"].startswith("not needed")


@pytest.mark.parametrize(
    "ours",
    [
        {"model": "m", "data": "d", "lora": True, "learning_rate": 1e-4},
        {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "num_train_epochs": 1},
        {"modle": "m"},
        {},
    ],
)
def test_recipes_of_ours_are_left_alone(ours: dict[str, Any]) -> None:
    assert translated(ours) is None


def test_the_command_line_prints_the_translation(tmp_path: Path) -> None:
    path = tmp_path / "axolotl.yaml"
    path.write_text(yaml.safe_dump(AXOLOTL, sort_keys=False))
    shown = command("train", path)
    assert shown.code == 2
    assert "error[foreign-recipe]: the recipe was written for Axolotl" in shown.err
    assert "adapter: qlora" in shown.err
    assert "qlora: true" in shown.err
    assert "did you mean" not in shown.err


def test_names_of_a_list_of_data_sets_are_no_paths() -> None:
    found = translated(LLAMA_FACTORY | {"dataset": "identity,alpaca_en_demo"})
    assert found is not None
    assert "data" not in found.settings
    assert "dataset_info.json" in found.table()
    # What is left to be given stands in the recipe, which is refused as long as it is not.
    assert found.recipe().endswith("data:  # a file, or a Hub id")
    assert yaml.safe_load(found.recipe())["data"] is None


@pytest.mark.parametrize("given", [AXOLOTL, LLAMA_FACTORY, TRL])
def test_the_translation_fits_a_terminal(given: dict[str, Any]) -> None:
    """Behind the nine columns of an error's label."""
    found = translated(given | {"output_dir": "saves/" + "x" * 20, "deepspeed": "ds.json"})
    assert found is not None
    assert max(map(len, found.table().splitlines())) <= 71
