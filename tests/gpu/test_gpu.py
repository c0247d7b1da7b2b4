"""Training on a CUDA device against the same training on a CPU in float32.

Tolerances, by largest difference of the losses of six steps, relative: float32 on both 5e-4 (sums
in another order, then six optimizer steps of it); bfloat16 2e-2. Attention by itself: 2e-2 in norm.
Run with `python -m pytest -n 0 tests/gpu -rs`; a table says what was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import NUM_TOKENS, tiny_model, tiny_tokenizer, write_model
from tiny_runs import command, lines, sums, write_rows
from truetune import SFTExample, SFTTrainer

FLOAT32, BFLOAT16 = 5e-4, 2e-2
# Heads as wide as kernels for GPUs take them.
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip


def rows() -> list[SFTExample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (9, 70, 200, 33, 150, 64, 300, 20, 11, 90, 41, 128):
        ids = torch.randint(1, 250, (length,), generator=generator).tolist()
        made.append(SFTExample(ids, [int(t > length // 3) for t in range(length)]))
    return made


def trees() -> list[SFTExample]:
    system, *rest = rows()[2:]
    question = rest[0].ids
    made = []
    for number, row in enumerate(rest):
        ids = system.ids + (question if number % 2 else []) + row.ids
        made.append(SFTExample(ids, [int(t > len(system.ids)) for t in range(len(ids))]))
    return made


def small(kind: str = "llama", **changes: Any) -> Any:
    model = tiny_model(kind, **(WIDE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(6)  # wide models need no larger weights to say something
    return model


def adapted(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(**(settings | changes)))


def losses(model: Any, device: str, examples: Any = None, **changes: Any) -> list[float]:
    settings: dict[str, Any] = {
        "examples": examples or rows(), "max_seq_len": 1024, "pad_id": 0, "batch_size": 6,
        "max_steps": 6, "max_lr": 1e-3, "micro_batch_tokens": 700,
    }  # fmt: skip
    made = SFTTrainer(model.to(device), **(settings | changes))
    found: list[float] = made.train()["train_loss"]
    assert made.route.kind == ("packed" if changes.get("packing", True) else "padded")
    return found


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


KINDS = {
    "full": (lambda: small(), {}),
    "lora": (lambda: adapted(small()), {}),
    "lora dropout": (lambda: adapted(small(), lora_dropout=0.2), {}),
    "dora": (lambda: adapted(small(), use_dora=True), {}),
    "trees": (lambda: adapted(small()), {"examples": trees}),
    "windows": (lambda: small("mistral", sliding_window=50), {}),
    "windows in trees": (lambda: small("mistral", sliding_window=50), {"examples": trees}),
    "soft caps": (lambda: small("gemma2", sliding_window=50, query_pre_attn_scalar=64), {}),
    "sinks": (
        lambda: small("gpt_oss", sliding_window=50, num_local_experts=4, num_experts_per_tok=2),
        {},
    ),
    "padded": (lambda: small(), {"packing": False}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses_are_those_of_a_cpu(kind: str, dtype: Any, note: Any) -> None:
    make, changes = KINDS[kind]
    changes = {name: v() if callable(v) else v for name, v in changes.items()}
    right = losses(make(), "cpu", **changes)
    made = losses(make(), "cuda", autocast_dtype=dtype, **changes)
    found = apart(made, right)
    note(f"{found:.1e} of {FLOAT32 if dtype is None else BFLOAT16:.0e}")
    assert found <= (FLOAT32 if dtype is None else BFLOAT16)


def test_recomputed_activations(note: Any) -> None:
    from truetune.model.lora import enable_gradient_checkpointing

    plain, again = adapted(small(), lora_dropout=0.2), adapted(small(), lora_dropout=0.2)
    enable_gradient_checkpointing(again)
    right = losses(plain, "cuda", autocast_dtype=torch.bfloat16)
    found = apart(losses(again, "cuda", autocast_dtype=torch.bfloat16), right)
    note(f"{found:.1e}")
    assert found <= 1e-3


@pytest.mark.parametrize("kind", ["full", "lora dropout", "trees", "soft caps"])
def test_fused_layers(kind: str, note: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By liger-kernel, in bfloat16 throughout, as the defaults have it: taken, and as near to a CPU
    as the model's own code."""
    pytest.importorskip("liger_kernel")
    from truetune.compute import fused

    make, changes = KINDS[kind]
    changes = {name: v() if callable(v) else v for name, v in changes.items()}
    right = losses(make(), "cpu", **changes)
    told: list[Any] = []
    wide = {"autocast_dtype": torch.bfloat16, "on_finding": told.append}
    made = losses(make().bfloat16(), "cuda", **changes, **wide)
    monkeypatch.setattr(fused, "liger", lambda: "")
    own = losses(make().bfloat16(), "cuda", **changes, **wide)
    note(f"{apart(made, right):.1e} by kernels, {apart(own, right):.1e} without; {told[0].what}")
    assert [finding.code for finding in told] == ["fused-parts"]
    assert "left out" not in told[0].what
    assert apart(made, right) <= 2 * BFLOAT16


