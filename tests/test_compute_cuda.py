"""What runs on CUDA, as far as a CPU can show it: the plan of calls, their merging, block masks."""

from __future__ import annotations

import sys
import types
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from test_compute_attention import CHAIN, FOREST, ROWS, TREE, by_definition, dense, inputs, layouts
from tiny_families import FAMILIES, MORE, family
from truetune.compute import attention as room
from truetune.compute import flex
from truetune.compute.cuda import varlen as cuda
from truetune.compute.cuda.plan import plan
from truetune.compute.explicit import explicit_attention
from truetune.compute.layout import Layout
from truetune.compute.packing import pack
from truetune.compute.route import find_route
from truetune.errors import TruetuneError
from varlen_on_cpu import OnCpu

pytestmark = pytest.mark.filterwarnings("error")

WINDOWS = st.one_of(st.none(), st.integers(1, 20))


@settings(max_examples=30)
@given(layouts(), WINDOWS)
def test_the_calls_are_who_sees_whom(layout: Layout, window: int | None) -> None:
    """Each pair that sees meets once, no other pair meets; no query is in a call twice."""
    met = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    calls = plan(layout, window)
    assert calls[0].query_indices() == list(range(layout.num_tokens))
    for call in calls:
        q, k = torch.tensor(call.query_indices()), torch.tensor(call.key_indices())
        assert len(q.unique()) == len(q)
        assert call.max_q == max(b - a for a, b in pairwise(call.cum_q))
        assert call.max_k == max(b - a for a, b in pairwise(call.cum_k))
        for (a, b), (c, d) in zip(pairwise(call.cum_q), pairwise(call.cum_k), strict=True):
            aligned = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            keys = torch.arange(d - c)
            shown = torch.ones(b - a, d - c, dtype=torch.bool)
            if call.causal:
                shown = (keys <= aligned) & (keys > aligned - (call.window or d))
            assert shown.any(1).all(), "a query without a key has no softmax"
            met[q[a:b, None], k[c:d]] += shown.long()
    assert torch.equal(met, dense(layout, window).long())


def test_few_calls() -> None:
    """Rows and windows are one; a tree is one more for each depth, a long chain one more in all."""
    tree = Layout((40, 9, 5, 6, 7, 30, 4, 5, 6), (-1, 0, 1, 1, 1, 0, 5, 5, 5))
    chain = Layout((9,) * 12, (-1, *range(11)))
    answers = Layout((9, 3) * 6, (-1, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10))
    assert len(tree.meetings(None)) > 10
    for layout, window, count in (
        (ROWS, None, 1), (ROWS, 3, 1), (tree, 12, 1), (tree, None, 3), (chain, None, 2),
        (answers, None, 2),
    ):  # fmt: skip
        assert len(plan(layout, window)) == count


