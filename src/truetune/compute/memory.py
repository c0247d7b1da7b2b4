"""Memory that a forward and backward pass takes beside the weights, measured and scaled up.

input   a route, and how many tokens shall go through at once
does    runs two small batches forward and adds up what autograd keeps for the backward pass:
        activations grow in proportion to the tokens
output  Footprint: bytes as a function of the tokens
who     the loop, to choose a micro-batch; `docs/performance.md` says how right it was
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truetune.contract.example import SFTExample

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from truetune.compute.packing import PackedBatch
    from truetune.compute.route import Route

_SMALL, _LARGE = 4, 8
# What is on its way while a layer's backward pass runs, in pieces as wide as the widest that it
# keeps; and code that a process loads and compiles on first use. Fitted by bench/memory.py.
_TRANSIENT = 10
_PROCESS = 40 * 2**20


@dataclass(frozen=True)
class Footprint:
    """Bytes that a micro-batch takes while its backward pass runs.

    Attributes:
        fixed: whatever its size: the head's buffers and gradient.
        per_token: activations that are kept, and what is on its way in one layer.
        gradients: of all trained weights. They come as activations go, so that the larger of the
            two decides.
        transient: of `per_token`, what is on its way in one layer.
    """

    fixed: int
    per_token: int
    gradients: int
    transient: int = 0

    def of(self, tokens: int) -> int:
        return self.fixed + max(self.per_token * tokens, self.gradients)

    def fitting(self, room: int) -> int:
        """Tokens that take no more than `room` bytes; at least one."""
        return max((room - self.fixed) // self.per_token, 1)


def footprint(route: Route, autocast: Callable[[], AbstractContextManager[Any]]) -> Footprint:
    """Measure the model on rows of 16 tokens, half of them supervised.

    Args:
        autocast: how the loop computes.
    """
    import torch

    model = route.model
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            small = _kept(route, _rows(route, _SMALL), autocast)
            large = _kept(route, _rows(route, _LARGE), autocast)
    finally:
        model.train(was_training)
    tokens = 15 * (_LARGE - _SMALL)
    kept = max((sum(large) - sum(small)) // tokens, 1)
    # The same pieces from the largest down: what grows most is the widest.
    grown = (b - a for a, b in zip(reversed(small), reversed(large), strict=False))
    widest = max(grown, default=0) // tokens
    head = route.head.buffer_bytes(autocast) if route.head else 0
    return Footprint(
        fixed=_PROCESS + head + max(sum(small) - kept * 15 * _SMALL, 0),
        per_token=kept + _TRANSIENT * widest,
        gradients=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        transient=_TRANSIENT * widest,
    )


def foreseen_footprint(
    model: Any, autocast: Callable[[], AbstractContextManager[Any]], device: str = "cpu"
) -> Footprint:
    """`footprint` of a model whose weights are not there: the loop's own computation on tensors
    that have shapes, types and a device, and no numbers.

    Args:
        model: on the meta device, with its adapter if it has one (without dropout); is changed.
        device: that the tensors claim to be on.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from truetune.compute.adapter import plain_adapters
    from truetune.compute.head import SupervisedHead, Tail
    from truetune.compute.route import Route

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in [*module._parameters.items()]:
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype, device=device)
                    module._parameters[name] = torch.nn.Parameter(made, value.requires_grad)
            for name, value in [*module._buffers.items()]:
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype, device=device)
                    module._buffers[name] = made
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.tie_weights()
        head = SupervisedHead(inner.get_output_embeddings(), Tail())
        # Whether rows may be packed is asked of numbers, at the start of the run.
        route = Route(model, "packed", head=head, adapters=plain_adapters(model))
        return footprint(route, autocast)


def _rows(route: Route, count: int) -> PackedBatch:
    """Rows of 16 ids; one alone where rows run apart."""
    from truetune.compute.packing import pack

    if route.kind == "apart":
        length = 15 * count + 1
        row = SFTExample([t % 7 for t in range(length)], [t % 2 for t in range(length)])
        return pack([row], [0], min_shared=None)
    rows = [SFTExample([r % 7] * 16, [0] * 8 + [1] * 8) for r in range(count)]
    return pack(rows, range(count), min_shared=None)


def _kept(
    route: Route, batch: PackedBatch, autocast: Callable[[], AbstractContextManager[Any]]
) -> list[int]:
    """Bytes of each piece kept for the backward pass beside the weights, ascending."""
    import torch

    model = route.model
    device = next(model.parameters()).device
    # By the storage itself: tensors without numbers have no address.
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    batch = batch.to(device)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), hooks, route.scope(batch), autocast():
        loss = route.loss_sum(batch)
        pieces = sorted(storage.nbytes() for storage in kept.values())
        del loss
    return pieces


def available_bytes(device: torch.device) -> int:
    """Memory that is free to take now: of the GPU, or of the machine and its control group.

    0 where it cannot be known.
    """
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo_available(), *_control_group()]
    return min((limit for limit in limits if limit), default=0)


def _meminfo_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return 0
    return int(found[0]) * 1024 if found else 0


def _control_group() -> list[int]:
    """What a container may still take; nothing where it has no limit."""
    values = []
    for name in ("max", "current"):
        try:
            with open(f"/sys/fs/cgroup/memory.{name}", encoding="ascii") as file:
                values.append(int(file.read()))
        except (OSError, ValueError):
            return []
    return [max(values[0] - values[1], 1)]