def test_adamw_bf16(note: Any) -> None:
    right = losses(small(), "cpu")
    made = losses(small().bfloat16(), "cuda", optim="adamw_bf16")
    found = apart(made, right)
    note(f"{found:.1e} of {BFLOAT16:.0e}")
    assert found <= BFLOAT16


def test_split_adamw_is_adamw_bit_for_bit() -> None:
    from truetune.engine.split_adamw import SplitAdamW, joined

    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, 7, generator=generator).bfloat16() for n in (300, 1, 5000)]
    halves, wholes = (
        [torch.nn.Parameter(t.clone().cuda().to(d)) for t in starts]
        for d in (torch.bfloat16, torch.float32)
    )
    kinds: Any = {"lr": 1e-4, "weight_decay": 0.1}
    made = [SplitAdamW(halves, **kinds), torch.optim.AdamW(wholes, fused=True, **kinds)]
    for _ in range(20):
        for half, whole in zip(halves, wholes, strict=True):
            half.grad = torch.randn(half.shape, generator=generator).cuda().bfloat16()
            whole.grad = half.grad.float()
        for optimizer in made:
            optimizer.step()
    for half, whole in zip(halves, wholes, strict=True):
        low = made[0].state[half]["low"]
        assert torch.equal(joined(half.detach(), low), whole.detach())


