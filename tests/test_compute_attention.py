"""Who sees whom in a packed sequence, and attention that computes it without a square mask."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truetune.compute import gathered
from truetune.compute.attention import attention
from truetune.compute.explicit import explicit_attention
from truetune.compute.flex import flex, rule
from truetune.compute.layout import Layout, visible

pytestmark = pytest.mark.filterwarnings("error")


def of_rows(lengths: list[int]) -> Layout:
    """Rows side by side that share nothing."""
    return Layout(tuple(lengths), (-1,) * len(lengths))


ROWS = of_rows([5, 5, 5, 9, 1, 30])
TREE = Layout((40, 5, 8, 8, 3), (-1, 0, 1, 1, 0))
FOREST = Layout((1, 1, 6, 6, 6, 7), (-1, 0, 1, 1, 0, -1))
# A conversation: each turn's prompt goes on from the last one, with a branch for its answer.
CHAIN = Layout((9, 5, 4, 6, 3, 2, 7, 8), (-1, 0, 0, 2, 2, 4, 4, 6))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any forest of up to eight nodes, depth first."""
    parents, line = [-1], [0]
    for node in range(1, draw(st.integers(1, 8))):
        del line[draw(st.integers(0, len(line))) :]
        parents.append(line[-1] if line else -1)
        line.append(node)
    lengths = [draw(st.integers(1, 9)) for _ in parents]
    return Layout(tuple(lengths), tuple(parents))


def dense(layout: Layout, window: int | None) -> torch.Tensor:
    """(T, T), bool: who sees whom, token by token from the definition."""
    owners = [node for node, length in enumerate(layout.lengths) for _ in range(length)]
    where = layout.positions
    return torch.tensor(
        [
            [
                k <= q
                and owners[k] in (owners[q], *layout.ancestors(owners[q]))
                and (window is None or where[q] - where[k] < window)
                for k in range(layout.num_tokens)
            ]
            for q in range(layout.num_tokens)
        ]
    )


@given(layouts(), st.one_of(st.none(), st.integers(1, 20)))
def test_meetings_are_who_sees_whom(layout: Layout, window: int | None) -> None:
    """Each pair that sees meets once, no other pair meets."""
    met = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for meeting in layout.meetings(window):
        length = meeting.q1 - meeting.q0
        for nth in range(meeting.count):
            q = slice(meeting.q0 + nth * length, meeting.q1 + nth * length)
            for k0, k1 in meeting.keys:
                k = slice(k0 + nth * length, k1 + nth * length)
                if meeting.kind == "causal":
                    part = torch.ones(length, length, dtype=torch.int64).tril()
                elif meeting.kind == "full":
                    part = torch.ones(length, k1 - k0, dtype=torch.int64)
                else:
                    part = visible(layout, (q.start, q.stop), (k.start, k.stop), window).long()
                assert part.any(1).all(), "a query without a key has no softmax"
                met[q, k] += part
    assert torch.equal(met, dense(layout, window).long())


@given(layouts(), st.one_of(st.none(), st.integers(1, 20)))
def test_the_rule_for_gpus_is_who_sees_whom(layout: Layout, window: int | None) -> None:
    sees = rule(layout, window, torch.device("cpu"))
    at = torch.arange(layout.num_tokens)
    assert torch.equal(sees(0, 0, at[:, None], at[None]), dense(layout, window))


@given(layouts())
def test_positions_go_on_from_the_parent(layout: Layout) -> None:
    for node, (start, stop) in enumerate(pairwise(layout.starts)):
        before = sum(layout.lengths[a] for a in layout.ancestors(node))
        assert layout.positions[start:stop] == list(range(before, before + stop - start))


@pytest.mark.parametrize(
    ("lengths", "parents"),
    [((), ()), ((3, 0), (-1, -1)), ((1, 1), (-1,)), ((1, 1, 1), (-1, -1, 0)), ((1,), (0,))],
)
def test_refused_layouts(lengths: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="node"):
        Layout(lengths, parents)


def test_a_chain_meets_its_ancestors_in_one_call() -> None:
    full = [m for m in CHAIN.meetings(None) if m.kind == "full"]
    assert len(full) == len(CHAIN.lengths) - 1
    assert full[-1].keys == ((0, 9), (14, 18), (24, 27), (29, 36))
    star = Layout((50, 6, 6, 7), (-1, 0, 0, 0))
    assert [m.q1 - m.q0 for m in star.meetings(None) if m.kind == "full"] == [19]


def test_a_window_wider_than_the_rows_is_none() -> None:
    assert TREE.meetings(1000) is TREE.meetings(None)
    assert [m.count for m in ROWS.meetings(None)] == [3, 1, 1, 1]


