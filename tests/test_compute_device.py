"""Every way that is taken on CUDA alone, walked on a device that is not there (device_on_cpu.py):
no tensor of the CPU meets one of the device, a step waits for it once, and losses are those of the
CPU. What the device's own kernels compute is left to tests/gpu."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model  # bitsandbytes with it, before there is a device

from device_on_cpu import DEVICE, device
from liger_on_cpu import STAND_IN
from tiny_models import NUM_TOKENS, tiny_model, tiny_tokenizer, write_model
from tiny_runs import command, lines, sums, write_rows
from truetune import SFTExample, SFTTrainer, compare
from truetune.compute import fused
from truetune.compute.cuda import varlen
from truetune.model.lora import enable_gradient_checkpointing

pytestmark = pytest.mark.filterwarnings("error", "ignore:.*is_gradient_checkpointing")


@pytest.fixture(autouse=True, scope="module")
def asked_anew() -> Iterator[None]:
    """What the kernel computes is proved once for all tests here, and by nobody else's kernel."""
    varlen._chosen.cache_clear()
    yield
    varlen._chosen.cache_clear()


# Wide enough for the kernel.
SHAPE = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def row(*lengths: int) -> SFTExample:
    ids = [1 + (7 * n + t * t) % 200 for n in lengths for t in range(n)]
    return SFTExample(ids, [0] * lengths[0] + [1] * (len(ids) - lengths[0]))


ROWS = [row(4, 9), row(2, 30), row(12, 3), row(7, 7)]
TREES = [row(30, n, m) for n in (20, 9) for m in (3, 5)] + [row(40, 9)]


def lora(model: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 3, "target_modules": "all-linear"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(**(settings | changes)))


def small(kind: str = "llama", **changes: Any) -> Any:
    return tiny_model(kind, **(SHAPE | changes))


def recomputed() -> Any:
    model = lora(small(), lora_dropout=0.3)
    enable_gradient_checkpointing(model)
    return model


def new_rows() -> Any:
    from truetune.model.new_tokens import use_row_layers

    model = lora(small(), trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 9]})
    use_row_layers(model)
    return model


WINDOW = {"sliding_window": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HALF = {"autocast_dtype": torch.bfloat16}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "all weights": (lambda: small(), {}),
    "LoRA with dropout": (
        lambda: lora(small(), lora_dropout=0.3),
        HALF | {"micro_batch_tokens": None},
    ),
    "DoRA": (lambda: lora(small(), use_dora=True), HALF),
    "trees": (lambda: lora(small(), lora_dropout=0.3), HALF | {"examples": TREES}),
    "windows in trees": (lambda: small("mistral", **WINDOW), HALF | {"examples": TREES}),
    "windows in float32": (lambda: small("mistral", **WINDOW), {"examples": TREES}),
    "soft caps": (lambda: small("gemma2", **WINDOW, query_pre_attn_scalar=16), HALF),
    "sinks": (lambda: small("gpt_oss", **WINDOW, **EXPERTS), HALF),
    "new tokens": (new_rows, HALF),
    "halves": (lambda: small().bfloat16(), {"optim": "adamw_bf16"}),
    "recomputed": (recomputed, {}),
    "padded": (lambda: lora(small()), HALF | {"packing": False}),
}