@pytest.mark.parametrize("layout", [ROWS, TREE, FOREST, CHAIN])
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_merged_calls_and_their_gradients(
    layout: Layout, window: int | None, heads: int, groups: int, with_sinks: bool
) -> None:
    """Against a softmax written out; float32, to 5e-6."""
    layout.made.clear()
    leaves = inputs(layout, heads, groups, torch.float32)
    sinks = torch.linspace(-1, 2, heads).requires_grad_() if with_sinks else None
    wanted = [*leaves, *([sinks] if sinks is not None else [])]
    q, k, v = (t[0] for t in leaves)
    right = explicit_attention(q, k, v, layout, window, 0.3, 0.0, None, sinks)
    made = cuda.varlen(*leaves, layout, window, 0.3, sinks, OnCpu())
    assert made.shape == right.shape
    probe = torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
    of_right = torch.autograd.grad((right * probe).sum(), wanted)
    of_made = torch.autograd.grad((made * probe).sum(), wanted)
    for a, b in zip((made.detach(), *of_made), (right.detach(), *of_right), strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= 5e-6 * max(float(b.abs().max()), 1)
    if sinks is None:
        square = by_definition(*leaves, dense(layout, window), None)[0].detach()
        assert float((made.detach() - square).abs().max()) <= 5e-6


def test_bfloat16_parts_are_merged_in_float32() -> None:
    CHAIN.made.clear()
    leaves = inputs(CHAIN, 4, 2, torch.bfloat16)
    made = cuda.varlen(*leaves, CHAIN, None, 0.3, None, OnCpu())
    right = by_definition(*leaves, dense(CHAIN, None), None)[0].detach()
    assert made.dtype == torch.bfloat16
    assert float((made.detach().float() - right).norm()) <= 5e-3 * float(right.norm())


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", sorted({*FAMILIES, *MORE}))
def test_families_by_variable_length_calls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and trees, loss and gradients, as by the way that CPUs go: to 5e-6 of the largest."""
    model = family(kind).eval()
    route = find_route(model, longest=64)
    assert route.kind == "packed"
    kernel = OnCpu()
    own = room.attention

    def by_calls(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        layout = kwargs[room.KEYWORD]
        scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        window = kwargs.get("sliding_window")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = room._one_dtype(q, k, v)
        if softcap:
            if torch.is_grad_enabled():  # FlexAttention has no backward pass on a CPU
                return own(module, q, k, v, mask, **kwargs)
            with warnings.catch_warnings():
                # On a CPU nothing compiles it: what it computes is looked at, not how fast.
                warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
                return flex.flex(q, k, v, layout, window, scale, softcap)[None], None
        out = cuda.varlen(q, k, v, layout, window, scale, kwargs.get("s_aux"), kernel)
        return out[None], None

    for examples in (example_rows(), example_trees()):
        results = []
        for function in (own, by_calls):
            batch = pack(examples, range(len(examples)))
            monkeypatch.setattr(room, "attention", function)
            with route.scope(batch):
                loss = route.loss_sum(batch)
                loss.backward()
                with torch.no_grad():
                    logits = route.logits(batch)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            results.append([loss.detach(), logits, *grads])
        largest = max(float(g.abs().max()) for g in results[0][2:])
        assert kernel.calls or kind == "gemma2"
        assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=5e-6)
        close(results[1][1], results[0][1], float(results[0][1].abs().max()))
        for a, b in zip(results[1][2:], results[0][2:], strict=True):
            close(a, b, largest)


def close(a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    assert float((a - b).abs().max()) <= 5e-6 * scale


def example_rows() -> Any:
    from truetune import SFTExample

    def ids(length: int) -> list[int]:
        made = torch.randint(1, 250, (length,), generator=torch.Generator().manual_seed(length))
        return made.tolist()

    return [SFTExample(ids(n), [int(t > n // 3) for t in range(n)]) for n in (5, 30, 2, 17, 9, 23)]


def example_trees() -> Any:
    from truetune import SFTExample

    rows = example_rows()
    trunk, branch = rows[1].ids, rows[5].ids
    ids = [trunk + rows[4].ids, trunk + branch + rows[3].ids, trunk + branch + rows[0].ids]
    ids += [rows[3].ids, trunk + branch]
    return [SFTExample(i, [int(t > 6) for t in range(len(i))]) for i in ids]


def test_the_kernel_takes_the_shapes_it_is_given() -> None:
    """torch's own flash attention on tensors without numbers: arguments, shapes and types of the
    forward and the backward pass, that are the same on a device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for layout, window in ((ROWS, None), (ROWS, 4), (CHAIN, None), (TREE, None), (TREE, 7)):
            made = Layout(layout.lengths, layout.parents)
            q, k, v = (
                torch.empty(1, n, made.num_tokens, 16, dtype=torch.bfloat16) for n in (4, 2, 2)
            )
            leaves = [t.requires_grad_() for t in (q, k, v)]
            assert cuda.kernel_for(*leaves)
            counting = Counting()
            with counting:
                out = cuda.varlen(*leaves, made, window, 0.25)
                grads = torch.autograd.grad(out.float().sum(), leaves)
            assert (out.shape, out.dtype) == ((made.num_tokens, 4, 16), torch.bfloat16)
            assert [g.shape for g in grads] == [t.shape for t in leaves]
            calls = len(plan(made, window))
            assert counting.names.count("_flash_attention_forward") == calls
            assert counting.names.count("_flash_attention_backward") == calls
            assert "_local_scalar_dense" not in counting.names
            assert "nonzero" not in counting.names


def test_a_kernel_is_proved_before_it_is_used() -> None:
    """What it computes is compared with a softmax written out, its windows and gradients too."""

    class Wrong(OnCpu):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what

        def forward(self, q: Any, k: Any, v: Any, at: Any, scale: float) -> Any:
            if self.what == "raises":
                raise NotImplementedError("no kernel for this device")
            out, lse = super().forward(q, k, v, at, scale)
            return out, (lse / 0.6931 if self.what == "base of the logarithm" else lse)

        def backward(self, *args: Any) -> Any:
            of_q, of_k, of_v = super().backward(*args)
            return of_q, of_k, (of_v * 1.1 if self.what == "gradient" else of_v)

    def wrong(kernel: Any) -> str:
        return cuda._why_wrong(torch.device("cpu"), torch.bfloat16, 4, 2, 16, kernel)

    assert wrong(OnCpu()) == ""
    assert wrong(Wrong("raises")) == "it fails: no kernel for this device"
    assert all("differ" in wrong(Wrong(w)) for w in ("base of the logarithm", "gradient"))
    q = torch.zeros(1, 2, 3, 16)
    assert not cuda.kernel_for(q, q, q), "float32"
    assert not cuda.kernel_for(q.bfloat16(), q.bfloat16(), q[..., :8].bfloat16()), "narrow values"


def test_flash_attention_3_is_swapped_in_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch itself, and a package that is not there."""
    from torch.nn import attention as library

    from truetune.compute.cuda import flash3

    if not hasattr(library, "activate_flash_attention_impl"):
        assert flash3.why_not.__wrapped__() == "", "torch before 2.10"
        return
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert flash3.why_not.__wrapped__() == "", "the package is not installed"
    package = torch.library.Library("flash_attn_3", "DEF")
    package.define("fwd() -> ()")
    package.define("bwd() -> ()")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("package"))
    assert flash3.why_not.__wrapped__() is None
    with flash3.active():
        assert library.current_flash_attention_impl() == "FA3"
        assert "program has chosen FA3" in str(flash3.why_not.__wrapped__())
    assert library.current_flash_attention_impl() is None


LONG = Layout((300, 40, 90, 8, 200), (-1, 0, 1, 0, -1))


@settings(max_examples=40)
@given(st.one_of(layouts(), st.just(LONG)), WINDOWS, st.integers(1, 40))
def test_block_masks_are_those_of_every_pair(
    layout: Layout, window: int | None, times: int
) -> None:
    """Without asking every pair: which blocks are seen in part, and which whole."""
    layout = Layout(tuple(n * times for n in layout.lengths), layout.parents)
    if layout.num_tokens > 3000:
        return
    window = window and window * times
    cpu = torch.device("cpu")
    made = flex.block_mask(layout, window, cpu)
    length = flex._whole_blocks(layout.num_tokens)
    right = create_block_mask(
        flex.rule(layout, window, cpu), None, None, length, length, cpu, BLOCK_SIZE=flex.BLOCK
    )
    assert made.seq_lengths == right.seq_lengths
    for count, which in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        counts = getattr(right, count)
        assert torch.equal(getattr(made, count), counts), count
        for row in range(counts.shape[-1]):
            n = int(counts[0, 0, row])
            one, other = (getattr(m, which)[0, 0, row, :n] for m in (made, right))
            assert torch.equal(one.sort()[0], other.sort()[0]), which


@pytest.mark.slow
def test_flex_is_compiled_twice_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 50 layouts, by a compiler that only counts: one length, then all."""
    import random

    from torch.nn.attention import flex_attention as library

    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    # Refused on a CPU for gradients, which nobody asks for here: graphs are made, not run backward.
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    compiled = torch.compile(library.flex_attention, fullgraph=True, backend=counting)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    draw = random.Random(0)
    for kind in range(8):
        window, grad, softcap = (None, 50)[kind % 2], kind % 4 < 2, (None, 30.0)[kind // 4]
        before = len(graphs)
        for _ in range(50 // 8 + 1):
            count = draw.randint(1, 8)
            lengths = tuple(draw.randint(1, 200) for _ in range(count))
            parents = sorted(draw.choices((0, -1), k=count - 1), reverse=True)
            layout = Layout(lengths, (-1, *parents))
            leaves = [torch.randn(1, n, layout.num_tokens, 16) for n in (4, 2, 2)]
            given = [t.requires_grad_(grad) for t in leaves]
            with warnings.catch_warnings():
                # Of torch's compiler, which looks at the gradient of what is no leaf.
                warnings.simplefilter("ignore")
                flex.flex(*given, layout, window, 0.25, softcap)
        assert len(graphs) - before <= 2, (window, grad, softcap)
    torch._dynamo.reset()


def test_torchs_limit_of_compiling_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a layer computed with all its scores at once."""

    def beyond(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.FailOnRecompileLimitHit("limit")

    monkeypatch.setattr(flex, "flex_attention", beyond)
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(TruetuneError, match="stopped") as raised:
        flex.flex(q, q, q, Layout((4,), (-1,)), None, 0.25, None)
    assert raised.value.code == "attention-recompiled"


def fake_cuda(monkeypatch: pytest.MonkeyPatch, held: list[int]) -> None:
    """The allocator's counts of a device that is not there: held, the most held since asked last,
    reserved, free."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: held[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: max(held))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda *_: held.__delitem__(slice(None, -1))
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: held[-1] + 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 5000))


def test_free_memory_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.compute.memory import available_bytes

    fake_cuda(monkeypatch, [50])
    assert available_bytes(torch.device("cuda")) == 1300


def test_the_footprint_by_the_allocators_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose allocator counts what is alive on this CPU: the curve of peaks is below the
    curve of all operations nowhere, and its largest is the same."""
    import contextlib

    from truetune.compute.alive import _Alive, alive_bytes
    from truetune.compute.cuda.footprint import batches, peak_bytes

    model = family("llama").train()
    route = find_route(model, longest=300)
    first, second, third = batches(300)
    assert first.num_computed == second.num_computed == 299
    assert third.num_computed == 3 * 299
    right = alive_bytes(route, second, contextlib.nullcontext)
    model.zero_grad()

    watched = _Alive([*model.parameters(), *model.buffers()])
    looked = [0]

    def most(*_: Any) -> int:
        return max(watched.curve[looked[0] :], default=watched.bytes)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: watched.bytes)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", most)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda *_: looked.__setitem__(0, len(watched.curve))
    )
    with watched:
        made = peak_bytes(route, second, contextlib.nullcontext)
    assert max(map(max, made)) == pytest.approx(max(map(max, right)), rel=0.02)
    assert made[0] == [max(right[0])]
    assert len(made[2]) == 1 + len(list(model.parameters()))


def test_a_second_try_starts_with_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.engine.memory import give_cached_blocks_back

    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    give_cached_blocks_back(torch.device("cpu"))
    assert not emptied
    give_cached_blocks_back(torch.device("cuda"))
    assert emptied


def test_copies_to_a_device_come_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.compute.cuda.copies import sent

    asked: list[Any] = []

    class Pinned:
        def to(self, *arguments: Any, **settings: Any) -> str:
            asked.append((arguments, settings))
            return "there"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: Pinned())
    assert sent(torch.zeros(1), "cuda") == "there"
    assert asked == [((torch.device("cuda"),), {"non_blocking": True})]
    assert sent(torch.zeros(1), "cpu").device.type == "cpu"
