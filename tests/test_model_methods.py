"""Kinds of LoRA, bases in 4 and 8 bits, optimizers in 8 bits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from test_compute_adapter import step
from tiny_models import edit_json, write_model
from tiny_runs import command, lines, sums, write_rows
from truetune.compare import Agreement, rounding_finding
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.errors import ModelError, RecipeError, UsageError
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora, trainable_share
from truetune.model.save import save_model
from truetune.recipe.sources import make_recipe

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the bitsandbytes extra is missing"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Layers of at least 4,096 weights, so that 8-bit optimizers have something to do.
    folder = tmp_path_factory.mktemp("methods") / "base"
    return write_model(folder, hidden_size=64, intermediate_size=80, tie_word_embeddings=True)


def logits(model: Any, *, training: bool = False) -> Any:
    import torch

    model.train(training)
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def disturb(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def adapter_on(base: Path, settings: LoraSettings, **how: Any) -> LoadedModel:
    loaded = load_model(base, purpose="lora", device="cpu", **how)
    loaded = add_lora(loaded, settings, seed=0)
    disturb(loaded.model)
    return loaded


@pytest.mark.parametrize(
    ("kind", "flags"),
    [({"rslora": True}, (True, False)), ({"dora": True}, (False, True)), ({}, (False, False))],
)
def test_kinds_of_lora_come_back_bit_for_bit(
    base: Path, tmp_path: Path, kind: dict[str, bool], flags: tuple[bool, bool]
) -> None:
    import torch

    loaded = adapter_on(base, LoraSettings(r=4, dropout=0.0, **kind))
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == flags
    assert torch.equal(logits(loaded.model), logits(load_model(tmp_path / "out").model))


def test_rslora_scales_by_the_root_of_the_rank(base: Path) -> None:
    model = adapter_on(base, LoraSettings(r=4, alpha=8, rslora=True)).transformers_model
    assert model.model.layers[0].mlp.up_proj.scaling["default"] == 8 / 4**0.5


def test_dora_learns_a_magnitude_a_row(base: Path) -> None:
    loaded = adapter_on(base, LoraSettings(r=4, dora=True, target_modules=["up_proj"]))
    shapes = {tuple(p.shape) for p in loaded.model.parameters() if p.requires_grad}
    assert shapes == {(4, 64), (80, 4), (80,)}


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_opened_as_it_was_trained(
    base: Path, tmp_path: Path, bits: Any
) -> None:
    import torch

    loaded = adapter_on(base, LoraSettings(r=4), load_in=bits)
    assert loaded.quantised == bits
    assert [c.reason for c in loaded.choices if c.name == "base"] == ["as asked"]
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    again = load_model(tmp_path / "out", purpose="inference")
    assert again.quantised == bits
    assert torch.equal(logits(loaded.model), logits(again.model))
    # On the unquantised base it is another model.
    plain = load_model(tmp_path / "out", purpose="inference", load_in="as-stored")
    assert plain.quantised is None
    assert not torch.equal(logits(plain.model), logits(again.model))


@needs_bitsandbytes
def test_eight_bits_do_not_flood_the_screen(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(base, purpose="lora", device="cpu", load_in="8bit")
    logits(loaded.model)
    assert caplog.messages == []


@needs_bitsandbytes
def test_four_bits_compute_in_evaluation_as_in_training(base: Path) -> None:
    import torch

    loaded = adapter_on(base, LoraSettings(r=4, dropout=0.0), load_in="4bit")
    trained = logits(loaded.model, training=True)
    assert torch.equal(trained, logits(loaded.model))
    assert torch.equal(trained, logits(loaded.model, training=True))


@needs_bitsandbytes
def test_dequantised_is_the_quantised_model_in_plain_layers(base: Path, tmp_path: Path) -> None:
    import torch

    loaded = adapter_on(base, LoraSettings(r=4), load_in="4bit")
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    plain = load_model(tmp_path / "out", purpose="inference", load_in="dequantised")
    layer = plain.transformers_model.model.layers[0].mlp.up_proj.get_base_layer()
    assert type(layer) is torch.nn.Linear
    # float32: only the order of sums differs.
    assert torch.allclose(logits(loaded.model), logits(plain.model), atol=2e-5, rtol=0)


@needs_bitsandbytes
def test_weights_of_four_bits_are_counted_in_full(base: Path) -> None:
    plain = adapter_on(base, LoraSettings(r=4))
    packed = adapter_on(base, LoraSettings(r=4), load_in="4bit")
    assert trainable_share(packed.model) == trainable_share(plain.model)


def test_a_missing_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes") as caught:
        load_model(base, purpose="lora", load_in="4bit")
    assert (caught.value.code, caught.value.exit_code) == ("extra-missing", 2)
    assert "pip install bitsandbytes" in caught.value.fix


@needs_bitsandbytes
def test_quantised_weights_are_not_quantised_again(base: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(base, tmp_path / "gptq"))
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantised already \(gptq\)"):
        load_model(folder, purpose="lora", load_in="4bit")


def test_a_kind_of_lora_is_lora() -> None:
    for name in ("rslora", "dora", "qlora", "load_in_8bit"):
        recipe = make_recipe(("command line", {name: True}))
        assert recipe.lora
        assert recipe.origin("lora") == f"by {name} (command line)"
        assert not make_recipe(("r.yaml", {name: False})).lora
    assert make_recipe(("r.yaml", {"load-in-4bit": True})).qlora


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"qlora": True, "lora": False}, "qlora is a kind of LoRA"),
        ({"qlora": True, "load_in_8bit": True}, "qlora uses 4 bits"),
    ],
)
def test_contradicting_methods(settings: dict[str, bool], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_recipe(("r.yaml", settings))


def test_the_method_in_words() -> None:
    def words(**settings: bool) -> str:
        return make_recipe(("r.yaml", settings)).method

    assert words() == "all weights"
    assert words(lora=True) == "LoRA"
    assert words(qlora=True, rslora=True) == "rank-stabilised LoRA on a base in 4 bits"
    assert words(load_in_8bit=True, dora=True) == "DoRA on a base in 8 bits"


@needs_bitsandbytes
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_resume_exactly(base: Path, tmp_path: Path, optim: str) -> None:
    import torch

    from truetune.engine.checkpoint import load_state, save_state
    from truetune.engine.trainer import SFTTrainer

    examples = [SFTExample([i, i + 1, i + 2, i + 3], [0, 1, 1, 1]) for i in range(16)]
    name = make_recipe(("r.yaml", {"optim": optim})).optim

    def trainer() -> SFTTrainer:
        return SFTTrainer(
            load_model(base, device="cpu").model, examples=examples, max_seq_len=8, pad_id=0,
            batch_size=4, max_steps=4, max_lr=1e-2, optim=name,
        )  # fmt: skip

    whole = trainer()
    for _ in range(2):
        whole.train_step()
    stored = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    save_state(whole, tmp_path, run={})
    wide = whole.model.model.layers[0].mlp.up_proj.weight
    assert whole.optimizer.state[wide]["state1"].dtype == torch.uint8
    losses = [whole.train_step()["loss"] for _ in range(2)]

    resumed = trainer()
    with torch.no_grad():
        for parameter_name, parameter in resumed.model.named_parameters():
            parameter.copy_(stored[parameter_name])
    load_state(resumed, tmp_path, run={})
    assert [resumed.train_step()["loss"] for _ in range(2)] == losses


@pytest.mark.parametrize(
    ("loss", "greedy", "code"),
    [(2.05, 0.9, "quantised-base"), (2.2, 0.9, "quantised-base-differs"),
     (2.0, 0.5, "quantised-base-differs")],
)  # fmt: skip
def test_a_base_that_breaks_in_4_bits_is_told(loss: float, greedy: float, code: str) -> None:
    found = Agreement(None, None, None, 1.0, greedy, 2.0, loss, 500)
    finding = rounding_finding(found, "4 bits", 64)
    assert finding.code == code
    assert "the same token at" in finding.what
    assert (finding.level == "warning") == (code != "quantised-base")


@needs_bitsandbytes
@pytest.mark.parametrize("how", ["refused", "foreseen"])
def test_a_base_beyond_memory_is_not_compared(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import truetune.run.load_model as module

    load = module.load_model

    def without_memory(*given: Any, **settings: Any) -> LoadedModel:
        if settings["purpose"] == "inference":
            raise ModelError("the model does not fit on cuda", code="model-too-large")
        return load(*given, **settings)

    if how == "refused":
        monkeypatch.setattr(module, "load_model", without_memory)
    else:
        monkeypatch.setattr(module, "available_bytes", lambda _: 1000)
    data = write_rows(tmp_path / "rows.jsonl", sums(20))
    shown = command("train", base, data, "--qlora", "-o", tmp_path / "run", "--max-steps", 1)
    assert shown.code == 0, shown.err
    assert "note[quantised-base-not-compared]" in shown.out


@needs_bitsandbytes
def test_qlora_from_the_command_line(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(110))
    shown = command(
        *("train", base, data, "--qlora", "-o", tmp_path / "run", "--max-steps", 2),
        *("--batch-size", 4, "--eval-steps", 2),
    )
    assert shown.code == 0, shown.err
    assert "LoRA on a base in 4 bits" in shown.out
    assert "quantised-base-not-compared" not in shown.out
    assert "4 bits (NF4, double quantisation) (as asked)" in shown.out
    assert "the base in 4 bits (NF4, double quantisation) has a loss of" in shown.out
    # Random weights do break when they are rounded to 4 bits.
    assert "warning[quantised-base-differs]" in shown.out
    assert "on 64 rows" in shown.out
    # Without it peft opens the original weights, on which the adapter is another model.
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"' in shown.out
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert 0 < env["trainable_parameters"] < env["parameters"]
    # What was measured in training is what a fresh load gives.
    measured = lines(tmp_path / "run/metrics.jsonl")
    held = [line["eval_loss"] for line in measured if "eval_loss" in line][-1]
    assert held > 0
    answered = command("chat", tmp_path / "run", "--prompt", "1+1?", "--max-new-tokens", 2)
    assert answered.code == 0, answered.err


def drawn(base: Path, dropout: float) -> Any:
    """A base in 4 bits with an adapter that does something: B is no longer zeros."""
    import torch

    model = adapter_on(base, LoraSettings(r=4, dropout=dropout), load_in="4bit").model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@needs_bitsandbytes
def test_a_step_on_four_bits_is_pefts_own(base: Path) -> None:
    """float32, to 2e-6 of the largest gradient."""
    (loss, fast), (expected, own) = (step(drawn(base, 0.0), fast) for fast in (True, False))
    assert loss == pytest.approx(expected, rel=1e-6)
    largest = max(float(g.abs().max()) for g in own.values())
    assert fast.keys() == own.keys()
    for name, gradient in own.items():
        assert float((fast[name] - gradient).abs().max()) <= 2e-6 * largest, name


@needs_bitsandbytes
def test_dropout_on_four_bits_is_the_same_however_a_step_is_cut(base: Path) -> None:
    whole, cut, other = (
        step(drawn(base, 0.3), True, **more) for more in ({}, {"micro_batch_size": 1}, {"seed": 1})
    )
    assert cut[0] == pytest.approx(whole[0], rel=2e-6)
    assert other[0] != pytest.approx(whole[0], rel=1e-4)
