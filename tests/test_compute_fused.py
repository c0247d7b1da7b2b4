"""Layers by liger-kernel's fused kernels: what is taken on each family, that training is unchanged,
and that what computes anything else is left out. Mostly by a stand-in (liger_on_cpu.py), which
writes over its inputs as the kernels do; by the kernels themselves in the slow test."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from liger_on_cpu import STAND_IN, interpreted
from tiny_families import family
from tiny_models import tiny_model
from truetune import SFTExample, SFTTrainer
from truetune.compute.fused import Fused, Kernels, find_fused, fused_parts
from truetune.compute.route import Route, _batch_of, _probe_rows, find_route
from truetune.model.lora import enable_gradient_checkpointing

ROWS = [SFTExample(list(range(1, n + 1)), [0] + [1] * (n - 1)) for n in (5, 12, 40, 3)]
OTHER = "the kernel fails, or gives other results than the model's own code"


def fused_of(model: Any, kernels: Kernels = STAND_IN, route: Route | None = None) -> Fused:
    route = route or find_route(model, longest=64)
    batch = _batch_of(_probe_rows(model)[:1])
    was = model.training
    model.eval()
    with torch.no_grad(), route.scope(batch):
        found = find_fused(model, lambda: route.logits(batch), kernels)
    model.train(was)
    assert found is not None
    return found


LEFT: dict[str, tuple[str, ...]] = {
    # A layer norm, and pairs that lie side by side.
    "cohere": (f"RMSNorm (3): {OTHER}", f"RoPE (1): {OTHER}"),
    # Cosines of half the width.
    "gpt_oss": (f"RoPE (1): {OTHER}",),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("llama", ("RMSNorm (5 of 5)", "SwiGLU (2 of 2)", "RoPE (1 of 1)")),
        ("qwen3", ("RMSNorm (9 of 9)", "SwiGLU (2 of 2)", "RoPE (1 of 1)")),
        ("gemma2", ("RMSNorm (9 of 9)", "GeGLU (2 of 2)", "RoPE (1 of 1)")),
        ("phi3", ("RMSNorm (5 of 5)", "RoPE (1 of 1)")),
        ("cohere", ("SwiGLU (2 of 2)",)),
        ("gpt_oss", ("RMSNorm (5 of 5)",)),
        ("gpt2", ()),
    ],
)
def test_what_is_taken(kind: str, taken: tuple[str, ...], dtype: torch.dtype) -> None:
    found = fused_of(family(kind).to(dtype))
    assert (found.taken, found.left) == (taken, LEFT.get(kind, ()))


def lora(model: Any, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", **changes))
    # Numbers in B, so that a step has gradients of A.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def recomputed() -> Any:
    model = lora(family("llama"), lora_dropout=0.3)
    enable_gradient_checkpointing(model)
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "all weights": lambda: family("llama"),
    "norms of heads": lambda: family("qwen3"),
    "one and the weight": lambda: family("gemma3_text"),
    "a part of a head": lambda: family("phi3"),
    "DoRA": lambda: lora(family("qwen2"), use_dora=True),
    "recomputed": recomputed,
}


def gradients(make: Callable[[], Any], kernels: Kernels | None) -> list[torch.Tensor]:
    """Of one step, with the loss first; as many layers are fused as there are."""
    torch.manual_seed(0)
    model = make()
    made = SFTTrainer(
        model, examples=ROWS, max_seq_len=64, pad_id=0, batch_size=4, max_steps=2, max_lr=0.0
    )
    if kernels is not None:
        made.route.fused = fused_of(model, kernels, made.route)
        assert not made.route.fused.left
        assert len(made.route.fused.forwards) >= 5
    (batch,) = made.batcher.micro_batches(0)
    loss = made._backward([batch], 60)
    return [loss, *(p.grad for _, p in made.named_trainable)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_models_own_code(kind: str) -> None:
    """By the largest difference of a tensor in norm."""
    right, made = (gradients(KINDS[kind], kernels) for kernels in (None, STAND_IN))
    for one, other in zip(right, made, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


INTERPRETED = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="a part of the next")


@INTERPRETED
@pytest.mark.parametrize("kind", ["norms of heads", "one and the weight", "recomputed"])
def test_a_step_by_the_interpreted_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = interpreted(monkeypatch)
    right, made = (gradients(KINDS[kind], k) for k in (None, kernels))
    for one, other in zip(right, made, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.slow
def test_a_step_by_the_kernels_themselves() -> None:
    """In a process in which Triton interprets from the start; tests/gpu compiles them."""
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "interpreted_kernels", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def broken(name: str, kind: str) -> Kernels:
    """The stand-in with one fault."""
    norm, rope = STAND_IN.rms_norm, STAND_IN.rope

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * 0.99

    def fails(*_: Any) -> Any:
        raise ValueError("this width is too large for the kernel")

    faults: dict[tuple[str, str], Any] = {
        ("RMSNorm", "epsilon"): lambda x, w, eps, *rest: norm(x, w, 2 * eps, *rest),
        ("RMSNorm", "gradient"): lambda *given: Halved.apply(norm(*given)),
        ("RMSNorm", "rounded"): lambda *given: norm(*given).bfloat16().float(),
        ("RMSNorm", "fails"): fails,
        ("RoPE", "direction"): lambda q, k, cos, sin: rope(q, k, cos, -sin),
        ("RoPE", "keys"): lambda q, k, cos, sin: (rope(q, k, cos, sin)[0], k),
        ("RoPE", "type"): lambda *given: tuple(t.double() for t in rope(*given)),
    }
    if name == "SwiGLU":
        own = STAND_IN.products["SwiGLU"][0]
        changed = {
            "gradient": lambda a, b: Halved.apply(own(a, b)),
            "sides": lambda a, b: own(b, a),
            "fails": fails,
        }[kind]
        return dataclasses.replace(STAND_IN, products={"SwiGLU": (changed, F.silu)})
    field = {"RMSNorm": "rms_norm", "RoPE": "rope"}[name]
    return dataclasses.replace(STAND_IN, **{field: faults[name, kind]})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RMSNorm", "epsilon"), ("RMSNorm", "gradient"), ("RMSNorm", "rounded"),
        ("RMSNorm", "fails"), ("RoPE", "direction"), ("RoPE", "keys"), ("RoPE", "type"),
        ("SwiGLU", "gradient"), ("SwiGLU", "sides"), ("SwiGLU", "fails"),
    ],
)  # fmt: skip
def test_a_kernel_with_other_results_is_left_out(name: str, kind: str) -> None:
    """Alone: the others are taken."""
    found = fused_of(family("llama"), broken(name, kind))
    assert [text.split()[0] for text in found.left] == [name]
    assert len(found.taken) == 2


class Gated(torch.nn.Module):
    """A gated layer, one side of which needs what it returned in its backward pass."""

    def __init__(self, *after: torch.nn.Module) -> None:
        super().__init__()
        self.one = torch.nn.Sequential(torch.nn.Linear(8, 12), *after)
        self.other, self.last = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.one(x)) * self.other(x))  # type: ignore[no-any-return]


def test_a_layer_that_needs_what_the_kernel_writes_over() -> None:
    """Only the gradients show it."""
    for layer, taken in ((Gated(), 1), (Gated(torch.nn.Tanh()), 0)):
        model = torch.nn.Sequential(layer.eval())
        found = find_fused(model, lambda m=model: m(torch.randn(1, 5, 8)), STAND_IN)  # type: ignore[misc]
        assert found is not None
        assert len(found.forwards) == taken
        assert [text.split()[0] for text in found.left] == ["SwiGLU"] * (1 - taken)


class Once(Gated):
    """Takes what the model gives it, and nothing that it has not seen before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() > 1:
            raise ValueError("out of range")
        return super().forward(x)


