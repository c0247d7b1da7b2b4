"""The rehearsal and the estimate: what they measure, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from test_check_checkpoint import END, set_row, tensors_changed, trained
from test_check_verb import answer, write_rows
from tiny_models import tiny_tokenizer
from truetune.checks.fit import RunShape, estimate, layer_speed, run_shape, undisturbed
from truetune.compute.memory import Footprint
from truetune.contract.frame import Frame
from truetune.findings import gib
from truetune.listener import Listener
from truetune.model.start import verdict
from truetune.recipe.plan import Plan
from truetune.recipe.settings import Recipe
from truetune.recipe.sources import make_recipe
from truetune.run.checkup import Checkup, check_run, start_differs
from truetune.run.prepare import survey


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearse")
    write_rows(folder / "rows.jsonl", [answer(i) for i in range(12)])
    trained(max_position_embeddings=512).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder


def recipe(place: Path, **settings: Any) -> Recipe:
    given = {"model": str(place / "model"), "data": str(place / "rows.jsonl")}
    return make_recipe(("test", given | settings))


def checked(place: Path, **settings: Any) -> Checkup:
    return check_run(recipe(place, **settings), Listener(), with_smoke_test=True)


def test_base_or_instruct_by_what_the_model_predicts(place: Path) -> None:
    """Random layers guess: nothing can be told. What predicts its stop is an instruct model."""
    from truetune.model.load import load_model
    from truetune.run.smoke_test import chat_losses

    found = checked(place)
    assert found.summary["verdict"]["kind"] == "unknown"
    prepared = survey(recipe(place), Listener()).prepared
    loaded = load_model(place / "model", device="cpu")
    before = chat_losses(loaded, prepared.contract)
    assert before["vocabulary"] == pytest.approx(5.6, abs=0.2)
    assert before["stop"] == pytest.approx(before["vocabulary"], rel=0.3)
    # The end token everywhere: its loss falls, that of words rises.
    row = loaded.model.lm_head.weight
    loaded.model.lm_head.register_forward_hook(
        lambda m, i, out: out + 9 * torch.nn.functional.one_hot(torch.tensor(END), len(row))
    )
    after = chat_losses(loaded, prepared.contract)
    assert after["stop"] < 1 < before["stop"]
    assert after["templated"] > before["templated"]


@pytest.mark.parametrize(
    ("stop", "given", "level"),
    # The model writes its end, or it does not; what it predicts otherwise is that of a chat model.
    [
        (0.1, {"size": 10**9}, None),
        (9.0, {"size": 10**9}, "warning"),
        (9.0, {"size": 10**9, "learning_rate": 1e-4}, "note"),
        # Of so small a model the rate is one and the same.
        (9.0, {"size": 10**7}, "note"),
    ],
)
def test_weights_that_tell_another_start_than_the_template(
    place: Path, stop: float, given: dict[str, Any], level: str | None
) -> None:
    """The plan goes by the template; where weights answer otherwise, one finding says so."""
    size = given["size"]
    rate_given = {name: value for name, value in given.items() if name != "size"}
    plan = survey(recipe(place, lora=True, **rate_given), Listener()).prepared.plan
    assert plan.start == "instruct"
    tokenizer = tiny_tokenizer()
    losses = {"vocabulary": 5.6, "plain": 2.0, "templated": 1.8, "stop": stop}
    judged = verdict(Frame.probe(tokenizer, stop_ids=[END]), {}, losses)
    told = list(start_differs(judged, plan, size))
    assert [finding.level for finding in told] == ([level] if level else [])
    if told:
        assert told[0].code == "start-differs"
        rate = "2e-4" if size > 10**8 else "3e-3"
        assert told[0].fix == f"use --learning-rate {rate} --epochs 3"
    assert list(start_differs(verdict(Frame.probe(tokenizer, stop_ids=[END])), plan, size)) == []


@pytest.mark.parametrize("lora", [False, True])
def test_a_sound_run_rehearses_in_silence(place: Path, lora: bool) -> None:
    before = sorted(p.name for p in place.rglob("*"))
    found = checked(place, lora=lora)
    assert [f for f in found.findings if f.level != "note"] == []
    numbers = found.summary["rehearsal"]
    # Two ways of one step, in float32.
    assert numbers["loss_difference"] < 1e-5
    assert numbers["gradient_difference"] < 1e-4
    assert numbers["unmoved_tensors"] == 0
    assert numbers["reload_difference"] < 1e-4
    # The time of the run is that of a step that was taken.
    per_token, seconds = numbers["seconds_per_token"], found.summary["plan"]["seconds"]
    train, run = found.summary["run"]["train"], found.summary["run"]
    whole = per_token * train["tokens"] / train["examples"] * run["batch_size"] * run["max_steps"]
    assert seconds == pytest.approx(whole, rel=1e-3)
    assert sorted(p.name for p in place.rglob("*")) == before


def test_a_rate_that_overshoots(place: Path) -> None:
    codes = {
        f.code: f.level for f in checked(place, learning_rate=10.0, any_learning_rate=True).findings
    }
    assert codes["step-overshoots"] == "warning"
    assert codes["learning-rate-unusual"] == "warning"


def test_weights_that_hold_nan(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    # Of a large tensor, not every number is looked at before training.
    monkeypatch.setattr("truetune.model.whole._require_finite", lambda *_, **__: None)

    shutil.copytree(place, tmp_path / "p")

    def broken(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")

    tensors_changed(broken)(tmp_path / "p" / "model")
    found = checked(tmp_path / "p")
    assert "rehearsal-not-finite" in {f.code for f in found.findings}
    assert not found.ok


def test_chat_rows_that_lora_does_not_train(place: Path, tmp_path: Path) -> None:
    """The end token's row is that of an unused token; all weights would train it."""
    import shutil

    shutil.copytree(place, tmp_path / "p")
    tensors_changed(set_row("lm_head.weight", END, 262))(tmp_path / "p" / "model")
    settings = {"model": str(tmp_path / "p" / "model")}
    found = check_run(recipe(place, lora=True, **settings), Listener())
    (told,) = [f for f in found.findings if f.level == "error"]
    assert told.code == "rows-untrained"
    assert "'<|end|>' (257)" in told.what
    assert check_run(recipe(place, **settings), Listener()).ok
    assert check_run(recipe(place, lora=True), Listener()).ok


