"""The same rows, cut and padded differently, are the same loss and the same gradients.

Tolerances, float32 on CPU: losses to 2e-6, gradients to 2e-6 of the largest of their tensor's
model (sums in another order; no other cause is admitted).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_families import SIX, family
from tiny_models import tiny_model
from truetune import SFTExample, SFTTrainer, masked_cross_entropy, pad_and_collate
from truetune.compute.batch import Limits, PaddedBatcher, RowOrder
from truetune.compute.loss import loss_sum
from truetune.compute.route import Route
from truetune.model.load import load_model
from truetune.model.lora import LoraSettings, add_lora, enable_gradient_checkpointing

pytestmark = pytest.mark.filterwarnings("error")

LOSS, GRADIENT = 2e-6, 2e-6

FolderOf = Callable[[str], Path]


def rows() -> list[SFTExample]:
    """Eight rows of 2 to 30 tokens; how many are supervised differs from row to row."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 30, 2, 17, 9, 23, 3, 12):
        ids = torch.randint(1, 250, (length,), generator=generator).tolist()
        first = 1 + length // 3
        made.append(SFTExample(ids, [int(t >= first) for t in range(length)]))
    return made


def make(kind: str, folder_of: FolderOf, name: str = "llama") -> Any:
    """A family with all weights trained, or an adapter on it."""
    if kind == "full":
        return family(name)
    loaded = load_model(folder_of(name), purpose="lora", device="cpu")
    model = add_lora(loaded, LoraSettings(r=4, dropout=0.0), seed=1).model
    with torch.no_grad(), torch.random.fork_rng():
        # An adapter starts with B = 0, where half of its gradients are 0.
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def one_step(
    model: Any, micro_batch_size: int, **changes: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients as the optimizer gets them."""
    seen: dict[str, torch.Tensor] = {}
    trainer = SFTTrainer(
        model,
        examples=rows(),
        max_seq_len=32,
        pad_id=0,
        batch_size=8,
        micro_batch_size=micro_batch_size,
        max_steps=1,
        max_lr=0.0,
        grad_clip=0,
        probes=[lambda facts: seen.update(gradients(model))],
        **changes,
    )
    # A route that fell back would be as exact, and prove nothing of the one that is used.
    assert trainer.route.kind == ("packed" if changes.get("packing", True) else "padded")
    return trainer.train_step()["loss"], seen


def reference(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Each row alone and unpadded, one backward pass over the mean."""
    model.train()
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for ids, mask in rows():
        logits = model(torch.tensor([ids])).logits[0, :-1]
        nats = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        total = total + (nats * torch.tensor(mask[1:])).sum()
        count += sum(mask[1:])
    (total / count).backward()
    return (total / count).item(), gradients(model)


def require_equal(
    a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert a[0] == pytest.approx(b[0], rel=LOSS)
    assert a[1].keys() == b[1].keys()
    largest = max(float(g.abs().max()) for g in b[1].values())
    assert largest > 0
    for name, gradient in b[1].items():
        difference = float((a[1][name] - gradient).abs().max())
        assert difference <= GRADIENT * largest, name


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", SIX)
def test_one_batch_of_eight_is_eight_of_one(
    name: str, kind: str, packing: bool, folder_of: FolderOf
) -> None:
    """And is its separate rows, computed by the model alone."""
    model = make(kind, folder_of, name)
    whole = one_step(model, 8, packing=packing)
    require_equal(one_step(model, 1, packing=packing), whole)
    require_equal(one_step(model, 3, packing=packing), whole)
    require_equal(whole, reference(model))


@pytest.mark.parametrize("tokens", [1, 30, 47, 64])
def test_a_limit_in_tokens_changes_nothing(tokens: int, folder_of: FolderOf) -> None:
    model = make("full", folder_of)
    require_equal(one_step(model, 8, micro_batch_tokens=tokens), one_step(model, 8))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_memory_that_runs_out_changes_nothing(
    kind: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of more than two rows fail as torch fails, half of them after a backward pass
    of the same step; the step that comes out is the whole one."""
    model = make(kind, folder_of)
    whole = one_step(model, 8)
    compute = Route.loss_sum
    failed: list[int] = []

    def limited(route: Route, batch: Any) -> torch.Tensor:
        if len(batch.rows) > 2:
            failed.append(len(batch.rows))
            raise torch.OutOfMemoryError("out of memory")
        return compute(route, batch)

    monkeypatch.setattr(Route, "loss_sum", limited)
    found: list[Any] = []
    given = {"on_finding": found.append, "micro_batch_tokens": 1000}
    require_equal(one_step(model, 8, **given), whole)
    assert failed == [8, 3]
    assert [finding.code for finding in found] == ["out-of-memory"] * 2
    assert "from step 1 on, at most 2 examples" in found[-1].what


def test_the_mean_is_over_tokens_and_not_over_rows() -> None:
    """What makes the tests above sharp: the mean of row means is another number."""
    model = tiny_model()
    loss, _ = one_step(model, 8)
    means = []
    for row in rows():
        x, y, mask = pad_and_collate([row], max_seq_len=len(row.ids), pad_id=0)
        means.append(masked_cross_entropy(model(x).logits, y, mask).item())
    assert abs(sum(means) / 8 - loss) > 0.01


def test_the_pad_id_and_the_width_change_nothing() -> None:
    """To the last bit for the id; to LOSS for the width, which changes the order of sums."""
    model = tiny_model()
    losses = []
    for pad_id in (0, 77, 258):
        x, y, mask = pad_and_collate(rows(), max_seq_len=30, pad_id=pad_id)
        losses.append(masked_cross_entropy(model(x).logits, y, mask).item())
    assert len(set(losses)) == 1
    x, y, mask = pad_and_collate(rows(), max_seq_len=64, pad_id=0)
    wide = masked_cross_entropy(model(x).logits, y, mask).item()
    assert wide == pytest.approx(losses[0], rel=LOSS)


def test_the_loss_of_a_batch_is_the_reference_path() -> None:
    model = tiny_model()
    order, limits = RowOrder(8, 8, 0), Limits(8)
    made = PaddedBatcher(rows(), max_seq_len=32, pad_id=0, order=order, limits=limits)
    (batch,) = made.micro_batches(0)
    x, y, mask = pad_and_collate(rows(), max_seq_len=32, pad_id=0)
    expected = masked_cross_entropy(model(x).logits, y, mask).item()
    assert loss_sum(model, batch).item() / batch.num_supervised == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", SIX)
def test_checkpointed_activations_are_the_same_step(
    name: str, kind: str, folder_of: FolderOf
) -> None:
    """To the last bit: the same operations are run, once more."""
    plain, checkpointed = (make(kind, folder_of, name) for _ in range(2))
    enable_gradient_checkpointing(checkpointed)
    inner = checkpointed.get_base_model() if kind == "lora" else checkpointed
    calls = []
    inner.model.layers[0].input_layernorm.register_forward_hook(
        # Probes at the start run in evaluation mode; the step trains.
        lambda module, *_: calls.append(1) if module.training else None
    )
    # With a limit that is given, no memory is measured.
    loss, gradient = one_step(checkpointed, 8, micro_batch_tokens=1000)
    assert len(calls) == 2, "nothing was recomputed"
    expected_loss, expected = one_step(plain, 8)
    assert loss == expected_loss
    assert all(torch.equal(gradient[n], expected[n]) for n in expected)