@pytest.mark.parametrize("layer", ["rows", "trees", "window", "window in trees", "sinks"])
def test_attention_by_variable_length_calls(layer: str, note: Any) -> None:
    """The kernel of the device, forward and backward, against a softmax written out in float32."""
    from truetune.compute.cuda.varlen import kernel_for, varlen
    from truetune.compute.explicit import explicit_attention
    from truetune.compute.layout import Layout

    parents = (-1, 0, 1, 0, -1, 4, 4, 6) if "trees" in layer else (-1,) * 8
    layout = Layout((300, 40, 90, 8, 200, 1, 129, 64), parents)
    window = 100 if "window" in layer else None
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, n, layout.num_tokens, 64, generator=generator).bfloat16().cuda()
        for n in (8, 2, 2)
    ]
    assert kernel_for(*leaves), "the kernel was refused: see `_why_wrong`"
    sinks = torch.linspace(-1, 1, 8, device="cuda") if layer == "sinks" else None
    results = []
    for exact in (True, False):
        given = [(t.float() if exact else t).detach().requires_grad_() for t in leaves]
        if exact:
            q, k, v = (t[0] for t in given)
            out = explicit_attention(q, k, v, layout, window, 0.125, 0.0, None, sinks)
        else:
            out = varlen(*given, layout, window, 0.125, sinks)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    worst = max(
        float((made.detach().float() - right.detach()).norm() / right.detach().norm())
        for right, made in zip(*results, strict=True)
    )
    note(f"{worst:.1e} of 2e-2")
    assert worst <= 2e-2


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_by_flex(softcap: float | None, window: int | None, note: Any) -> None:
    """Over 12 layouts, float32, to 1e-4 in norm; compiled twice at most."""
    import random

    from torch._dynamo.utils import counters

    from truetune.compute.explicit import explicit_attention
    from truetune.compute.flex import flex
    from truetune.compute.layout import Layout

    draw, worst = random.Random(0), 0.0
    counters.clear()
    for _ in range(12):
        count = draw.randint(1, 6)
        layout = Layout(tuple(draw.randint(1, 300) for _ in range(count)), (-1, *range(count - 1)))
        leaves = [
            torch.randn(1, n, layout.num_tokens, 64, device="cuda").requires_grad_()
            for n in (4, 2, 2)
        ]
        q, k, v = (t[0] for t in leaves)
        right = explicit_attention(q, k, v, layout, window, 0.125, 0.0, softcap, None)
        made = flex(*leaves, layout, window, 0.125, softcap)
        pairs = zip(
            (made, *torch.autograd.grad(made.square().sum(), leaves)),
            (right, *torch.autograd.grad(right.square().sum(), leaves)),
            strict=True,
        )
        for a, b in pairs:
            worst = max(worst, float((a.detach() - b.detach()).norm() / b.detach().norm()))
    graphs = counters["stats"]["unique_graphs"]
    note(f"{worst:.1e} of 1e-4, {graphs} graphs")
    assert worst <= 1e-4
    assert graphs <= 2


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_footprint_is_what_a_step_takes(lora: bool, recomputed: bool, note: Any) -> None:
    """Within 15 %, on a batch several times as large as those that were measured."""
    import contextlib

    from truetune.compute.memory import footprint
    from truetune.compute.packing import pack
    from truetune.compute.route import find_route
    from truetune.model.lora import enable_gradient_checkpointing

    model = small(hidden_size=1024, intermediate_size=2816, head_dim=256, num_hidden_layers=8)
    model = (adapted(model) if lora else model).cuda()
    if recomputed:
        enable_gradient_checkpointing(model)
    route = find_route(model, longest=1024)
    made = footprint(route, contextlib.nullcontext, longest=1024)
    examples = [SFTExample([7] * 1025, [0] * 512 + [1] * 513) for _ in range(6)]
    batch = pack(examples, range(6), min_shared=None).to("cuda")
    model.train()
    for _ in range(2):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with route.scope(batch):
            route.loss_sum(batch).backward()
        taken = torch.cuda.max_memory_allocated() - before
    estimate = made.of(batch.num_computed) - made.process
    note(f"estimate {estimate / 2**20:,.0f} MiB, taken {taken / 2**20:,.0f} MiB")
    assert 0.85 * taken <= estimate / 1.1 <= 1.15 * taken


def test_products_are_added_up_in_float32(note: Any) -> None:
    """The gradient of a trained head, over its chunks."""
    from truetune.compute import private

    note(f"one product: {private._has_wide_products('cuda', torch.bfloat16)}")
    a, b = (torch.randn(s, device="cuda").bfloat16() for s in ((300, 4096), (4096, 200)))
    made, exact = torch.zeros(300, 200, device="cuda"), a.double() @ b.double()
    private.add_product_(made, a, b)
    limit = 1e-5 if private._has_wide_products("cuda", torch.bfloat16) else 1e-2
    assert (made - exact).norm() <= limit * exact.norm()


def test_a_step_waits_for_the_device_once(note: Any) -> None:
    """torch warns at each wait."""
    import warnings

    made = SFTTrainer(
        adapted(small(), lora_dropout=0.1).cuda(), examples=rows(), max_seq_len=1024, pad_id=0,
        batch_size=6, max_steps=9, max_lr=1e-3, micro_batch_tokens=300,
        autocast_dtype=torch.bfloat16,
    )  # fmt: skip
    for _ in range(2):
        made.train_step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    note(f"{len(waits)} waits {waits[:4]}")
    assert len(waits) <= 1, waits


def test_dropout_is_the_same_on_both_devices() -> None:
    from truetune.compute.dropout import dropped, salt, token_keys
    from truetune.compute.layout import Layout

    states = token_keys(list(range(300)), Layout((300,), (-1,))) + salt(1, 2, 3)
    for width, p in ((1024, 0.05), (13, 0.5)):
        assert torch.equal(dropped(states.cuda(), width, p).cpu(), dropped(states, width, p))