# What a rehearsal must see, done to the model right after it was loaded: code -> (settings,
# change). A sound run of the same settings has none of them (above).


def noisy(model: Any) -> None:
    """Draws that no switch of the rehearsal turns off: two ways of one step differ."""
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: out + torch.randn_like(out))


def shared(model: Any) -> None:
    """A frozen tensor lies in the memory of a trained one."""
    parameters = dict(model.named_parameters())
    trained = next(p for n, p in parameters.items() if "lora_A" in n)
    frozen = next(p for n, p in parameters.items() if n.endswith("norm.weight"))
    frozen.data = trained.data.reshape(-1)[: frozen.numel()]


def unsaved(model: Any) -> None:
    """What the model computes is not in its weights."""
    model.lm_head.register_forward_hook(lambda m, i, out: -out)


def untouched(model: Any) -> None:
    """Nothing is done; the settings alone are wrong."""


REHEARSED = {
    "weights-unmoved": ({"learning_rate": 1e-14}, untouched),
    "step-not-equal": ({}, noisy),
    "frozen-moved": ({"lora": True}, shared),
    "reload-differs": ({}, unsaved),
}


@pytest.mark.parametrize("code", REHEARSED)
def test_what_a_rehearsal_sees(place: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    import truetune.run.smoke_test as rehearsal

    settings, change = REHEARSED[code]
    load = rehearsal.load_start

    def loaded_and_changed(*arguments: Any) -> Any:
        loaded, findings = load(*arguments)
        change(loaded.model)
        return loaded, findings

    monkeypatch.setattr(rehearsal, "load_start", loaded_and_changed)
    found = {f.code: f for f in checked(place, **settings).findings}
    assert found[code].level == "error"
    assert found[code].why
    assert found[code].fix


def test_dropout_of_any_kind_is_no_difference_between_two_ways(place: Path, tmp_path: Path) -> None:
    """Attention keeps its rate as a plain number, not as a module."""
    import shutil

    shutil.copytree(place, tmp_path / "p")
    config = tmp_path / "p" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.5}))
    found = checked(tmp_path / "p")
    assert [f.code for f in found.findings if f.level != "note"] == []


# ------------------------------------------------------------------ memory and time


def plan(place: Path, **settings: Any) -> Plan:
    return survey(recipe(place, **settings), Listener()).prepared.plan


def shape_of(made: Plan, device: str = "cpu") -> RunShape:
    """Where the longest row is as long as the limit."""
    return run_shape(made, device, made.max_length)


def test_what_is_exact_in_the_estimate(place: Path) -> None:
    full = shape_of(plan(place))
    parts = full.parts()
    assert parts["weights"] == parts["gradients"] == 4 * full.parameters
    assert parts["optimizer"] == 8 * full.parameters
    lora = shape_of(plan(place, lora=True, lora_r=4))
    from truetune.model.load import load_model
    from truetune.model.lora import LoraSettings, add_lora, trainable_share

    loaded = load_model(place / "model", device="cpu", purpose="lora")
    adapted = add_lora(loaded, LoraSettings(4, 8, 0.0, "all-linear"), 0)
    assert lora.trainable == trainable_share(adapted.model)[0]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("halved", [False, True])
def test_the_estimate_is_what_the_loop_measures(place: Path, lora: bool, halved: bool) -> None:
    """To the byte: the same computation, with numbers and without."""
    import contextlib

    from truetune.compute.memory import footprint
    from truetune.compute.route import find_route
    from truetune.model.load import load_model
    from truetune.model.lora import LoraSettings, add_lora

    settings = {"lora": lora, "lora_dropout": 0.0, "dtype": "bfloat16" if halved else "float32"}
    foreseen = shape_of(plan(place, **settings)).footprint
    loaded = load_model(
        place / "model",
        device="cpu",
        dtype="bfloat16" if halved else "float32",
        purpose="lora" if lora else "full",
    )
    if lora:
        loaded = add_lora(loaded, LoraSettings(16, 32, 0.0, "all-linear"), 0)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if halved else contextlib.nullcontext()

    longest = plan(place, **settings).max_length
    route = find_route(loaded.model, longest=longest)
    measured = footprint(route, autocast, longest=longest)
    assert foreseen == measured


