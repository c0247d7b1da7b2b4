"""LoRA: targets, dtypes, seeds, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_models import write_model
from truetune.compute.memory import recomputes
from truetune.errors import UsageError
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import (
    LoraSettings,
    add_lora,
    enable_gradient_checkpointing,
    trainable_share,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora") / "m", tie_word_embeddings=True)


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, purpose="lora", device="cpu")


def lora_names(model: Any) -> set[str]:
    return {
        n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_" in n
    }


def test_all_linear_leaves_out_the_head(loaded: LoadedModel) -> None:
    with_lora = add_lora(loaded, LoraSettings(r=4), seed=0)
    assert with_lora.is_adapter
    assert with_lora.findings == ()
    assert (with_lora.base, with_lora.choices) == (loaded.base, loaded.choices)
    assert lora_names(with_lora.model) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    trainable, total = trainable_share(with_lora.model)
    inputs_and_outputs = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert trainable == 4 * inputs_and_outputs
    assert total == trainable + trainable_share(loaded.transformers_model)[1] - trainable
    assert all("lora_" in n for n, p in with_lora.model.named_parameters() if p.requires_grad)


def test_trainable_share_of_a_tied_full_model(folder: Path) -> None:
    model = load_model(folder).model
    trainable, total = trainable_share(model)
    assert trainable == total == sum(p.numel() for p in set(model.parameters()))


def test_lora_is_float32_on_a_bfloat16_base(folder: Path) -> None:
    import torch

    base = load_model(folder, purpose="lora", dtype="bf16", device="cpu")
    model = add_lora(base, LoraSettings(r=2), seed=0).model
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}


def test_the_seed_decides_and_the_global_state_stays(folder: Path) -> None:
    import torch

    def weights(seed: int) -> dict[str, Any]:
        model = add_lora(load_model(folder, purpose="lora"), LoraSettings(r=2), seed).model
        return {n: p.detach() for n, p in model.named_parameters() if "lora_A" in n}

    before = torch.random.get_rng_state()
    first = weights(1)
    torch.manual_seed(99)
    again, other = weights(1), weights(2)
    torch.random.set_rng_state(before)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    weights(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_chosen_targets(loaded: LoadedModel) -> None:
    settings = LoraSettings(r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    with_lora = add_lora(loaded, settings, seed=0)
    assert lora_names(with_lora.model) == {"q_proj", "up_proj"}
    assert (
        sum(n.endswith("lora_A.default.weight") for n, _ in with_lora.model.named_parameters()) == 3
    )
    assert with_lora.findings == ()


def test_targets_that_match_nothing_are_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError) as caught:
        add_lora(loaded, LoraSettings(target_modules=["q_prj", "c_attn"]), seed=0)
    text = str(caught.value)
    assert "no layer is called q_prj or c_attn" in text
    assert "did you mean q_proj?" in text
    assert "gate_proj (2)" in text
    assert caught.value.exit_code == 2


def test_targets_that_match_in_part_are_told(loaded: LoadedModel) -> None:
    settings = LoraSettings(r=2, target_modules=["q_proj", "W_pack"])
    with_lora = add_lora(loaded, settings, seed=0)
    (finding,) = with_lora.findings
    assert (finding.code, finding.level, finding.count) == ("lora-targets-unmatched", "warning", 1)
    assert "q_proj 2, W_pack 0" in finding.what
    assert lora_names(with_lora.model) == {"q_proj"}


def test_a_second_adapter_is_refused(loaded: LoadedModel) -> None:
    with_lora = add_lora(loaded, LoraSettings(r=2), seed=0)
    with pytest.raises(UsageError, match="already has an adapter"):
        add_lora(with_lora, LoraSettings(r=2), seed=0)


def test_settings_out_of_range_are_all_told() -> None:
    with pytest.raises(UsageError, match=r"r is 0.*alpha is -1.*dropout is 1.*is empty"):
        LoraSettings(r=0, alpha=-1, dropout=1, target_modules=[])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
def test_families_with_other_layer_names(tmp_path: Path, kind: str) -> None:
    loaded = load_model(write_model(tmp_path / kind, kind), purpose="lora")
    with_lora = add_lora(loaded, LoraSettings(r=2), seed=0)
    expected = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    }
    assert lora_names(with_lora.model) == expected[kind]


def test_experts_without_adapter_are_told(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", "qwen3_moe", num_experts=4, moe_intermediate_size=16)
    with_lora = add_lora(load_model(source, purpose="lora"), LoraSettings(r=2), seed=0)
    (finding,) = with_lora.findings
    assert (finding.code, finding.count) == ("lora-experts-left-out", 4)
    assert lora_names(with_lora.model) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def gradients(model: Any) -> dict[str, Any]:
    import torch

    model.train()
    model.zero_grad()
    ids_BT = torch.arange(24).reshape(2, 12)
    model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", [True, False])
def test_gradients_are_the_same_with_checkpointing(folder: Path, adapter: bool) -> None:
    import torch

    loaded = load_model(folder, purpose="lora" if adapter else "full")
    if adapter:
        loaded = add_lora(loaded, LoraSettings(r=2, dropout=0.0), seed=0)
    plain = gradients(loaded.model)
    enable_gradient_checkpointing(loaded.model)
    assert recomputes(loaded.model)
    checkpointed = gradients(loaded.model)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)
    # LoRA's B starts at zero, so that A has no gradient in the first step, but B must have one.
    first = [g for n, g in plain.items() if "layers.0" in n and "lora_A" not in n]
    assert first
    assert all(g.abs().max() > 0 for g in first)


def test_a_model_without_checkpointing_says_so(loaded: LoadedModel) -> None:
    loaded.model.supports_gradient_checkpointing = False
    with pytest.raises(UsageError, match="does not support gradient checkpointing"):
        enable_gradient_checkpointing(loaded.model)