@pytest.mark.parametrize(
    "options",
    [("--lora",), ("--qlora",), ("--full",), ("--lora", "--add-token", "<think>")],
    ids=["lora", "qlora", "full", "new token"],
)
def test_a_run_from_rows_to_a_verified_artifact(
    tmp_path: Path, options: tuple[str, ...], note: Any
) -> None:
    """As a user has it: train, stop and resume, verify, export; against a CPU in float32."""
    if "--qlora" in options:
        pytest.importorskip("bitsandbytes")
    changes = WIDE | {"vocab_size": NUM_TOKENS + 3}
    model = write_model(tmp_path / "model", tokenizer=tiny_tokenizer(), **changes)
    data = write_rows(tmp_path / "rows.jsonl", sums(60))
    options = tuple(o for o in options if o != "--full")
    common = ("--max-steps", 8, "--save-steps", 4, "--seed", 3, "--lora-dropout", 0)
    if not options:
        common = common[:-2]

    def run(name: str, *more: Any) -> list[float]:
        shown = command("train", model, data, "-o", tmp_path / name, *options, *common, *more)
        assert shown.code == 0, shown.err + shown.out
        return [row["loss"] for row in lines(tmp_path / name / "metrics.jsonl") if "loss" in row]

    right = run("cpu", "--device", "cpu", "--dtype", "float32")
    made = run("cuda", "--device", "cuda")
    found = apart(made, right)
    note(f"{found:.1e} of {BFLOAT16:.0e}")
    assert found <= (0.1 if "--qlora" in options else BFLOAT16)
    verdict = json.loads((tmp_path / "cuda" / "verify.json").read_text())
    assert "failed" not in json.dumps(verdict)
    if options:
        shown = command("export", tmp_path / "cuda", "--merge", "-o", tmp_path / "merged")
        assert shown.code == 0, shown.err + shown.out


def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(note: Any) -> None:
    """To 1e-4: the device adds up gradients of attention in no fixed order."""
    import copy

    def trainer(model: Any) -> SFTTrainer:
        return SFTTrainer(
            model, examples=rows(), max_seq_len=1024, pad_id=0, batch_size=6, max_steps=6,
            max_lr=1e-3, autocast_dtype=torch.bfloat16,
        )  # fmt: skip

    made = trainer(adapted(small(), lora_dropout=0.2).cuda())
    for _ in range(3):
        made.train_step()
    weights, state = (
        copy.deepcopy(made.model.state_dict()),
        copy.deepcopy(made.optimizer.state_dict()),
    )
    right = [made.train_step()["loss"] for _ in range(3)]
    again = trainer(adapted(small(), lora_dropout=0.2).cuda())
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(state)
    again.step = 3
    found = apart([again.train_step()["loss"] for _ in range(3)], right)
    note(f"{found:.1e} of 1e-4")
    assert found <= 1e-4


def test_out_of_memory_halves_the_pass_and_goes_on(note: Any) -> None:
    found: list[Any] = []
    model = adapted(small()).cuda()
    made = SFTTrainer(
        model, examples=[SFTExample([5] * 1000, [0] * 500 + [1] * 500) for _ in range(64)],
        max_seq_len=1024, pad_id=0, batch_size=64, max_steps=2, max_lr=1e-3,
        micro_batch_tokens=64_000, on_finding=found.append,
    )  # fmt: skip
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + 2**30) / total, device
    )
    try:
        loss = made.train_step()["loss"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    note(f"loss {loss:.3f}, {[f.code for f in found]}")
    assert "out-of-memory" in [f.code for f in found]


def test_layers_of_four_bits_are_one_function(tmp_path: Path, note: Any) -> None:
    """Proved on the device against peft's forward, as `find_adapters` does."""
    pytest.importorskip("bitsandbytes")
    from truetune.compute.adapter import find_adapters
    from truetune.model.load import load_model
    from truetune.model.lora import LoraSettings, add_lora

    folder = write_model(tmp_path / "model", tokenizer=tiny_tokenizer(), **WIDE)
    loaded = load_model(folder, purpose="lora", device="cuda", load_in="4bit")
    model = add_lora(loaded, LoraSettings(r=8), seed=0).model
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    found = find_adapters(model)
    note(f"{len(found)} of {len(layers)} layers")
    assert len(found) == len(layers) > 0
