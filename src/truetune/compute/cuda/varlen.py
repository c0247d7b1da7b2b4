"""Attention of a packed layout by a variable-length flash kernel, without masks or compilation.

input   queries, keys and values of one layer, and the layout
does    makes the calls of plan.py. Outputs o_i with log-sum-exp l_i are merged to
        sum_i exp(l_i - l) o_i with l = log sum_i exp(l_i); a sink is a part without a value. Given
        l and the merged output, the kernel's backward pass of each call gives exact gradients
output  (T, H, D)

The kernel is aten's flash attention, called directly, because `varlen_attn` returns the log-sum-exp
but does not accept a merged one in the backward pass; or flash-attention 3 in its place, where it
is installed and gives the same results.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from truetune.compute.cuda import flash3
from truetune.compute.cuda.copies import sent
from truetune.compute.cuda.plan import Call, plan
from truetune.compute.explicit import explicit_attention
from truetune.compute.layout import Layout
from truetune.errors import is_out_of_memory


@dataclass(frozen=True, eq=False)
class Placed:
    """A call with its indices on the device.

    Attributes:
        q, k: int64 indices in the packed sequence; None if they are the whole sequence in order.
        cum_q, cum_k: int32 offsets of the sequences (see `Call`).
    """

    call: Call
    q: torch.Tensor | None
    k: torch.Tensor | None
    cum_q: torch.Tensor
    cum_k: torch.Tensor


class Kernel(Protocol):
    """Attention of several sequences in one call: q (Nq, H, D), k and v (Nk, G, D)."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Placed, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output (Nq, H, D) and the log-sum-exp (H, Nq) in float32."""

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        at: Placed,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of q, k and v. Output and log-sum-exp may include other keys."""


class Flash:
    """torch's flash attention on CUDA, in bfloat16 and float16."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Placed, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_sequences(at), 0.0, at.call.causal, False, scale=scale, **_window(at)
        )
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        at: Placed,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The random state of dropout, which is not used.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        none = torch.empty(0, dtype=torch.uint64, device=q.device)
        made: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        made = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_sequences(at), 0.0, at.call.causal, state, none,
            scale=scale, **_window(at),
        )  # fmt: skip
        return made


