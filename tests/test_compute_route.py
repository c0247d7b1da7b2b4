"""Which way batches go through a model, found on the model itself, and its output head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_families import APART, FAMILIES, family
from tiny_models import tiny_model
from truetune import SFTExample, SFTTrainer
from truetune.compute.head import Tail
from truetune.compute.loss import loss_sum
from truetune.compute.route import find_route
from truetune.findings import Finding

ROWS = [SFTExample(list(range(1, n + 1)), [0] + [1] * (n - 1)) for n in (5, 12, 40, 3)]


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def trainer(model: Any, **changes: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "examples": ROWS,
        "max_seq_len": 64,
        "pad_id": 0,
        "batch_size": 4,
        "max_steps": 2,
        "max_lr": 1e-3,
    }
    return SFTTrainer(model, **(settings | changes))


def test_a_plain_module_goes_padded_and_nothing_is_told() -> None:
    route = find_route(Plain(), longest=8)
    assert (route.kind, route.reason, route.findings()) == (
        "padded",
        "not a transformers model",
        [],
    )


def test_the_reference_path_is_there_on_request() -> None:
    made = trainer(family("llama"), packing=False)
    assert made.route.kind == "padded"
    assert made.route.findings() == []
    (batch,) = made.batcher.micro_batches(0)
    assert batch.ids_BT.shape == (4, 39)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", APART)
def test_models_whose_rows_run_apart(kind: str) -> None:
    """Each is told with its reason, and trains as the padded reference does."""
    model = family(kind)
    told: list[Finding] = []
    made = trainer(model, on_finding=told.append)
    assert made.route.kind == "apart"
    assert APART[kind][1] in made.route.reason
    assert [(f.code, f.level, f.why) for f in told] == [("rows-apart", "note", made.route.reason)]
    loss = made.train_step()["loss"]
    assert loss == pytest.approx(trainer(family(kind), packing=False).train_step()["loss"], 1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_models_that_pack_have_nothing_to_tell(kind: str) -> None:
    told: list[Finding] = []
    made = trainer(family(kind), on_finding=told.append)
    assert (made.route.kind, told) == ("packed", [])


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
    "rope_theta": 1e4,
}
DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 2.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(
    ("kind", "rope", "context"),
    [("phi3", LONGROPE, 256), ("llama", DYNAMIC, 64), ("llama", LLAMA3, 256)],
)
@pytest.mark.parametrize("longest", [64, 100])
def test_rotary_embeddings_that_look_at_the_longest_row(
    kind: str, rope: dict[str, Any], context: int, longest: int
) -> None:
    """Only beyond the length that they were made for, and only the kinds that do."""
    settings = {"rope_parameters": rope, "max_position_embeddings": context}
    if kind == "phi3":
        settings["original_max_position_embeddings"] = 64
    model = tiny_model(kind, **settings)
    route = find_route(model, longest=longest)
    apart = longest > 64 and rope is not LLAMA3
    assert route.kind == ("apart" if apart else "packed"), route.reason
    assert ("longest row" in route.reason) == apart
    # The probe leaves the angles as they were.
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(model(ids).logits, tiny_model(kind, **settings)(ids).logits)


def test_a_window_that_is_in_the_mask_alone_matters_where_rows_reach_it() -> None:
    model = family("llama4_text")
    assert find_route(model, longest=32).kind == "packed"
    assert find_route(model, longest=33).kind == "apart"


def test_a_compiled_model_is_probed_bare() -> None:
    # Traced, transformers writes a mask of the probe's length, which longer rows fall out of.
    model = tiny_model("llama")
    model.compile(backend="eager")
    assert find_route(model, longest=300).kind == "packed"


def test_the_probe_leaves_no_trace() -> None:
    model = family("gemma2").train()
    model.config.attention_dropout = 0.5
    attention = model.config._attn_implementation
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    find_route(model, longest=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


# ---------------------------------------------------------------- head


@pytest.mark.parametrize(
    ("kind", "settings", "tail"),
    [
        ("llama", {}, Tail()),
        ("gemma2", {"query_pre_attn_scalar": 8}, Tail(1.0, 30.0)),
        ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": None}, Tail()),
        ("granite", {"logits_scaling": 4.0}, Tail(0.25)),
        ("cohere", {"logit_scale": 0.1}, Tail(pytest.approx(0.1))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_the_head_is_found(
    kind: str, settings: dict[str, Any], tail: Tail, dtype: torch.dtype
) -> None:
    head = find_route(tiny_model(kind, **settings).to(dtype), longest=64).head
    assert head is not None
    assert head.tail == tail


def test_a_tail_of_another_form_keeps_the_models_own_head() -> None:
    class Shifted(type(family("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square() / 10
            return output

    model = family("llama")
    model.__class__ = Shifted
    made = trainer(model)
    assert made.route.head is not None
    assert made.route.head.tail is None
    (batch,) = trainer(model, packing=False).batcher.micro_batches(0)
    expected = loss_sum(model, batch).item() / batch.num_supervised
    assert made.evaluate(ROWS) == pytest.approx(expected, rel=1e-5)


def test_an_adapter_on_the_head_is_trained() -> None:
    """At its start, with B = 0, the fused head would give the same loss and no gradient to B."""
    model = get_peft_model(family("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    made = trainer(model)
    assert made.route.head is not None
    assert made.route.head.tail is None
    made.train_step()
    moved = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(p.abs().sum() > 0 for p in moved)


def test_logits_exist_at_supervised_positions_only() -> None:
    model = family("llama")
    made = trainer(model)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    made.train_step()
    made.evaluate(ROWS)
    assert seen == [(1, 0, model.config.vocab_size)] * 2


def test_a_head_with_a_bias_is_fused() -> None:
    model = tiny_model("phi", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    made = trainer(model)
    assert made.route.head is not None
    assert made.route.head.tail == Tail()
    reference = trainer(model, packing=False)
    assert made.evaluate(ROWS) == pytest.approx(reference.evaluate(ROWS), rel=1e-6)


def test_autocast_is_the_reference_under_autocast() -> None:
    """bfloat16: losses to 1 %."""
    model = family("llama")
    made, reference = (
        trainer(model, packing=packing, autocast_dtype=torch.bfloat16) for packing in (True, False)
    )
    assert made.route.kind == "packed"
    assert made.evaluate(ROWS) == pytest.approx(reference.evaluate(ROWS), rel=0.01)
    assert made.train_step()["loss"] > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