def inputs(layout: Layout, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1, n, layout.num_tokens, 8, generator=generator).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """(1, T, H, D) with a square mask, in float32."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(repeats, 1) for t in (k, v))
    scores = q.float() @ k.transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture(params=["in one product", "by meetings"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short nodes go through attention together; here also as long ones do."""
    if request.param == "by meetings":
        monkeypatch.setattr(gathered, "MOST_KEYS", 0)
    for layout in (ROWS, TREE, FOREST, CHAIN):
        layout.made.clear()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", [ROWS, TREE, FOREST, CHAIN])
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_and_its_gradients(
    layout: Layout, window: int | None, heads: int, groups: int, softcap: float | None
) -> None:
    """Against a square mask; float32, to 5e-6."""
    q, k, v = inputs(layout, heads, groups, torch.float32)
    given = {"sliding_window": window, "softcap": softcap, "segments": layout}
    got, _ = attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, **given)
    expected = by_definition(q, k, v, dense(layout, window), softcap)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(got, (q, k, v), direction)
    theirs = torch.autograd.grad(expected, (q, k, v), direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", [ROWS, TREE])
def test_bfloat16_is_float32_to_rounding(layout: Layout) -> None:
    """By norm, 1 % of outputs and 2 % of gradients."""
    q, k, v = inputs(layout, 4, 2, torch.bfloat16)
    got, _ = attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=layout)
    expected = by_definition(q, k, v, dense(layout, None), None)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.01 * expected.norm()
    ours = torch.autograd.grad(got.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def test_what_goes_through_attention_in_one_product() -> None:
    """Many short nodes; neither long rows, nor one long node among short ones."""
    short, long = of_rows([20] * 5 + [26] * 3), of_rows([20, 65])
    uneven = of_rows([2] * 300 + [60])
    assert gathered.places(short, None, 4, 2) is not None
    assert gathered.places(short, None, 4, 2) is gathered.places(short, None, 4, 2)
    assert gathered.places(long, None, 4, 2) is None
    assert gathered.places(uneven, None, 4, 2) is None


def test_sinks_take_part_of_the_weight() -> None:
    q, k, v = (t[0] for t in inputs(ROWS, 2, 2, torch.float32))
    sinks = torch.tensor([0.5, -1.0])
    got = explicit_attention(q, k, v, ROWS, None, 0.3, 0.0, None, sinks)
    scores = (q @ k.transpose(1, 2) * 0.3).masked_fill(~dense(ROWS, None), -torch.inf)
    weights = torch.cat([scores, sinks[:, None, None].expand(2, 55, 1)], -1).softmax(-1)
    torch.testing.assert_close(got, (weights[..., :-1] @ v).transpose(0, 1), atol=1e-6, rtol=0)


def test_dropout_leaves_its_share_out() -> None:
    q, k, v = (torch.zeros(1, 1, 400, 4) for _ in range(3))
    v = v + 1
    torch.manual_seed(0)
    layout = of_rows([400])
    got, _ = attention(torch.nn.Identity(), q, k, v, None, dropout=0.25, segments=layout)
    assert got.mean().item() == pytest.approx(1, abs=0.02)
    assert got[0, 0, 0, 0].item() in (0.0, pytest.approx(4 / 3))


def test_without_a_layout_it_is_sdpa() -> None:
    q, k, v = inputs(ROWS, 4, 2, torch.float32)
    module = torch.nn.Identity()
    module.num_key_value_groups, module.is_causal = 2, True
    got, _ = attention(module, q, k, v, None, scaling=0.3)
    whole = by_definition(q, k, v, torch.ones(55, 55).bool().tril(), None)
    torch.testing.assert_close(got, whole, atol=5e-6, rtol=0)
    with pytest.raises(ValueError, match="pass a layout"):
        attention(module, q, k, v, None, softcap=3.0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 4])
def test_the_gpu_kernel_as_far_as_the_cpu_runs_it(
    window: int | None, softcap: float | None
) -> None:
    """Forward only: FlexAttention has no backward on CPU."""
    q, k, v = (t.detach() for t in inputs(TREE, 4, 2, torch.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        got = flex(q, k, v, TREE, window, 0.3, softcap)
    expected = by_definition(q, k, v, dense(TREE, window), softcap)[0]
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [ROWS, TREE, FOREST])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_on_a_gpu(layout: Layout, window: int | None) -> None:
    """By norm, in bfloat16: 1 % of outputs, 2 % of gradients."""
    q, k, v = (
        t.detach().cuda().repeat(1, 1, 1, 8).requires_grad_()
        for t in inputs(layout, 4, 2, torch.bfloat16)
    )
    given = {"sliding_window": window, "segments": layout}
    got, _ = attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, **given)
    expected = by_definition(q, k, v, dense(layout, window).cuda(), None)
    assert (got - expected).norm() < 0.01 * expected.norm()
    ours = torch.autograd.grad(got.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