class Flash3:
    """flash-attention 3, which torch calls through the same functions while it is active."""

    def forward(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with flash3.active():
            return Flash().forward(*given)

    def backward(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with flash3.active():
            return Flash().backward(*given)


def _sequences(at: Placed) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return at.cum_q, at.cum_k, at.call.max_q, at.call.max_k


def _window(at: Placed) -> dict[str, int]:
    """Return the numbers of visible keys to the left and to the right of a query's own key."""
    if at.call.window is None:
        return {}
    return {"window_size_left": at.call.window - 1, "window_size_right": 0}


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    window: int | None,
    scale: float,
    sinks_H: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Return the attention output (T, H, D) of T tokens and H heads of width D.

    Args:
        query: (1, H, T, D).
        key, value: (1, G, T, D), for G groups of heads that share them.
        sinks_H: a score per head that takes part in the softmax without a value.
        kernel: `Flash` if None.
    """
    q_THD, k_TGD, v_TGD = (t[0].transpose(0, 1) for t in (query, key, value))
    placed = _placed(layout, window, query.device)
    mixed: torch.Tensor = _Varlen.apply(
        q_THD, k_TGD, v_TGD, sinks_H, placed, scale, kernel or Flash()
    )
    return mixed


def _placed(layout: Layout, window: int | None, device: torch.device) -> Sequence[Placed]:
    """Return the calls with their indices, which all layers of a batch with this window share."""
    key = "varlen", window, device
    if key not in layout.made:
        layout.made[key] = [_place(call, device) for call in plan(layout, window)]
    placed: list[Placed] = layout.made[key]
    return placed


def _place(call: Call, device: torch.device) -> Placed:
    # A causal call has the queries of every node, in order.
    own = all(keys == (queries,) for queries, keys in zip(call.queries, call.keys, strict=True))

    def numbers(values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return sent(torch.tensor(values, dtype=dtype), device)

    return Placed(
        call,
        None if call.causal else numbers(call.query_indices(), torch.int64),
        None if call.causal and own else numbers(call.key_indices(), torch.int64),
        numbers(call.cum_q, torch.int32),
        numbers(call.cum_k, torch.int32),
    )


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        sinks_H: torch.Tensor | None,
        placed: Sequence[Placed],
        scale: float,
        kernel: Kernel,
    ) -> torch.Tensor:
        first, *others = placed
        out, lse = kernel.forward(
            q_THD, _taken(k_TGD, first.k), _taken(v_TGD, first.k), first, scale
        )
        _require_shape(lse, q_THD)
        if others or sinks_H is not None:
            out = out.float()
        for at in others:
            assert at.q is not None
            q, k, v = (_taken(t, i) for t, i in ((q_THD, at.q), (k_TGD, at.k), (v_TGD, at.k)))
            part, part_lse = kernel.forward(q, k, v, at, scale)
            before = lse.index_select(1, at.q)
            total = torch.logaddexp(before, part_lse)
            merged = out.index_select(0, at.q) * _weights(before, total)
            merged += part * _weights(part_lse, total)
            out.index_copy_(0, at.q, merged)
            lse = lse.index_copy(1, at.q, total)
        if sinks_H is not None:
            total = torch.logaddexp(lse, sinks_H.float()[:, None])
            out *= _weights(lse, total)
            lse = total
        out = out.to(q_THD.dtype)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, sinks_H, out, lse)
        ctx.placed, ctx.scale, ctx.kernel = placed, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, sinks_H, out_THD, lse_HT = ctx.saved_tensors
        grad_THD = grad_THD.contiguous()
        totals: list[torch.Tensor] = []
        for at in ctx.placed:
            q, out, grad = (_taken(t, at.q) for t in (q_THD, out_THD, grad_THD))
            lse = lse_HT if at.q is None else lse_HT.index_select(1, at.q)
            k, v = _taken(k_TGD, at.k), _taken(v_TGD, at.k)
            parts = ctx.kernel.backward(grad, q, k, v, out, lse.contiguous(), at, ctx.scale)
            alone = len(ctx.placed) == 1
            if not totals:
                totals = [
                    part if alone and rows is None else _spread(part, rows, len(q_THD))
                    for part, rows in zip(parts, (at.q, at.k, at.k), strict=True)
                ]
                continue
            for total, part, rows in zip(totals, parts, (at.q, at.k, at.k), strict=True):
                total.index_add_(0, rows, part.float())
        of_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            # A sink has no value, so its gradient is minus its weight times the output.
            of_out_TH = (grad_THD.float() * out_THD.float()).sum(-1)
            weights_HT = (sinks_H.float()[:, None] - lse_HT).exp()
            of_sinks = -(weights_HT * of_out_TH.t()).sum(1).to(sinks_H.dtype)
        dq, dk, dv = (
            total.to(own.dtype) for total, own in zip(totals, (q_THD, k_TGD, v_TGD), strict=True)
        )
        return dq, dk, dv, of_sinks, None, None, None


def _taken(t_TXD: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return t_TXD if rows is None else t_TXD.index_select(0, rows)


def _weights(lse_HN: torch.Tensor, total_HN: torch.Tensor) -> torch.Tensor:
    """Return the weight of a part in the merged output: (N, H, 1)."""
    return (lse_HN - total_HN).exp_().t()[..., None]


def _spread(part: torch.Tensor, rows: torch.Tensor | None, length: int) -> torch.Tensor:
    """Add gradients of gathered rows to their places, in float32: (length, ...)."""
    if rows is None:
        return part.float()
    total = part.new_zeros((length, *part.shape[1:]), dtype=torch.float32)
    return total.index_add_(0, rows, part.float())


def _require_shape(lse: torch.Tensor, q_THD: torch.Tensor) -> None:
    length, heads, _ = q_THD.shape
    if lse.shape != (heads, length) or lse.dtype != torch.float32:
        raise RuntimeError(
            f"torch {torch.__version__} returns a log-sum-exp {tuple(lse.shape)} of {lse.dtype}, "
            f"not {(heads, length)} in float32"
        )


# A tree with a branch of a branch, and a row; the window ends inside an ancestor.
_PROBE = Layout((37, 9, 20, 5, 12), (-1, 0, 1, 0, -1))
_PROBE_WINDOW = 16


@dataclass(frozen=True)
class Chosen:
    """The kernel for some shapes, and why it is not flash-attention 3 (see `flash3.why_not`)."""

    kernel: Kernel | None
    why_not_3: str | None


# What was chosen, while somebody looks.
_seen: list[Chosen] | None = None


@contextlib.contextmanager
def chosen_kernels() -> Iterator[list[Chosen]]:
    """Note the choice of each call inside."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def kernel_for(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """Return the kernel for these shapes and dtypes on this device; None if none is right there.

    A small tree is computed once for each of them, forward and backward.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    width = query.shape[-1]
    if width != value.shape[-1] or width % 8 or width > 256:
        return None
    if isinstance(query, FakeTensor):
        return Flash()  # fake tensors have no values to compare
    if query.dtype not in (torch.bfloat16, torch.float16):
        return None
    chosen = _chosen(query.device, query.dtype, query.shape[1], key.shape[1], width)
    if _seen is not None:
        _seen.append(chosen)
    return chosen.kernel


@functools.cache
def _chosen(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> Chosen:
    shape = (device, dtype, heads, groups, width)
    why_not = flash3.why_not()
    if why_not is None:
        why_not = _why_wrong(*shape, Flash3()) or None
        if why_not is None:
            return Chosen(Flash3(), None)
    return Chosen(None if _why_wrong(*shape, Flash()) else Flash(), why_not)


def _why_wrong(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int, kernel: Kernel
) -> str:
    """Return why a kernel cannot be used; "" if it computes what a softmax written out does."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> torch.Tensor:
        made = torch.randn(1, count, _PROBE.num_tokens, width, generator=generator)
        return made.to(dtype).to(device)

    given = [normal(heads), normal(groups), normal(groups)]
    scale = 1 / math.sqrt(width)
    for window in (None, _PROBE_WINDOW):
        results = []
        for exact in (True, False):
            leaves = [(t.float() if exact else t).detach().requires_grad_() for t in given]
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                try:
                    if exact:
                        q, k, v = (t[0] for t in leaves)
                        out = explicit_attention(q, k, v, _PROBE, window, scale, 0.0, None, None)
                    else:
                        q, k, v = leaves
                        out = varlen(q, k, v, _PROBE, window, scale, kernel=kernel)
                    grads = torch.autograd.grad(out.float().square().sum(), leaves)
                except (RuntimeError, NotImplementedError) as error:
                    if exact or is_out_of_memory(error):
                        raise
                    return f"it fails: {error}".partition("\n")[0]
            results.append([out, *grads])
        for right, made in zip(*results, strict=True):
            if not (made.float() - right).norm() <= 2e-2 * right.norm():
                return "its results differ from those of a softmax written out"
    return ""