def trainer(model: Any, **changes: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "examples": ROWS, "max_seq_len": 128, "pad_id": 0, "batch_size": 4, "max_steps": 9,
        "max_lr": 1e-2, "grad_clip": 1e9, "micro_batch_tokens": 40,
    }  # fmt: skip
    return SFTTrainer(model, **(settings | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_a_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps and an evaluation."""
    make, changes = KINDS[kind]
    held_out = changes.get("examples", ROWS)[:2]
    usual = trainer(make(), **changes)
    right = [usual.train_step()["loss"] for _ in range(2)] + [usual.evaluate(held_out)]
    # Little is free where the footprint is to be measured, by the allocator's counts.
    with device(monkeypatch, free=2**30 if kind == "LoRA with dropout" else 2**40) as there:
        model = make().to("cuda")
        made = trainer(model, **changes)
        assert made.device == DEVICE
        assert ("footprint" in vars(made)) == (kind == "LoRA with dropout")
        assert made.route.kind == usual.route.kind
        assert len(made.route.adapters) == len(usual.route.adapters)
        losses = []
        for _ in range(2):
            there.waits.clear()
            losses.append(made.train_step()["loss"])
            # Experts and padding are transformers' own.
            assert there.waits == ["tolist"] or kind in ("sinks", "padded")
        losses.append(made.evaluate(held_out))
    rounded = "autocast_dtype" in changes or kind == "halves"
    assert losses == pytest.approx(right, rel=2e-2 if rounded else 1e-4)


def test_a_tensor_that_was_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the walks rest on."""
    with device(monkeypatch) as there:
        one = torch.ones(3, device="cuda") + 1
        assert one.is_cuda
        assert one.sum().device == DEVICE
        assert one.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="same device"):
            one + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(3, 2)(one)
        assert one.to("cuda").tolist() == [2, 2, 2]
        assert there.waits == ["cpu", "tolist"]


@pytest.mark.parametrize("kind", ["all weights", "trees", "recomputed", "halves"])
def test_steps_by_fused_kernels_on_a_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proved and told at the start; a step waits once, and has the losses of a CPU."""
    make, changes = KINDS[kind]
    usual = trainer(make(), **changes)
    right = [usual.train_step()["loss"] for _ in range(2)]
    told: list[Any] = []
    with device(monkeypatch) as there:
        monkeypatch.setattr(fused, "liger", lambda: STAND_IN)
        made = trainer(make().to("cuda"), **changes, on_finding=told.append)
        losses = []
        for _ in range(2):
            there.waits.clear()
            losses.append(made.train_step()["loss"])
            assert there.waits == ["tolist"]
    assert [finding.code for finding in told] == ["fused-parts"]
    assert told[0].what.endswith("RMSNorm (5 of 5), SwiGLU (2 of 2), RoPE (1 of 1)")
    assert losses == pytest.approx(right, rel=2e-2 if kind in ("trees", "halves") else 1e-5)


class Library:
    """torch's swap of its flash attention for that of a package."""

    def __init__(self, fails: str = "", chosen: str | None = None) -> None:
        self.fails, self.chosen, self.swaps = fails, chosen, 0

    def list_flash_attention_impls(self) -> list[str]:
        return ["FA3", "FA4"]

    def current_flash_attention_impl(self) -> str | None:
        return self.chosen

    def activate_flash_attention_impl(self, name: str) -> None:
        assert name == "FA3"
        if self.fails == "missing":
            raise ModuleNotFoundError("No module", name="flash_attn_interface")
        if self.fails == "built for another torch":
            raise ImportError("undefined symbol")
        self.chosen, self.swaps = name, self.swaps + 1

    def restore_flash_attention_impl(self) -> None:
        self.chosen = None


@pytest.mark.parametrize(
    ("library", "told", "swapped"),
    [
        (Library(), "2 of 2 layers", True),
        (Library("wrong"), "0 of 2 layers: its results differ from", True),
        (Library("raises"), "0 of 2 layers: it fails: FA3 requires", True),
        (Library("built for another torch"), "0 of 2 layers: it cannot be loaded: Imp", False),
        (Library(chosen="FA4"), "0 of 2 layers: the program has chosen FA4", False),
        (Library("missing"), "", False),
        (object(), "", False),  # torch before 2.10
    ],
)
def test_flash_attention_3_is_used_where_it_is_right(
    library: Any, told: str, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is active during a call alone, computes every step if its proof holds, and is told."""
    before = library.chosen if isinstance(library, Library) else None
    right = trainer(small(), **HALF).train_step()["loss"]
    active: list[str | None] = []
    found: list[Any] = []
    with device(monkeypatch) as there:
        own = varlen.Flash

        class Swapped(own):  # type: ignore[misc, valid-type]
            def forward(self, *given: Any) -> Any:
                now = getattr(library, "chosen", None)
                active.append(now)
                if now == "FA3" and library.fails == "raises":
                    raise RuntimeError("FA3 requires compute capability 9.0")
                out, lse = super().forward(*given)
                return out, lse * 1.1 if now == "FA3" and library.fails == "wrong" else lse

            def backward(self, *given: Any) -> Any:
                active.append(getattr(library, "chosen", None))
                return super().backward(*given)

        monkeypatch.setattr(varlen, "Flash", Swapped)
        monkeypatch.setattr(varlen.flash3, "library", library)
        varlen.flash3.why_not.cache_clear()
        varlen._chosen.cache_clear()
        made = trainer(small().to("cuda"), **HALF, on_finding=found.append)
        active.clear()
        there.waits.clear()
        loss = made.train_step()["loss"]
        assert there.waits == ["tolist"]
        varlen.flash3.why_not.cache_clear()
        varlen._chosen.cache_clear()
    notes = [f.what for f in found if f.code == "flash-attention-3"]
    assert [what.partition(" attention of ")[2][: len(told)] for what in notes] == [told] * bool(
        told
    )
    assert set(active) == {"FA3" if told == "2 of 2 layers" else before}
    assert not isinstance(library, Library) or library.chosen == before
    assert not isinstance(library, Library) or (library.swaps > 0) == swapped
    assert loss == pytest.approx(right, rel=2e-2)


def test_the_next_step_is_packed_before_the_host_waits() -> None:
    """And it is the step that would have been packed then, also where the run goes elsewhere."""
    made, alone = trainer(lora(small())), trainer(lora(small()))
    asked: list[str] = []
    own, clip = made.batcher.micro_batches, made._clip

    def micro_batches(step: int) -> Any:
        asked.append(f"pack {step}")
        return own(step)

    def waiting(summed: Any) -> Any:
        asked.append("wait")
        return clip(summed)

    made.batcher.micro_batches, made._clip = micro_batches, waiting  # type: ignore[method-assign]
    losses = [made.train_step()["loss"] for _ in range(2)]
    assert asked == ["pack 0", "pack 1", "wait", "pack 2", "wait"]
    assert losses == [alone.train_step()["loss"] for _ in range(2)]
    asked.clear()
    made.step = 8
    made.train_step()
    assert asked == ["pack 8", "wait"], "the last one"


@pytest.mark.parametrize(
    ("version", "before", "name"),
    [
        ("2.8.0", {}, "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.13.0+cu130", {}, "PYTORCH_ALLOC_CONF"),
        ("2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ""),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(
    version: str, before: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truetune.model import placement

    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(placement.sys, "platform", "linux")
    monkeypatch.setattr(placement.importlib.metadata, "version", lambda _: version)
    environment = dict(before)
    monkeypatch.setattr(placement.os, "environ", environment)
    placement.choose_device("cpu")
    assert environment == before
    placement.choose_device("auto")
    wanted = before | ({name: "expandable_segments:True"} if name else {})
    assert {n: environment[n] for n in names if n in environment} == wanted


def test_the_heads_chunks_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger ones, and no float32 copy of one: loss and gradients are those of all at once."""
    from truetune.compute import head
    from truetune.compute.loss import cross_entropy_sum

    monkeypatch.setattr(head, "BLOCK_BYTES_DEVICE", 4 * 50 * 3)
    assert head._chunk_rows(152_000, torch.bfloat16, DEVICE) == 1766
    assert head._chunk_rows(32_000, torch.bfloat16, DEVICE) == 4096
    assert head._chunk_rows(152_000, torch.bfloat16, torch.device("cpu")) == 512
    supervised = head.SupervisedHead(torch.nn.Linear(8, 50), head.Tail())
    chunk = 50 * 4
    assert supervised.buffer_bytes(nullcontext) == 512 * chunk
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (10, 50))
    targets, weights = torch.arange(10), torch.linspace(1, 2, 10)
    right = cross_entropy_sum(hidden @ weight.t(), targets, weights)
    wanted = [right, *torch.autograd.grad(right, [hidden, weight])]
    with device(monkeypatch) as there:
        h, w, t, s = (x.detach().to("cuda") for x in (hidden, weight, targets, weights))
        on_device = head.SupervisedHead(torch.nn.Linear(8, 50).to("cuda"), head.Tail())
        assert on_device.buffer_bytes(nullcontext) == 4096 * chunk + 2 * head.BLOCK_BYTES_DEVICE
        leaves = [h.requires_grad_(), w.requires_grad_()]
        loss = head.fused_cross_entropy_sum(h, head.Matrix(w), head.Tail(), t, s)
        made = [loss, *torch.autograd.grad(loss, leaves)]
        assert there.waits == []
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--lora", "--add-token", "<think>"), ()])
def test_a_whole_run_on_a_device(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, probes, answers, training, saving and reloading; the fresh process has no device."""
    import transformers

    import truetune.model.placement
    import truetune.run.pipeline

    kind = transformers.AutoModelForCausalLM
    own = kind.from_pretrained

    def loaded(*arguments: Any, **settings: Any) -> Any:
        # Weights come by the CPU: accelerate would ask the driver.
        settings.pop("device_map", None)
        made = own(*arguments, **settings)
        return (made[0].to("cuda"), *made[1:]) if isinstance(made, tuple) else made.to("cuda")

    folder = write_model(
        tmp_path / "model", tokenizer=tiny_tokenizer(), **SHAPE | {"vocab_size": NUM_TOKENS + 3}
    )
    rows = write_rows(tmp_path / "rows.jsonl", sums(30))
    monkeypatch.setattr(kind, "from_pretrained", loaded)
    monkeypatch.setattr(truetune.run.pipeline, "verify", lambda *_, **__: None)
    monkeypatch.setattr(truetune.model.placement, "_why_no_cuda", lambda: "")
    with device(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = command(
            "train", folder, rows, "-o", tmp_path / "run", *options, "--max-steps", 2,
            "--device", "cuda",
        )  # fmt: skip
    assert shown.code == 0, shown.err
    losses = [r["loss"] for r in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_predictions_are_judged_where_the_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax over the vocabulary would take the host as long as the device takes for the row."""
    rows = [(row(4, 9).ids, row(4, 9).mask), (row(2, 30).ids, row(2, 30).mask)]
    probes = [compare.Probe(tuple(ids), (3, 7)) for ids, _ in rows]

    def judged(model: Any, on: torch.device) -> Any:
        loaded: Any = SimpleNamespace(
            model=model, transformers_model=model, device=on, compute_dtype=None
        )
        top = compare.read(loaded, probes).top
        return compare.measure(loaded, rows), compare.read(loaded, probes, top)

    right = judged(small(), torch.device("cpu"))
    own, places = torch.Tensor.log_softmax, []

    def log_softmax(logits: torch.Tensor, **settings: Any) -> torch.Tensor:
        places.append(logits.device)
        return own(logits, **settings)

    monkeypatch.setattr(torch.Tensor, "log_softmax", log_softmax)
    with device(monkeypatch):
        model = small().to("cuda")
        places.clear()
        measured, reading = judged(model, DEVICE)
    # The mode around calls it once more by name, where nobody says what is on the device.
    assert places[::2] == [DEVICE] * 6
    assert (measured.logprobs, measured.greedy) == (right[0].logprobs, right[0].greedy)
    assert all(torch.equal(a, b) for a, b in zip(measured.logits, right[0].logits, strict=True))
    assert reading.as_dict() == right[1].as_dict()


def test_a_device_that_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is emptied, the pass is halved, and the step is the one that it would have been."""
    right = trainer(lora(small(), lora_dropout=0.3), micro_batch_tokens=100, **HALF).train_step()
    found: list[str] = []
    with device(monkeypatch):
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("emptied"))
        made = trainer(
            lora(small(), lora_dropout=0.3).to("cuda"), micro_batch_tokens=100, **HALF,
            on_finding=lambda finding: found.append(finding.code),
        )  # fmt: skip
        own = made.route.loss_sum

        def full_at_first(batch: Any) -> Any:
            if not found:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return own(batch)

        monkeypatch.setattr(made.route, "loss_sum", full_at_first)
        step = made.train_step()
    assert found == ["emptied", "out-of-memory"]
    assert made.limits is not None
    assert made.limits.rows == 2
    assert step["loss"] == pytest.approx(right["loss"], rel=2e-2)