@pytest.mark.parametrize("recomputed", [False, True])
def test_an_estimate_for_a_gpu_has_no_holes_of_a_heap(place: Path, recomputed: bool) -> None:
    """What a GPU's allocator holds beside tensors is less; its forward passes are larger."""
    same = {"lora": True, "dtype": "bfloat16", "gradient_checkpointing": recomputed}
    here, there = (shape_of(plan(place, **same), device) for device in ("cpu", "cuda"))
    share = 1.1 / (1.8 if recomputed else 1.45)
    for one, other in zip(here.footprint.moments, there.footprint.moments, strict=True):
        assert other == (int(one[0] * share), pytest.approx(one[1] * share))
    assert (here.footprint.process, here.footprint.apart) == (
        there.footprint.process,
        there.footprint.apart,
    )
    assert there.tokens > here.tokens


def test_one_layer_is_timed_and_what_cannot_be_made_is_not(place: Path) -> None:
    timed = layer_speed(plan(place), "cpu")
    assert timed is not None
    assert timed > 0


def test_ways_are_smaller_and_the_cheapest_is_first(place: Path) -> None:
    made = plan(place)
    fit = estimate(made, tokens=10_000, longest=made.max_length, p99=100)
    assert [way[0].split()[0] for way in fit.ways] == [
        *("--micro-batch-tokens", "--gradient-checkpointing", "--max-length", "--lora", "--qlora")
    ]
    # Libraries and rows are part of it, as they are of what the run shows at its end.
    whole = sum(fit.parts.values())
    assert whole - shape_of(plan(place)).total > 100 * 2**20
    assert all(way[1] < whole for way in fit.ways)
    assert fit.low < whole < fit.high
    assert fit.seconds is not None
    assert fit.seconds > 0


def test_a_limit_above_the_longest_row_costs_nothing(place: Path) -> None:
    """A pass is packed to what the rows need: a limit of a million tokens is no alarm."""
    usual = checked(place).summary["plan"]
    wide = checked(place, max_length=1_000_000)
    assert (
        wide.summary["plan"]["parts"]["activations and head"]
        == (usual["parts"]["activations and head"])
    )
    assert "memory-short" not in [finding.code for finding in wide.findings]


def test_an_estimate_does_not_move_with_the_load() -> None:
    """Time in which this process does nothing is not counted."""
    began = undisturbed("cpu")
    time.sleep(0.3)
    assert undisturbed("cpu") - began < 0.1


def test_only_what_surely_does_not_fit_is_told(place: Path) -> None:
    fit = estimate(plan(place), tokens=10_000, longest=100)
    short = dataclasses.replace(fit, available=fit.low - 1)
    (told,) = short.findings()
    assert (told.code, told.level) == ("memory-short", "warning")
    assert "all options, cheapest first" in told.fix
    assert list(dataclasses.replace(fit, available=fit.low).findings()) == []
    assert list(dataclasses.replace(fit, available=None).findings()) == []


def test_operations_and_units() -> None:
    made = Footprint(((400, 0), (100, 40)), process=7)
    shape = RunShape(100, 100, 4, 4, made, 10, 8, False, False)
    assert shape.operations(7) == 6 * 100 * 7
    # Gradients of 400 bytes come as activations of 400 go, beside 100.
    assert shape.total == 400 + 400 + 100 + 800 + 7
    checkpointed = RunShape(100, 1, 4, 4, made, 5, 8, True, True)
    assert checkpointed.operations(7) == 6 * 100 * 7
    assert checkpointed.parts()["activations and head"] == 396
    apart = dataclasses.replace(made, apart=400)
    recomputed = RunShape(100, 100, 4, 4, apart, 10, 8, True, False)
    assert recomputed.total == 100 * (4 + 8) + apart.of(10)
    assert gib(3 * 2**30) == "3.0 GiB"
    assert gib(5 * 2**20) == "5 MiB"


def test_the_verb_rehearses_and_writes_a_page(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from truetune.cli.verbs import main

    page = tmp_path / "check.html"
    words = ["check", str(place / "model"), str(place / "rows.jsonl"), "--rehearse"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--html", str(page), "--all"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "smoke test" in shown
    assert f"written: {page}" in " ".join(shown.split())
    assert "ok: nothing found" in shown
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "smoke test" in text.lower()
    with pytest.raises(SystemExit) as left:
        main([*words, "--json", "--lr", "10", "--any-learning-rate"])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert "step-overshoots" in {finding["code"] for finding in told["findings"]}
    assert told["summary"]["rehearsal"]["rows"] == 4