def test_layers_that_cannot_be_asked_stay_as_they_are() -> None:
    layer = Once().eval()
    found = find_fused(layer, lambda: layer(torch.zeros(1, 5, 8)), STAND_IN)
    assert found is not None
    assert (found.forwards, found.taken, found.left) == ({}, (), ())


def test_types_that_were_not_proved_go_by_the_models_own_code() -> None:
    model = family("llama")
    found = fused_of(model)
    norm, block = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(1, 3, 32)
    own = [norm(x.bfloat16()), block(x)]
    with fused_parts(found):
        assert vars(norm)["forward"] is found.forwards[norm]
        assert torch.equal(norm(x.bfloat16()), own[0])
        # Proved in bfloat16 too, in which autocast computes.
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.bfloat16
    assert "forward" not in vars(norm)
    assert torch.equal(block(x), own[1])


def test_what_is_told() -> None:
    route = find_route(tiny_model(), longest=64)
    assert route.fused is None
    assert route.findings() == []
    route.fused = fused_of(family("gpt_oss"))
    (finding,) = route.findings()
    assert (finding.code, finding.level) == ("fused-parts", "note")
    assert finding.what == (f"liger-kernel computes RMSNorm (5 of 5); left out: RoPE (1): {OTHER}")
    route.fused = find_fused(
        route.model, lambda: None, "liger-kernel cannot be imported: no driver"
    )
    (finding,) = route.findings()
    assert "no layer; left out: liger-kernel cannot be imported: no driver" in finding.what
