"""torch's private functions: those of this torch are right, and all goes on without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tiny_families import family
from truetune import SFTExample, SFTTrainer
from truetune.compute import gathered, private

PROBES = (
    private.has_flash,
    private._softmax_backward,
    private._has_fused_adamw,
    private._has_wide_products,
)
ROWS = [SFTExample(list(range(1, n + 1)), [0] + [1] * (n - 1)) for n in (5, 12, 30, 3)]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for probe in PROBES:
        probe.cache_clear()
    yield
    for probe in PROBES:
        probe.cache_clear()


def found() -> list[bool]:
    """Whether flash attention on a CPU, the softmax's backward and fused AdamW are there."""
    backward = private._softmax_backward().__name__ == "fused"
    return [private.has_flash(), backward, private._has_fused_adamw()]


def test_this_torch_has_them_all() -> None:
    assert found() == [True, True, True]


def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses over short nodes in one product, and over meetings."""
    losses = []
    for most in (gathered.MOST_KEYS, 0):
        monkeypatch.setattr(gathered, "MOST_KEYS", most)
        model = family("qwen2").bfloat16() if most else family("qwen2")
        made = SFTTrainer(
            model, examples=ROWS, max_seq_len=64, pad_id=0, batch_size=4, max_steps=3, max_lr=1e-3,
            optim="adamw_bf16",
        )  # fmt: skip
        assert made.route.kind == "packed"
        losses += made.train()["train_loss"]
    return losses


def raising(*_: Any, **__: Any) -> Any:
    raise AttributeError("renamed")


def test_without_them_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses to 1 % in bfloat16 and to 2e-5 in float32."""
    usual = steps(monkeypatch)
    for probe in PROBES:
        probe.cache_clear()
    for name in ("flash_forward", "flash_backward"):
        monkeypatch.setattr(private, name, raising)
    monkeypatch.setattr(torch, "_softmax_backward_data", raising)
    monkeypatch.setattr(torch, "_fused_adamw_", raising)
    without = steps(monkeypatch)
    assert found() == [False, False, False]
    assert without[:3] == pytest.approx(usual[:3], rel=0.01)
    assert without[3:] == pytest.approx(usual[3:], rel=2e-5)


def test_one_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch._softmax_backward_data
    monkeypatch.setattr(torch, "_softmax_backward_data", lambda *a: own(*a) * 2)
    forward = private.flash_forward
    monkeypatch.setattr(private, "flash_forward", lambda *a, **k: (forward(*a, **k)[0], None))
    assert found() == [False, False, True]


def test_memory_that_runs_out_says_nothing_about_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for a function that is not there, a run would have other losses than its repetition."""
    own, asked = private.flash_forward, []

    def short_of_memory(*arguments: Any, **settings: Any) -> Any:
        asked.append(True)
        if len(asked) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return own(*arguments, **settings)

    monkeypatch.setattr(private, "flash_forward", short_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        private.has_flash()
    assert private.has_flash()


@pytest.mark.parametrize(
    ("rounded", "is_wide"), [(None, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_products_are_added_up_in_float32_where_the_device_can(
    rounded: torch.dtype | None, is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU cannot; a device may, and one that rounds each product is found out."""

    def addmm(total: Any, a: Any, b: Any, *, out_dtype: Any, out: Any) -> Any:
        assert (out_dtype, out is total) == (torch.float32, True)
        return out.add_((a.float() @ b.float()).to(rounded))

    if rounded:
        monkeypatch.setattr(torch, "addmm", addmm)
    a, b, before = torch.randn(5, 40).bfloat16(), torch.randn(40, 6).bfloat16(), torch.randn(5, 6)
    exact = before + a.float() @ b.float()
    made = before.clone()
    private.add_product_(made, a, b)
    assert private._has_wide_products("cpu", torch.bfloat16) == is_wide
    assert ((made - exact).norm() <= 1e-6 * exact.norm()) == is_wide
    assert (made - exact).norm() <= 1e-2 * exact.norm()
    same = before.clone()
    private.add_product_(same, a.float(), b.float())
    assert torch.allclose(same, exact, rtol=1e-5, atol=1e-5)
