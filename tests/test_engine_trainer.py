"""The loop: arguments, learning rate, steps, evaluation, history, and when it refuses to step."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from tiny_models import tiny_model
from truetune import SFTExample, SFTTrainer
from truetune.behaviour.steps import StepFacts, non_finite
from truetune.compute.batch import pad_and_collate
from truetune.compute.loss import cross_entropy_sum
from truetune.compute.route import Route
from truetune.errors import NonFiniteLoss, OutOfMemory, TruetuneError
from truetune.findings import Finding
from truetune.model.lora import enable_gradient_checkpointing

pytestmark = pytest.mark.filterwarnings("error")

VOCABULARY = 11


class Plain(torch.nn.Module):
    """ids (B, T) to logits (B, T, V), without any Hugging Face habit."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embed = torch.nn.Embedding(VOCABULARY, 6)
            self.norm = torch.nn.LayerNorm(6)
            self.head = torch.nn.Linear(6, VOCABULARY)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids_BT)))


def rows(count: int = 7, seed: int = 0) -> list[SFTExample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        length = 3 + row % 4
        ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        made.append(SFTExample(ids, [0] + [int((row + t) % 3 > 0) for t in range(1, length)]))
    return made


def trainer(model: torch.nn.Module | None = None, **changes: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "examples": rows(),
        "max_seq_len": 8,
        "pad_id": 0,
        "batch_size": 3,
        "max_steps": 4,
        "max_lr": 0.01,
    }
    return SFTTrainer(model if model is not None else Plain(), **(settings | changes))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def token_mean(model: torch.nn.Module, examples: list[SFTExample]) -> float:
    """Row by row, token by token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in examples:
            output = model(torch.tensor([ids]))
            logits = (output.logits if hasattr(output, "logits") else output)[0].double()
            for t in range(1, len(ids)):
                if mask[t]:
                    total -= float(logits[t - 1].log_softmax(-1)[ids[t]])
                    count += 1
    return total / count


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": []}, "at least one example"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -2}, "batch_size"),
        ({"max_seq_len": 1}, "max_seq_len"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"micro_batch_size": -1}, "micro_batch_size"),
        ({"epochs": 1, "max_steps": 4}, "epochs=1 ends after 3 steps, but max_steps is 4"),
        ({"optim": "adam"}, "adamw, adamw_bf16, adamw_8bit, paged_adamw_8bit, sgd"),
        ({"lr_scheduler_type": "Cosine"}, "cosine, linear, constant"),
    ],
)
def test_refused_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        trainer(Plain().requires_grad_(False))


def test_public_attributes() -> None:
    made = trainer(batch_size=2, max_steps=9)
    assert (made.step, made.max_steps, made.batch_size) == (0, 9, 2)
    assert isinstance(made.optimizer, torch.optim.Optimizer)
    made.train_step()
    assert made.step == 1


# ---------------------------------------------------------------- learning rate


def test_lr_warms_up_and_falls_to_min_lr() -> None:
    made = trainer(max_lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=12)
    assert [made.lr(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 13):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 8))
        assert made.lr(step) == pytest.approx(expected, abs=1e-12)
    assert made.lr(4) == 1.0
    assert made.lr(8) == pytest.approx(0.55)
    assert made.lr(12) == pytest.approx(0.1, abs=1e-12)
    assert made.lr(1000) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 0), (1, 1), (5, 5), (9, 3)])
def test_lr_at_the_edges(warmup: int, total: int) -> None:
    made = trainer(max_lr=2.0, warmup_steps=warmup, max_steps=total)
    assert made.lr(0) == pytest.approx(2.0 / max(warmup, 1))
    for step in range(warmup):
        assert made.lr(step) == pytest.approx(2.0 * (step + 1) / warmup)
    assert made.lr(max(warmup, total) + 1) == pytest.approx(0.0, abs=1e-12)


def test_linear_and_constant_schedules() -> None:
    kind = {"max_lr": 1.0, "min_lr": 0.2, "warmup_steps": 2, "max_steps": 6}
    linear = trainer(lr_scheduler_type="linear", **kind)
    assert [linear.lr(s) for s in range(7)] == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])
    constant = trainer(lr_scheduler_type="constant", **kind)
    assert [constant.lr(s) for s in range(7)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])


def test_lr_without_a_step_is_that_of_the_coming_one() -> None:
    made = trainer(warmup_steps=2)
    for step in range(4):
        assert made.lr() == made.lr(step)
        assert made.train_step()["lr"] == made.lr(step)
        assert {group["lr"] for group in made.optimizer.param_groups} == {made.lr(step)}


# ---------------------------------------------------------------- one step


def test_a_step_is_gradient_descent_on_the_token_mean() -> None:
    model = Plain()
    made = trainer(model, batch_size=7, optim="sgd", grad_clip=0, max_lr=0.5)
    twin = copy.deepcopy(model)
    x, y, mask = pad_and_collate(rows(), max_seq_len=8, pad_id=0)
    loss = cross_entropy_sum(twin(x), y, mask) / mask.sum()
    loss.backward()
    facts = made.train_step()
    assert set(facts) == {"loss", "lr", "grad_norm"}
    assert all(type(value) is float for value in facts.values())
    assert facts["loss"] == pytest.approx(token_mean(twin, rows()), abs=1e-6)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters()))
    assert facts["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for after, before in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad, atol=1e-7, rtol=1e-6)


def test_gradients_from_outside_the_loop_are_no_part_of_a_step() -> None:
    clean, stained = Plain(), Plain()
    stained(torch.tensor([[1, 2]])).sum().backward()
    first, second = trainer(clean), trainer(stained)
    assert first.train_step() == second.train_step()
    assert same(weights(clean), weights(stained))
    assert all(p.grad is None for p in stained.parameters())


def test_grad_clip_bounds_the_update_and_reports_the_norm_before_it() -> None:
    model = Plain()
    before = weights(model)
    made = trainer(model, optim="sgd", max_lr=1.0, lr_scheduler_type="constant", grad_clip=0.01)
    facts = made.train_step()
    moved = sum(float((p - before[n]).square().sum()) for n, p in weights(model).items())
    assert facts["grad_norm"] > 0.1
    assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_is_on_matrices_alone() -> None:
    model = Plain()
    before = weights(model)
    examples = [SFTExample([1, 2, 3], [0, 0, 0])]
    made = trainer(
        model, examples=examples, optim="sgd", weight_decay=0.5, max_lr=0.1, batch_size=1
    )
    made.train_step()
    after = weights(model)
    for name, value in before.items():
        expected = value * (1 - 0.1 * 0.5) if value.ndim == 2 else value
        torch.testing.assert_close(after[name], expected, atol=0, rtol=1e-6)
    assert {n for n in before if before[n].ndim == 2} == {"embed.weight", "head.weight"}
    decays = {
        g["weight_decay"]: len(g["params"])
        for g in trainer(weight_decay=0.5).optimizer.param_groups
    }
    assert decays == {0.5: 2, 0.0: 3}


def test_frozen_parameters_stay() -> None:
    model = Plain()
    model.embed.requires_grad_(False)
    before = weights(model)
    made = trainer(model, weight_decay=0.1)
    made.train()
    after = weights(model)
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_a_step_without_targets_has_loss_zero() -> None:
    model = Plain()
    before = weights(model)
    made = trainer(model, examples=[SFTExample([1, 2], [1, 0]), SFTExample([3], [1])])
    facts = made.train_step()
    assert (facts["loss"], facts["grad_norm"]) == (0.0, 0.0)
    assert same(before, weights(model))


def test_the_facts_of_a_step() -> None:
    seen: list[StepFacts] = []
    made = trainer(on_step=seen.append, max_steps=2, batch_size=7, micro_batch_size=2)
    made.train()
    assert [facts.step for facts in seen] == [1, 2]
    for facts in seen:
        assert sorted(facts.rows) == list(range(7))
        assert facts.num_tokens == sum(len(e.ids) for e in rows())
        assert facts.num_supervised == sum(e.num_supervised for e in rows())
        assert facts.seconds > 0


# ---------------------------------------------------------------- non-finite


class Breaks(Plain):
    """Writes NaN, or a number that overflows the gradient, from a chosen call on."""

    def __init__(self, value: float, call: int) -> None:
        super().__init__()
        self.value, self.left = value, call

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        logits = super().forward(ids_BT)
        return logits * self.value if self.left < 0 else logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_optimizer(value: float) -> None:
    model = Breaks(value, call=2)
    made = trainer(model, batch_size=4)
    made.train_step()
    made.train_step()
    before, state = weights(model), copy.deepcopy(made.optimizer.state_dict())
    with pytest.raises(NonFiniteLoss) as caught:
        made.train_step()
    assert same(before, weights(model))
    after = made.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for index, moments in state["state"].items():
        assert same(moments, after["state"][index])
    assert made.step == 2
    assert sorted(caught.value.rows) == sorted(made.batcher.order.rows(2))
    assert all(str(row) in caught.value.where for row in caught.value.rows)
    assert "step 3" in str(caught.value)
    assert caught.value.code == "non-finite"
    assert isinstance(caught.value, TruetuneError)
    assert all(p.grad is None for p in model.parameters())


def test_a_non_finite_gradient_under_a_finite_loss_stops_too() -> None:
    model = Plain()
    model.embed.weight.register_hook(lambda gradient: gradient * math.nan)
    before = weights(model)
    with pytest.raises(NonFiniteLoss, match="gradient norm is nan"):
        trainer(model, grad_clip=0).train_step()
    assert same(before, weights(model))


def test_the_non_finite_probe_takes_finite_numbers() -> None:
    facts = StepFacts(3, 1.0, 0.1, 2.0, 10, 5, 0.0, (4, 7))
    assert non_finite(facts) is None
    found = non_finite(StepFacts(3, 1.0, 0.1, math.inf, 10, 5, 0.0, (4, 7)))
    assert found is not None
    assert (found.code, found.level, found.where) == ("non-finite", "error", "rows 4, 7")
    assert found.what.startswith("gradient norm is inf at step 3")


def test_a_probe_stops_on_an_error_alone() -> None:
    def probe(level: Any) -> Any:
        return lambda facts: Finding("mine", level, f"at {facts.step}") if facts.step == 2 else None

    assert trainer(probes=[probe("warning")]).train()["step"] == [1, 2, 3, 4]
    told: list[Any] = []
    trainer(probes=[probe("warning")], on_finding=told.append).train()
    assert [finding.what for finding in told] == ["at 2"]
    stopped = trainer(probes=[non_finite, probe("error")])
    with pytest.raises(TruetuneError, match="at 2") as caught:
        stopped.train()
    assert caught.value.code == "mine"
    assert stopped.step == 1


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("micro", [None, 1, 2, 5])
def test_evaluate_is_the_mean_over_tokens(micro: int | None) -> None:
    model, held_out = Plain(), rows(9, seed=5)
    made = trainer(model, micro_batch_size=micro, eval_iters=0)
    means = [token_mean(model, [row]) for row in held_out]
    expected = token_mean(model, held_out)
    assert made.evaluate(held_out) == pytest.approx(expected, abs=1e-6)
    assert abs(sum(means) / len(means) - expected) > 1e-3


def test_evaluate_stops_after_eval_iters_batches_in_order() -> None:
    model, held_out = Plain(), rows(9, seed=5)
    made = trainer(model, batch_size=2, eval_iters=3)
    assert made.evaluate(held_out) == pytest.approx(token_mean(model, held_out[:6]), abs=1e-6)


def test_evaluate_refuses_an_empty_list() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        trainer().evaluate([])


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_without_dropout_and_restores_the_mode(training: bool) -> None:
    class Dropping(Plain):
        modes: list[bool]

        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            self.modes.append(self.training)
            return torch.nn.functional.dropout(super().forward(ids_BT), 0.5, self.training)

    model = Dropping().train(training)
    model.modes = []
    made = trainer(model)
    before, state = weights(model), torch.get_rng_state()
    assert made.evaluate(rows()) == pytest.approx(made.evaluate(rows()), abs=0)
    assert set(model.modes) == {False}
    assert model.training is training
    assert same(before, weights(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_restores_the_mode_after_a_failure() -> None:
    model = Plain()
    with pytest.raises(IndexError):
        trainer(model).evaluate([SFTExample([1, VOCABULARY, 2], [0, 1, 1])])
    assert model.training


# ---------------------------------------------------------------- train


def test_history() -> None:
    evaluated: list[tuple[int, float]] = []
    made = trainer(
        max_steps=7, log_every=3, eval_every=2, on_eval=lambda *facts: evaluated.append(facts)
    )
    history = made.train(rows(3, seed=9))
    assert list(history) == ["step", "train_loss", "lr", "grad_norm", "val_step", "val_loss"]
    assert history["step"] == [3, 6, 7]
    assert history["lr"] == [made.lr(2), made.lr(5), made.lr(6)]
    assert [len(history[key]) for key in ("train_loss", "grad_norm")] == [3, 3]
    assert history["val_step"] == [2, 4, 6, 7]
    assert evaluated == list(zip(history["val_step"], history["val_loss"], strict=True))
    assert history["val_loss"][-1] == made.evaluate(rows(3, seed=9))


def test_history_of_every_step_is_what_the_steps_return() -> None:
    history, single = trainer().train(), trainer()
    steps = [single.train_step() for _ in range(4)]
    assert history["step"] == [1, 2, 3, 4]
    assert history["train_loss"] == [facts["loss"] for facts in steps]
    assert history["grad_norm"] == [facts["grad_norm"] for facts in steps]
    assert history["lr"] == [facts["lr"] for facts in steps]
    assert (history["val_step"], history["val_loss"]) == ([], [])


@pytest.mark.parametrize("never", [0, 100])
def test_the_last_step_is_always_logged_and_evaluated(never: int) -> None:
    history = trainer(log_every=never, eval_every=never).train(rows(2))
    assert (history["step"], history["val_step"]) == ([4], [4])


def test_no_evaluation_without_examples() -> None:
    assert trainer(eval_every=1).train([])["val_step"] == []


def test_train_goes_on_from_the_step_it_is_at() -> None:
    made = trainer()
    made.train_step()
    assert made.train()["step"] == [2, 3, 4]
    assert made.train()["step"] == []


def test_a_requested_stop_ends_after_the_step() -> None:
    made = trainer()
    made.on_step = lambda facts: setattr(made, "stop_requested", facts.step == 2)
    assert made.train()["step"] == [1, 2]
    assert made.step == 2


def test_training_learns_its_rows() -> None:
    made = trainer(max_steps=150, max_lr=0.1)
    history = made.train()
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]


@pytest.mark.parametrize("changes", [{}, {"optim": "sgd"}, {"micro_batch_size": 2}])
def test_the_same_seed_repeats_bit_for_bit(changes: dict[str, Any]) -> None:
    models = [Plain(), Plain()]
    first, second = (trainer(m, seed=5, **changes).train() for m in models)
    assert first == second
    assert same(weights(models[0]), weights(models[1]))


def test_another_seed_is_another_row_order() -> None:
    orders = set()
    for seed in range(3):
        seen: list[tuple[int, ...]] = []
        made = trainer(
            seed=seed, batch_size=1, max_steps=7, on_step=lambda f, seen=seen: seen.append(f.rows)
        )
        made.train()
        assert sorted(row for (row,) in seen) == list(range(7))
        orders.add(tuple(seen))
    assert len(orders) == 3


def test_a_batcher_of_ones_own_is_asked_by_step() -> None:
    made = trainer()
    inner, asked = made.batcher, []

    class Recording:
        def micro_batches(self, step: int) -> Any:
            asked.append(step)
            return inner.micro_batches(step)

        def batches(self, examples: Any) -> Any:
            return inner.batches(examples)

    again = trainer(batcher=Recording())
    assert again.train() == trainer().train()
    assert asked == [0, 1, 2, 3]


def test_an_overlong_row_loses_its_end_with_a_warning() -> None:
    made = trainer(examples=[SFTExample([1, 2, 3, 4], [0, 1, 1, 1])], max_seq_len=3, batch_size=1)
    with pytest.warns(UserWarning, match=r"1 of 1 rows .* max_seq_len=3"):
        facts = made.train_step()
    fresh = Plain()
    assert facts["loss"] == pytest.approx(
        token_mean(fresh, [SFTExample([1, 2, 3], [0, 1, 1])]), abs=1e-6
    )


def test_a_hugging_face_model_trains() -> None:
    model = tiny_model(vocab_size=VOCABULARY, eos_token_id=1)
    made = trainer(model, max_steps=12, max_lr=3e-3, eval_iters=0)
    assert made.evaluate(rows()) == pytest.approx(token_mean(model.eval(), rows()), abs=1e-5)
    before = made.evaluate(rows())
    made.train()
    assert made.evaluate(rows()) < before


def test_autocast_computes_in_the_other_type_and_keeps_the_weights() -> None:
    seen = []

    class Watching(Plain):
        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            logits = super().forward(ids_BT)
            seen.append(logits.dtype)
            return logits

    model = Watching()
    made = trainer(model, autocast_dtype=torch.bfloat16, max_steps=2)
    made.train(rows(2))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {v.dtype for s in made.optimizer.state.values() for v in s.values()} == {torch.float32}


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("packing", "error"),
    [
        (True, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (False, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (True, MemoryError()),
    ],
    ids=["packed", "padded", "Python's own"],
)
def test_a_row_that_does_not_fit_is_named(
    packing: bool, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller and smaller micro-batches, then the row; no weight has moved."""
    model = tiny_model()
    before = weights(model)
    made = trainer(model, packing=packing, batch_size=7)
    compute = Route.loss_sum

    def limited(route: Route, batch: Any) -> torch.Tensor:
        if 4 in batch.rows:
            raise error
        return compute(route, batch)

    monkeypatch.setattr(Route, "loss_sum", limited)
    with pytest.raises(OutOfMemory) as caught:
        made.train_step()
    assert (caught.value.rows, caught.value.where) == ((4,), "rows 4")
    assert caught.value.code == "row-too-large"
    assert same(before, weights(model))
    assert made.step == 0


def test_another_runtime_error_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()

    def broken(route: Route, batch: Any) -> torch.Tensor:
        raise RuntimeError("sizes differ")

    monkeypatch.setattr(Route, "loss_sum", broken)
    with pytest.raises(RuntimeError, match="sizes differ"):
        made.train_step()


PAGES = """
import resource, torch
from truetune.engine.memory import give_freed_pages_back, keep_freed_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_pages()
found = [faults() for _ in range(12)]  # the heap first grows a few times around what lies in it
give_freed_pages_back()
print(kept, sum(found[-3:]), faults())
"""


def test_freed_pages_are_kept_where_the_c_library_can() -> None:
    """A block beyond the 32 MB that glibc would map anew comes back without a page fault.

    In a process of its own: what other tests leave lying in the heap decides where a block goes.
    """
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    kept, again, given_back = done.stdout.split()
    if kept == "False":
        pytest.skip("no glibc")
    assert int(again) < 100
    assert int(given_back) > 1000


def test_gradients_stand_at_places_of_their_own_where_activations_are_recomputed() -> None:
    """The same places in every step, and none for a parameter that no row reaches."""
    model = tiny_model()
    enable_gradient_checkpointing(model)
    spare = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("spare", spare)
    seen: list[dict[str, int]] = []

    def note(_: Any) -> None:
        grads = {name: p.grad for name, p in model.named_parameters()}
        seen.append({name: g.data_ptr() for name, g in grads.items() if g is not None})

    trainer = SFTTrainer(
        model,
        examples=rows(4),
        max_seq_len=32,
        pad_id=0,
        batch_size=4,
        micro_batch_size=2,
        max_steps=2,
        max_lr=1e-3,
        probes=[note],
    )
    trainer.train()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 5
    assert "spare" not in seen[0]
    assert torch.equal(spare, torch.ones(3))
    del trainer
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p is not spare)
