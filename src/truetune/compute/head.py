"""Output head and cross-entropy at supervised positions only, without keeping logits.

input   a model's own forward pass; which positions are supervised, their targets and weights
does    a hook on the output head takes the hidden states and passes none of them on, so that the
        model's forward pass computes no logits; loss and gradients are then computed in chunks
output  the summed loss

What a model does to its logits after the head (a scale, a soft cap) is found by sending known
numbers through its own forward pass. Before the result is used, it is compared with the model's own
logits and gradients. If it differs, the model's own head and tail run on the supervised positions,
which is correct for every model but keeps their logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from truetune.compute.loss import cross_entropy_sum
from truetune.compute.private import add_product_

# Logits that exist at one time: enough rows for a matrix product to run at full speed (measured:
# 128 rows of 152 k columns run at half of it), but no more memory than a layer of a model needs.
CHUNK_BYTES = 256 * 2**20
CHUNK_ROWS = 512
# On a GPU: each chunk passes over the whole float32 gradient of a trained matrix.
CHUNK_BYTES_DEVICE, CHUNK_ROWS_DEVICE = 512 * 2**20, 4096
# Float32 logits whose softmax is computed at one time: on a CPU, as many as stay in the cache.
BLOCK_BYTES, BLOCK_BYTES_DEVICE = 4 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class Tail:
    """What a model makes of the head's outputs z: scale * z, or cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        if self.cap is None:
            return z if self.scale == 1 else z * self.scale
        return self.cap * torch.tanh(z * (self.scale / self.cap))

    def backward_(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient of z, in place, from the gradient of logits."""
        if self.cap is not None:
            grad *= 1 - (logits / self.cap) ** 2
        return grad if self.scale == 1 else grad.mul_(self.scale)


@dataclass(frozen=True)
class Replaced:
    """Rows of a head's weight that are stored and trained separately (new tokens).

    Attributes:
        ids_M: int64, the rows of the weight that are replaced.
        rows_MD: the rows that replace them.
    """

    ids_M: torch.Tensor
    rows_MD: torch.Tensor


@dataclass(frozen=True)
class Matrix:
    """What an output head multiplies by: weight (V, D), bias (V,), rows stored separately."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    replaced: Replaced | None = None


def matrix_of(head: Any) -> Matrix | None:
    """The matrix of a head; None if its weight is computed at each access, and would get a gradient
    of the whole matrix."""
    layer = getattr(head, "token_adapter", head)
    replaced = getattr(layer, "replaced_rows", None)
    if replaced is not None:
        # Rows of new tokens on top of a matrix, which belongs to another module.
        found = replaced()
        base = layer.get_base_layer()
        return found and Matrix(base.weight, getattr(base, "bias", None), Replaced(*found))
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or head.weight is not weight:
        return None
    return Matrix(weight, getattr(head, "bias", None))


class SupervisedHead:
    """A model's output head, asked for supervised positions only.

    Attributes:
        module: the head.
        tail: what follows it; None if the model's own head and tail are run instead.
    """

    def __init__(self, module: torch.nn.Module, tail: Tail | None = None) -> None:
        self.module, self.tail = module, tail

    def buffer_bytes(self, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> int:
        """Of the fused loss: a chunk of logits, and on a GPU a block of them in float32 with what a
        soft cap keeps beside it; a batch of few targets takes less."""
        matrix = matrix_of(self.module)
        if self.tail is None or matrix is None:
            return 0
        weight = matrix.weight
        with autocast():
            compute = _compute_dtype(weight)
        rows = _chunk_rows(len(weight), compute, weight.device)
        block = 0 if weight.device.type == "cpu" else 2 * BLOCK_BYTES_DEVICE
        return rows * len(weight) * compute.itemsize + block

    def loss_sum(
        self,
        run: Callable[[], torch.Tensor],
        positions_N: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
    ) -> torch.Tensor:
        """Summed cross-entropy in nats, each target times its weight (scalar, float32).

        Args:
            run: calls the model on one sequence and returns its logits (1, ., V).
        """
        if self.tail is None:
            with _taking(self.module, positions_N):
                logits_NV = run()[0]
            return cross_entropy_sum(logits_NV, targets_N, weights_N)
        with _taking(self.module, None) as taken:
            run()
        hidden_ND = taken[0][0].index_select(0, positions_N)
        matrix = matrix_of(self.module)
        assert matrix is not None, "a head that has a tail has a matrix"
        return fused_cross_entropy_sum(hidden_ND, matrix, self.tail, targets_N, weights_N)


@contextlib.contextmanager
def _taking(
    head: torch.nn.Module, positions_N: torch.Tensor | None
) -> Iterator[list[torch.Tensor]]:
    """Collect the head's inputs (1, T, D); the head itself gets those of some positions."""
    taken: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1TD, *rest = args
        taken.append(hidden_1TD)
        kept = hidden_1TD[:, :0] if positions_N is None else hidden_1TD[:, positions_N]
        return (kept, *rest)

    handle = head.register_forward_pre_hook(hook)
    try:
        yield taken
    finally:
        handle.remove()


def fused_cross_entropy_sum(
    hidden_ND: torch.Tensor,
    matrix: Matrix,
    tail: Tail,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """Summed cross-entropy of tail(hidden @ weight.T + bias); gradients are made in the same pass.

    Logits exist for a chunk of positions at a time, the softmax in float32.
    """
    device, compute = hidden_ND.device.type, _compute_dtype(hidden_ND)
    other = matrix.replaced
    with torch.autocast(device, enabled=False):
        loss: torch.Tensor = _Fused.apply(
            hidden_ND,
            matrix.weight,
            matrix.bias,
            other and other.rows_MD,
            other and other.ids_M,
            targets_N,
            weights_N,
            tail,
            compute,
        )
    return loss


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Of autocast, or the tensor's own."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        rows_MD: torch.Tensor | None,
        ids_M: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        tail: Tail,
        compute: torch.dtype,
    ) -> torch.Tensor:
        wants_h, wants_w, wants_b, wants_r = ctx.needs_input_grad[:4]
        wants = wants_h or wants_w or wants_b or wants_r
        w = weight_VD.to(compute)
        r = None if rows_MD is None else rows_MD.to(compute)
        dr = None
        if wants_r and rows_MD is not None:
            dr = torch.zeros_like(rows_MD, dtype=torch.float32)
        dh = torch.empty_like(hidden_ND, dtype=compute) if wants_h else None
        dw: torch.Tensor | None = None
        db = torch.zeros(len(weight_VD), device=w.device) if wants_b else None
        total = torch.zeros((), device=w.device)
        rows = _chunk_rows(len(w), compute, w.device)
        z_buffer = w.new_empty(min(rows, len(hidden_ND)), len(w))
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            h = hidden_ND[part].to(compute)
            z = torch.mm(h, w.t(), out=z_buffer[: len(h)])
            if r is not None and ids_M is not None:
                # Before the bias: a row stands elsewhere, its bias does not.
                z.index_copy_(1, ids_M, h @ r.t())
            if bias_V is not None:
                z += bias_V
            total += _losses_to_gradients_(z, targets_N[part], weights_N[part], tail, wants)
            if db is not None:
                db += z.sum(0, dtype=torch.float32)
            if r is not None and ids_M is not None:
                z_NM = z.index_select(1, ids_M)
                z.index_fill_(1, ids_M, 0)
                if dr is not None:
                    dr += (z_NM.t() @ h).float()
            if dh is not None:
                torch.mm(z, w, out=dh[part])
                if r is not None:
                    dh[part].addmm_(z_NM, r)
            if wants_w and dw is None:
                dw = torch.mm(z.t(), h).float()
            elif dw is not None:
                add_product_(dw, z.t(), h)
        if wants_w and dw is None:
            dw = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(dh, dw, db, dr)
        ctx.dtypes = [
            None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V, rows_MD)
        ]
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: a table of 152 k rows is not made twice. A second backward pass over the same
        # loss is an error of autograd, which sees that they changed.
        scaled = [
            None if made is None else made.mul_(grad).to(dtype)
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _chunk_rows(columns: int, compute: torch.dtype, device: torch.device) -> int:
    most, rows = CHUNK_BYTES, CHUNK_ROWS
    if device.type == "cuda":
        most, rows = CHUNK_BYTES_DEVICE, CHUNK_ROWS_DEVICE
    return max(min(most // (compute.itemsize * columns), rows), 1)


def _losses_to_gradients_(
    z_NV: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    tail: Tail,
    wants_gradients: bool,
) -> torch.Tensor:
    """Weighted sum of the cross-entropies of tail(z); z becomes its gradient, in place.

    In float32, in blocks of rows: on a CPU each number is touched in several passes while it is in
    the cache; on a GPU there is no second copy of a whole chunk.
    """
    total = torch.zeros((), device=z_NV.device)
    most = BLOCK_BYTES if z_NV.device.type == "cpu" else BLOCK_BYTES_DEVICE
    rows = max(most // (4 * z_NV.shape[1]), 1)
    for start in range(0, len(z_NV), rows):
        part = slice(start, start + rows)
        targets, weights = targets_N[part, None], weights_N[part]
        logits = tail(z_NV[part].float())
        # Of tanh, the derivative needs its value; a scale does not.
        kept = logits.clone() if tail.cap is not None else logits
        chosen = logits.gather(1, targets)[:, 0]
        largest = logits.amax(-1, keepdim=True)
        exps = logits.sub_(largest).exp_()
        sums = exps.sum(-1)
        total += ((sums.log() + largest[:, 0] - chosen) * weights).sum()
        if wants_gradients:
            # d loss / d logits = (softmax - onehot) * weight
            grad = exps.mul_((weights / sums)[:, None])
            grad.scatter_add_(1, targets, -weights[:, None])
            z_NV[part] = tail.backward_(grad, kept)
    return total


def find_head(model: torch.nn.Module, run: Callable[[], torch.Tensor]) -> SupervisedHead | None:
    """The head of a model, proved on it; None if the model has none that can be hooked.

    Args:
        model: a transformers model, without peft's wrapper.
        run: calls the model on one sequence of at least 4 ids and returns its logits (1, T, V).
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        return None
    with torch.no_grad():
        whole = run()
        some = torch.tensor([2, 0], device=whole.device)
        with _taking(head, some) as taken:
            picked = run()
    if len(taken) != 1 or picked.shape != (1, 2, whole.shape[-1]):
        return None
    if not _close(picked[0], whole[0, some]):
        return None
    tail = _read_tail(head, run)
    if tail is None or not _is_fused_right(model, head, tail, run):
        return SupervisedHead(head)
    return SupervisedHead(head, tail)


def _read_tail(head: torch.nn.Module, run: Callable[[], torch.Tensor]) -> Tail | None:
    """Put known numbers in the place of the head's outputs and fit what comes out."""
    put: list[torch.Tensor] = []

    def replace(_: torch.nn.Module, __: Any, z_1TV: torch.Tensor) -> torch.Tensor:
        numbers = torch.linspace(-80, 80, z_1TV.numel(), device=z_1TV.device)
        numbers[0], numbers[-1] = 1e6, 1e-2
        put.append(numbers.reshape(z_1TV.shape))
        return put[0]

    handle = head.register_forward_hook(replace)
    try:
        with torch.no_grad():
            out = run().float()
    finally:
        handle.remove()
    if not put or out.shape != put[0].shape:
        return None
    z, y = put[0].flatten(), out.flatten()
    tail = Tail(scale=float(y[-1] / z[-1]))
    if not torch.allclose(tail(z), y, rtol=1e-3, atol=1e-4):
        tail = Tail(tail.scale, cap=float(y[0]))
    if abs(tail.scale - 1) < 1e-6:
        tail = Tail(1.0, tail.cap)
    return tail if torch.allclose(tail(z), y, rtol=1e-3, atol=1e-3) else None


def _is_fused_right(
    model: torch.nn.Module, head: torch.nn.Module, tail: Tail, run: Callable[[], torch.Tensor]
) -> bool:
    """Whether loss and gradients equal those of the model's own head and tail, for the hidden
    states and for every trained parameter, wherever it lives: an adapter on the head, or trained
    rows that it shares with the embedding, would be seen here."""
    matrix = matrix_of(head)
    if matrix is None:
        return False
    inputs: list[torch.Tensor] = []

    def detach(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # From here on: what comes before the head needs no graph.
        torch.set_grad_enabled(True)
        # A slice of the second dimension would go through the head forty times as slowly.
        inputs.append(args[0][0, :4].detach()[None].requires_grad_())
        return (inputs[0], *args[1:])

    handle = head.register_forward_pre_hook(detach)
    try:
        with torch.no_grad():
            logits_NV = run()[0]
    finally:
        handle.remove()
    hidden_ND = inputs[0]
    targets = torch.arange(len(logits_NV), device=logits_NV.device)
    weights = torch.ones(len(targets), device=logits_NV.device)
    with torch.enable_grad():
        own = cross_entropy_sum(logits_NV, targets, weights)
        fused = fused_cross_entropy_sum(hidden_ND[0], matrix, tail, targets, weights)
        wanted = [hidden_ND, *(p for p in model.parameters() if p.requires_grad)]
        pairs = zip(
            torch.autograd.grad(own, wanted, allow_unused=True),
            torch.autograd.grad(fused, wanted, allow_unused=True),
            strict=True,
        )
        same = all(
            a is b if a is None or b is None else _close(a, b, logits_NV.dtype) for a, b in pairs
        )
    return same and _close(own, fused, logits_NV.dtype)


def _close(a: torch.Tensor, b: torch.Tensor, computed: torch.dtype | None = None) -> bool:
    """Equal to rounding in the type they were computed in, by norm."""
    limit = 1e-4 if (computed or a.dtype) == torch.float32 else 3e-2
    a, b = a.float(), b.float()
    return bool((a - b).norm() <= limit * b.norm() + 1e-12)
