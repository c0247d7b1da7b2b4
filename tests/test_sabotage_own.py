"""The breakages that can occur in truetune's own pipeline: `truetune check` sees them, and the
healthy twins pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.sabotage.house import LLAMA3, House, answer, messages, question, thought

from truetune.listener import Listener
from truetune.recipe.settings import Recipe
from truetune.run.checkup import check_run

HOUSE = House(real=False)
_ROWS = 24


def _model(folder: Path, kind: Any = "instruct", template: str | None = None) -> str:
    tokenizer = HOUSE.tokenizer(kind)
    model = HOUSE.model(tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _data(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _chats(n: int = _ROWS, **kwargs: Any) -> list[dict[str, Any]]:
    return [{"messages": messages(i, **kwargs)} for i in range(n)]


def _loud(found: Any) -> set[str]:
    return {f.code for f in found.findings if f.level != "note"}


def _long(i: int) -> str:
    return answer(i, words=300 if i % 3 == 1 else 9)


# What is broken: how the model, the rows and the settings are, and the code that names it.
BROKEN: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], str]] = {
    "S09 markers of another family": (
        {"template": LLAMA3.replace("{{- bos_token -}}", "")},
        _chats(),
        {},
        "no-stop",
    ),
    "S07 rows beyond the limit": (
        {},
        _chats(reply=_long),
        {"max_length": 200},
        "rows-overlong",
    ),
    "S18 target modules": (
        {},
        _chats(),
        {"lora": True, "target_modules": ["q_proj", "c_attn"]},
        "lora-targets-unmatched",
    ),
    "S19 control tokens in content": (
        {},
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": question(i) + ("<|im_end|>\n<|im_start|>assistant" * (i == 5)),
                    },
                    {"role": "assistant", "content": answer(i)},
                ]
            }
            for i in range(_ROWS)
        ],
        {},
        "control-token-in-content",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_sees_it(name: str, tmp_path: Path) -> None:
    model, rows, settings, code = BROKEN[name]
    recipe = Recipe(
        model=_model(tmp_path / "model", **model),
        data=_data(tmp_path / "rows.jsonl", rows),
        **settings,
    )
    found = check_run(recipe, Listener())
    assert code in _loud(found)


@pytest.mark.parametrize("kind", ["instruct", "base", "thinking", "bos"])
def test_healthy_rows_pass(kind: Any, tmp_path: Path) -> None:
    """S02, S04, S06, S10 and S12 cannot be built: the contract closes answers, adds the stop,
    writes the begin token once, trains each turn on its own prompt and encodes answers behind
    fixed prompts."""
    reply = thought if kind == "thinking" else answer
    recipe = Recipe(
        model=_model(tmp_path / "model", kind),
        data=_data(tmp_path / "rows.jsonl", _chats(turns=2, reply=reply)),
    )
    found = check_run(recipe, Listener())
    assert found.ok, [f.lines() for f in found.findings]


def test_rows_held_out_by_the_user_that_are_trained_as_well(tmp_path: Path) -> None:
    rows = _chats()
    recipe = Recipe(
        model=_model(tmp_path / "model"),
        data=_data(tmp_path / "rows.jsonl", rows),
        eval_data=_data(tmp_path / "eval.jsonl", rows[:6]),
    )
    assert "eval-overlaps-train" in _loud(check_run(recipe, Listener()))


# What stops `truetune train`: the model, the rows and the options, and the code.
STOPPED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str], str]] = {
    "S05 the end token's row was never trained": (
        *({"untrained": True}, _chats(), ["--lora"]),
        "rows-untrained",
    ),
    "S07 a limit that cuts answers": (
        *({}, _chats(reply=_long)),
        ["--max-length", "200"],
        "rows-overlong",
    ),
    "S09 markers of another family": (
        {"template": LLAMA3.replace("{{- bos_token -}}", "")},
        *(_chats(), [], "no-stop"),
    ),
}


def _untrain_the_end(folder: Path) -> None:
    """The end token's row is that of a token that nothing was trained on."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    end = HOUSE.tokenizer().convert_tokens_to_ids("<|im_end|>")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # Tables of a trained model: random ones say nothing of a row.
        tensors[name] *= 1 + (torch.arange(len(tensors[name])) % 7)[:, None] / 3
        tensors[name][end] = tensors[name][-1]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", STOPPED)
def test_train_stops_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from truetune.cli.verbs import main

    made, rows, words, code = STOPPED[name]
    untrained = bool(made.get("untrained"))
    model = _model(tmp_path / "model", template=made.get("template"))
    if untrained:
        _untrain_the_end(Path(model))
    data = _data(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        main(["train", model, data, "-o", str(run), "--max-steps", "1", *words])
    assert left.value.code == 1
    told = capsys.readouterr()
    assert f"error[{code}]" in told.out + told.err
    assert not run.exists()
