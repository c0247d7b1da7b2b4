"""`truetune check MODEL`: finished models and adapters, broken one way each, and sound twins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import TEMPLATE, edit_json, tiny_model, tiny_tokenizer
from truetune.checks import saved_model
from truetune.checks.registry import ask
from truetune.checks.saved_model.checkpoint import Checkpoint, gather
from truetune.cli.verbs import main
from truetune.errors import ModelError
from truetune.findings import Finding
from truetune.model.start import verdict

END, USER, ASSISTANT = 257, 258, 259


def trained(**changes: Any) -> Any:
    """A model whose tables look as training leaves them: rows of many lengths, with a drift."""
    model = tiny_model(**changes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            table = module.weight
            table.mul_(torch.exp(0.4 * torch.randn(len(table), 1)))
            table.add_(0.3 * table.norm(dim=1).mean() / table.shape[1] ** 0.5)
    return model


def write(folder: Path, model: Any = None, template: str | None = TEMPLATE) -> Path:
    (model or trained()).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    # A trainer was here.
    (folder / "trainer_state.json").write_text("{}")
    return folder


def write_adapter(folder: Path, base: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    tiny_tokenizer().save_pretrained(folder)
    return write_adapter(folder, sound, lambda tensors: None)


def judged(found: Checkpoint) -> list[Finding]:
    return list(ask(saved_model, found))


def copied(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def tensors_changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = next(folder.glob("*model.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def set_row(name: str, row: int, like: int) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][row] = tensors[name][like]

    return change


def broken_number(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][5, 3] = float("nan")


def zeroed(tensors: dict[str, Any], names: str = "lora_B") -> None:
    for name, value in tensors.items():
        if names in name:
            value.zero_()


def without_head(tensors: dict[str, Any]) -> None:
    del tensors["lm_head.weight"]


def hollow(tensors: dict[str, Any]) -> None:
    for name in tensors:
        tensors[name] = torch.zeros(0)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def more_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|new{i}|>" for i in range(4)])
    tokenizer.save_pretrained(folder)


def stops(*ids: int) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "generation_config.json", eos_token_id=list(ids))


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)  # type: ignore[return-value]


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


# code -> (level, what breaks it) of full models; then of adapters.
MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tokenizer-missing": ("error", no_tokenizer),
    "template-missing": ("warning", without_template),
    "template-without-end": ("error", template(TEMPLATE.replace("<|end|>", ""))),
    "template-unfaithful": (
        "warning",
        template(TEMPLATE.replace("m.content", "m.content | replace('Answer', 'No')")),
    ),
    "stop-not-served": ("error", stops(256)),
    "stop-beyond-head": ("error", stops(END, 9000)),
    "id-beyond-head": ("error", more_tokens),
    "rows-untrained": ("error", tensors_changed(set_row("model.embed_tokens.weight", END, 262))),
    "weights-not-finite": ("error", tensors_changed(broken_number)),
    "model-weights-missing": ("error", tensors_changed(without_head)),
    "weights-unused": (
        "warning",
        tensors_changed(lambda t: t.update({"model.layers.7.norm.weight": torch.ones(4)})),
    ),
    "model-shape-mismatch": (
        "error",
        tensors_changed(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
    ),
    "weights-zero": (
        "error",
        tensors_changed(lambda t: zeroed(t, "layers.1.mlp.down_proj")),
    ),
    "head-not-tied": (
        "error",
        lambda folder: edit_json(folder / "config.json", tie_word_embeddings=True),
    ),
    "model-no-weights": ("warning", lambda folder: (folder / "model.safetensors").unlink()),
    "model-weights-damaged": (
        "error",
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(20)) and None,
    ),
}
ADAPTERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "adapter-empty": ("error", tensors_changed(zeroed)),
    "adapter-partly-empty": (
        "warning",
        tensors_changed(lambda t: zeroed(t, "layers.1.self_attn.v_proj.lora_B")),
    ),
    "adapter-wrong-base": (
        "error",
        tensors_changed(
            lambda t: t.update(
                {n.replace("layers.1.", "layers.7."): t.pop(n) for n in list(t) if "layers.1" in n}
            )
        ),
    ),
    "lora-targets-unmatched": (
        "warning",
        lambda folder: edit_json(
            folder / "adapter_config.json", target_modules=["q_proj", "v_proj", "c_attn"]
        ),
    ),
    "adapter-incomplete": (
        "warning",
        tensors_changed(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n] and None),
    ),
    "adapter-without-tokenizer": ("note", no_tokenizer),
    "adapter-stop-unread": (
        "warning",
        lambda folder: (
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 256]}))
            and None
        ),
    ),
}
CODES = {*MODELS, *ADAPTERS}


@pytest.mark.parametrize("code", list(MODELS))
def test_broken_models(tmp_path: Path, sound: Path, code: str) -> None:
    level, change = MODELS[code]
    found = judged(gather(str(copied(sound, tmp_path / "m", change))))
    told = [finding for finding in found if finding.code == code]
    assert [finding.level for finding in told] == [level]
    assert told[0].fix
    # One defect, one alarm.
    assert [f.code for f in found if f.level == "error"] == ([code] if level == "error" else [])


@pytest.mark.parametrize("code", list(ADAPTERS))
def test_broken_adapters(tmp_path: Path, adapter: Path, code: str) -> None:
    level, change = ADAPTERS[code]
    found = judged(gather(str(copied(adapter, tmp_path / "a", change))))
    assert [(f.code, f.level) for f in found if f.code == code] == [(code, level)]
    assert [f.code for f in found if f.level == "error"] == ([code] if level == "error" else [])


def test_sound_models_and_adapters_raise_nothing(sound: Path, adapter: Path) -> None:
    assert judged(gather(str(sound))) == []
    assert judged(gather(str(adapter))) == []


def test_hollow_tensors_are_an_empty_adapter(tmp_path: Path, adapter: Path) -> None:
    found = judged(gather(str(copied(adapter, tmp_path / "a", tensors_changed(hollow)))))
    (told,) = [f for f in found if f.code == "adapter-empty"]
    assert "tensors are empty" in told.what


def tied_twice(folder: Path) -> None:
    """The config ties the head, and the file holds the same table under both names."""
    tensors_changed(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(
        folder
    )
    edit_json(folder / "config.json", tie_word_embeddings=True)


def tied_once(folder: Path) -> None:
    """The head is in no file, because it is the embedding."""
    tensors_changed(without_head)(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)


def one_zero_row(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][0].zero_()


def test_a_wrapped_model_that_was_saved_names_the_prefix(tmp_path: Path, sound: Path) -> None:
    def prefixed(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    found = judged(gather(str(copied(sound, tmp_path / "m", tensors_changed(prefixed)))))
    (told,) = [f for f in found if f.level == "error"]
    assert told.code == "model-weights-missing"
    assert "prefix" in told.why
    assert "merge_and_unload" in told.fix


def test_nan_anywhere_is_seen_and_a_broken_template_is_not_called_missing(
    tmp_path: Path, sound: Path
) -> None:
    def infinite(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")

    found = judged(gather(str(copied(sound, tmp_path / "m", tensors_changed(infinite)))))
    assert [f.code for f in found] == ["weights-not-finite"]
    found = judged(gather(str(copied(sound, tmp_path / "t", template("{% if %}")))))
    assert [(f.code, f.level) for f in found] == [("template-unfaithful", "error")]


NEAR = {
    "a head that is the embedding, in the file twice": tied_twice,
    "a head that is the embedding, in the file once": tied_once,
    "a row of zeros": tensors_changed(one_zero_row),
    "two stop ids, one of them unused": stops(END, 256),
    "no generation config, the config says it": lambda folder: (
        folder / "generation_config.json"
    ).unlink(),
    "pad is the end token": lambda folder: edit_json(
        folder / "tokenizer_config.json", pad_token="<|end|>"
    ),
    "an unused row like another": tensors_changed(set_row("model.embed_tokens.weight", 261, 262)),
    "a row of text like another": tensors_changed(set_row("model.embed_tokens.weight", 65, 66)),
}


@pytest.mark.parametrize("name", list(NEAR))
def test_near_misses(tmp_path: Path, sound: Path, name: str) -> None:
    assert judged(gather(str(copied(sound, tmp_path / "m", NEAR[name])))) == []


def test_a_published_base_is_told_and_not_alarmed(tmp_path: Path, sound: Path) -> None:
    """No trainer was here: what a base lacks is a fact, and no mistake."""

    def as_base(folder: Path) -> None:
        (folder / "trainer_state.json").unlink()
        tensors_changed(set_row("lm_head.weight", END, 262))(folder)
        stops(256)(folder)

    gathered = gather(str(copied(sound, tmp_path / "m", as_base)))
    found = {finding.code: finding.level for finding in judged(gathered)}
    assert found == {"rows-untrained": "note", "stop-not-served": "warning"}
    assert gathered.verdict is not None
    assert gathered.verdict.kind == "base"
    assert "'<|end|>'" in gathered.verdict.reasons[0]


def test_the_verdict_goes_by_evidence(tmp_path: Path, sound: Path) -> None:
    whole = gather(str(sound)).verdict
    assert whole is not None
    assert whole.kind == "instruct"
    random = gather(str(write(tmp_path / "random", tiny_model()))).verdict
    assert random is not None
    assert random.kind == "unknown"
    assert "random" in random.reasons[0]
    bare = gather(str(copied(sound, tmp_path / "m", without_template))).verdict
    assert bare is not None
    assert bare.kind == "base"


def test_losses_decide_where_the_model_was_loaded(sound: Path) -> None:
    frame = gather(str(sound)).frame
    assert frame is not None
    known = {"vocabulary": 11.9, "plain": 2.0, "templated": 1.8}
    assert verdict(frame, {}, {**known, "stop": 0.1}).kind == "instruct"
    assert verdict(frame, {}, {**known, "stop": 9.0}).kind == "base"
    assert verdict(frame, {}, {**known, "plain": 11.8, "stop": 11.9}).kind == "unknown"


def test_the_verb(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: Any) -> int:
        with pytest.raises(SystemExit) as left:
            main(["check", *map(str, words)])
        return int(left.value.code or 0)

    assert run(sound) == 0
    assert "ok: nothing found" in capsys.readouterr().out
    broken = copied(sound, tmp_path / "m", stops(256))
    assert run(broken, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert [f["code"] for f in told["findings"]] == ["stop-not-served"]
    assert told["summary"]["verdict"]["kind"] in ("base", "instruct", "unknown")
    assert run(tmp_path / "none") == 2
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        gather(str(tmp_path))
