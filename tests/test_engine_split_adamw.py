"""AdamW on bfloat16 weights is AdamW on float32 weights, bit for bit; bfloat16 alone is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_families import family
from truetune import SFTExample, SFTTrainer
from truetune.engine.split_adamw import SplitAdamW, joined, split_

pytestmark = pytest.mark.filterwarnings("error")


_NUMBERS = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)


@given(st.lists(_NUMBERS, min_size=1))
def test_the_halves_are_the_number(values: list[float]) -> None:
    whole = torch.tensor(values)
    high, low = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty(len(values)).short()
    split_(whole, high, low)
    assert torch.equal(joined(high, low).view(torch.int32), whole.view(torch.int32))
    # The nearest, or the other neighbour of a tie.
    apart = (high.double() - whole.double()).abs()
    assert bool((apart <= (whole.bfloat16().double() - whole.double()).abs()).all())


@pytest.mark.parametrize("lr", [1e-2, 1e-5, 1e-7])
def test_bit_for_bit_as_on_float32_weights(lr: float) -> None:
    """Over 50 steps of equal gradients, in pieces of odd size; without the lower halves the two
    small rates move nothing."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 7, generator=generator).bfloat16()
    half, whole, lone = (torch.nn.Parameter(start.clone().to(t)) for t in _TYPES)
    kinds: Any = {"lr": lr, "weight_decay": 0.1}
    made = [SplitAdamW([half], **kinds)]
    made += [torch.optim.AdamW([p], fused=True, **kinds) for p in (whole, lone)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("truetune.engine.split_adamw._CHUNK", 1000)
        for _ in range(50):
            gradient = torch.randn(300, 7, generator=generator).bfloat16()
            for parameter, optimizer in zip((half, whole, lone), made, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
                optimizer.step()
    low = made[0].state[half]["low"]
    assert torch.equal(joined(half.detach().view(-1), low.view(-1)), whole.detach().view(-1))
    moved = float((lone.detach() != start).float().mean())
    assert moved > 0.9 if lr == 1e-2 else moved < 0.05


_TYPES = (torch.bfloat16, torch.float32, torch.bfloat16)


def losses(optim: str, dtype: torch.dtype) -> list[float]:
    """120 steps over 4 rows at a rate of 3e-5."""
    model = family("llama").to(dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 250, (4, 24), generator=generator).tolist()
    trainer = SFTTrainer(
        model,
        examples=[SFTExample(row, [0] * 4 + [1] * 20) for row in ids],
        max_seq_len=32,
        pad_id=0,
        batch_size=4,
        max_steps=120,
        max_lr=3e-5,
        lr_scheduler_type="constant",
        optim=optim,
        micro_batch_tokens=200,
        autocast_dtype=None if dtype == torch.bfloat16 else torch.bfloat16,
    )
    return trainer.train()["train_loss"]


def test_the_loss_falls_as_with_float32_weights_and_not_as_in_bfloat16() -> None:
    """What float32 weights gain is gained to 2 % at every twentieth step; bfloat16 alone gains less
    than a fifth of it."""
    masters, halves = losses("adamw", torch.float32), losses("adamw_bf16", torch.bfloat16)
    plain = losses("adamw", torch.bfloat16)
    gained = masters[0] - masters[-1]
    assert gained > 0.7
    assert all(abs(a - b) < 0.02 * gained for a, b in zip(masters[::20], halves[::20], strict=True))
    assert plain[0] - plain[-1] < 0.2 * gained


def test_small_weights_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as one by one, in fewer calls; large ones are cut, types stay apart."""
    from truetune.engine import split_adamw

    monkeypatch.setattr(split_adamw, "_CHUNK", 1000)
    own, calls = split_adamw.fused_adamw_, list[int]()

    def counted(weights: Any, *arguments: Any) -> None:
        calls.append(len(weights))
        own(weights, *arguments)

    monkeypatch.setattr(split_adamw, "fused_adamw_", counted)
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (30, 5), (50, 50), (3,), (4, 4)]
    starts = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    starts[-1] = starts[-1].float()
    halves = [torch.nn.Parameter(t.clone()) for t in starts]
    wholes = [torch.nn.Parameter(t.float()) for t in starts]
    made = [SplitAdamW(halves, lr=1e-3), torch.optim.AdamW(wholes, lr=1e-3, fused=True)]
    made[1].param_groups[0]["weight_decay"] = 0.0
    for _ in range(5):
        for half, whole in zip(halves, wholes, strict=True):
            half.grad = torch.randn(half.shape, generator=generator).to(half.dtype)
            whole.grad = half.grad.float()
        for optimizer in made:
            optimizer.step()
    assert calls[: len(calls) // 5] == [2, 1, 1, 2, 1]
    for half, whole in zip(halves, wholes, strict=True):
        state = made[0].state[half]
        kept = joined(half.detach(), state["low"]) if "low" in state else half.detach()
        assert torch.equal(kept, whole.detach())
        assert float(state["step"]) == 5
