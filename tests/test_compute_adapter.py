"""LoRA on frozen layers in one function: equal to peft's own, on the layers where that is so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_models import tiny_model
from truetune import SFTExample, SFTTrainer
from truetune.compute.adapter import _LoraLinear, fast_adapters, find_adapters
from truetune.compute.dropout import dropped
from truetune.compute.packing import pack
from truetune.compute.route import Route, find_route
from truetune.model.lora import enable_gradient_checkpointing

ROWS = [SFTExample(list(range(1, n + 1)), [0] + [1] * (n - 1)) for n in (5, 12, 40, 3)]


def lora(kind: str = "llama", *, dropout: float = 0.0, **changes: Any) -> Any:
    """An adapter that does something: B is no longer zeros."""
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets, "lora_dropout": dropout}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = get_peft_model(tiny_model(kind), LoraConfig(**(settings | changes)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


def step(model: Any, fast: bool, **changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}

    def note(_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()

    made = SFTTrainer(
        model,
        examples=ROWS,
        max_seq_len=64,
        pad_id=0,
        batch_size=4,
        max_steps=1,
        max_lr=0.0,
        probes=[note],
        **changes,
    )
    assert made.route.adapters
    if not fast:
        made.route.adapters = {}
    return made.train_step()["loss"], seen


def test_a_step_is_pefts_own_step() -> None:
    """float32, to 2e-6 of the largest gradient."""
    model = lora()
    assert len(find_adapters(model)) == 6
    (loss, fast), (expected, own) = step(model, True), step(model, False)
    assert loss == pytest.approx(expected, rel=1e-6)
    largest = max(float(g.abs().max()) for g in own.values())
    assert fast.keys() == own.keys()
    assert all("lora_" in name for name in fast)
    for name, gradient in own.items():
        assert float((fast[name] - gradient).abs().max()) <= 2e-6 * largest, name


def test_in_bfloat16_it_is_pefts_own_to_rounding() -> None:
    """By norm: 2 % of all gradients together."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    cast = {"autocast_dtype": torch.bfloat16}
    (loss, fast), (expected, own) = step(model, True, **cast), step(model, False, **cast)
    assert loss == pytest.approx(expected, rel=0.01)
    assert {g.dtype for g in fast.values()} == {torch.float32}
    whole, apart = (
        torch.cat([part.flatten() for part in parts])
        for parts in (own.values(), [fast[n] - own[n] for n in own])
    )
    assert apart.norm() < 0.02 * whole.norm()


def test_dropout_is_that_of_the_adapters_input() -> None:
    """Against the formula with the same elements dropped; the base sees all of its input."""
    torch.manual_seed(5)
    x, w, a, b = (torch.randn(n, m) for n, m in ((7, 6), (4, 6), (2, 6), (4, 2)))
    for t in (x, a, b):
        t.requires_grad_()
    states = torch.arange(7)
    y = _LoraLinear.apply(x, w, None, a, b, 1.5, 0.25, states)
    keep = (~dropped(states, 6, 0.25)).float()
    assert 0 < keep.sum() < 42
    expected = x @ w.t() + 1.5 * (x * keep / 0.75) @ a.t() @ b.t()
    torch.testing.assert_close(y, expected)
    direction = torch.randn(7, 4)
    for one, other in zip(
        torch.autograd.grad(y, (x, a, b), direction),
        torch.autograd.grad(expected, (x, a, b), direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_no_dropout_in_evaluation() -> None:
    model = lora(dropout=0.5).eval()
    layers = find_adapters(model)
    ids = torch.arange(1, 9)[None]
    with fast_adapters(layers), torch.no_grad():
        first, second = model(ids).logits, model(ids).logits
    assert torch.equal(first, second)


def test_recomputed_activations_drop_the_same_elements() -> None:
    """To the last bit."""
    plain = lora(dropout=0.3)
    checkpointed = copy.deepcopy(plain)
    enable_gradient_checkpointing(checkpointed)
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(4)
        results.append(step(model, True))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


def left_alone(**changes: Any) -> Any:
    return find_adapters(lora(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"lora_bias": True},
    ],
)
def test_other_adapters_keep_pefts_forward(changes: dict[str, Any]) -> None:
    assert left_alone(**changes) == {}


def test_rank_stabilised_scaling_is_only_another_number() -> None:
    assert len(left_alone(use_rslora=True)) == 6


def test_layers_that_are_not_plain_at_the_time() -> None:
    model = lora()
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer.base_layer.weight.requires_grad_()
    assert len(find_adapters(model)) == 5
    layer.base_layer.weight.requires_grad_(False)
    with model.disable_adapter():
        assert find_adapters(model) == {}
    model.merge_adapter()
    assert find_adapters(model) == {}


def test_the_layers_are_as_they_were_outside() -> None:
    model = lora()
    route = find_route(model, longest=64)
    made = SFTTrainer(
        model, examples=ROWS, max_seq_len=64, pad_id=0, batch_size=2, max_steps=2, max_lr=1e-3
    )
    made.train(ROWS)
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ZeroDivisionError), route.scope(made.batcher.micro_batches(0)[0]):
        _ = 1 / 0
    assert all("forward" not in vars(module) for module in model.modules())
    assert Route(model, "padded").adapters == {}


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_tokens": 45}])
def test_dropout_is_the_same_however_a_step_is_cut(changes: dict[str, Any]) -> None:
    """float32, to 2e-6 of the largest gradient; another seed, or another step, is another one."""
    whole, cut, other = (
        step(lora(dropout=0.3), True, **more) for more in ({}, changes, {"seed": 1})
    )
    largest = max(float(g.abs().max()) for g in whole[1].values())
    assert cut[0] == pytest.approx(whole[0], rel=2e-6)
    for name, gradient in whole[1].items():
        assert float((cut[1][name] - gradient).abs().max()) <= 2e-6 * largest
    assert other[0] != pytest.approx(whole[0], rel=1e-4)


def test_rows_that_begin_alike_drop_alike_in_a_tree_and_apart() -> None:
    model = lora(dropout=0.3).train()
    route = find_route(model, longest=64)
    shared = list(range(1, 30))
    rows = [SFTExample([*shared, n, n + 1, n + 2], [0] * 28 + [1] * 4) for n in (50, 60, 70)]
    sums = []
    for least in (16, None):
        batch = pack(rows, range(3), min_shared=least)
        with route.scope(batch), torch.no_grad():
            sums.append(float(route.loss_sum(batch)))
    assert sums[0] == pytest.approx(sums[1], rel=2e-6)


def test_the_host_waits_once_a_step() -> None:
    """Numbers read from the device: loss and norm together, whatever the number of micro-batches;
    dropout reads none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = func.overloadpacket.__name__
            self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (4, 1):
        made = SFTTrainer(
            lora(dropout=0.3), examples=ROWS, max_seq_len=64, pad_id=0, batch_size=4, max_steps=9,
            max_lr=1e-3, micro_batch_size=size,
        )  # fmt: skip
        made.train_step()
        with Reads() as reads:
            made.train_step()
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 2, "two numbers of one tensor"
