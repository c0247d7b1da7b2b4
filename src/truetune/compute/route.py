"""Choose how a model computes batches, by tests of the model itself.

input   a model and a few of its ids
does    computes short rows packed and one by one, and compares the results; tests which earlier
        tokens each layer's own mask shows, and whether rotary embeddings depend on the longest row
output  Route: packed, apart (one row at a time, if packing would be wrong) or padded (the
        reference); the loss of a batch; findings

No model is recognised by its name.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from truetune.compute.batch import Batch, MicroBatch
from truetune.compute.layout import Layout
from truetune.compute.loss import cross_entropy_sum, logits_of
from truetune.compute.loss import loss_sum as padded_loss_sum
from truetune.compute.packing import PackedBatch
from truetune.errors import is_out_of_memory
from truetune.findings import Finding
from truetune.model.mode import mode_kept
from truetune.system.lazy import torch

if TYPE_CHECKING:
    from truetune.compute.fused import Fused
    from truetune.compute.head import SupervisedHead

Kind = Literal["packed", "apart", "padded"]

# Lengths of the nodes in the test. They differ, so that mixed-up rows cannot look right. One node
# branches from another.
_PROBE = (7, 12, 5, 4)
_BRANCHES = (-1, -1, 1, -1)


class Route:
    """How batches are computed by a model.

    Attributes:
        kind: "packed", "apart" (rows one at a time, unpadded) or "padded" (the reference path).
        reason: why it is not "packed"; empty if it is.
        head: computes supervised positions only; None if all logits are computed.
        adapters: LoRA layers with their fast forward.
        fused: layers that use fused kernels of a library.
        flash3: what flash-attention 3 computes; "" if it is not installed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kind: Kind,
        *,
        reason: str = "",
        head: SupervisedHead | None = None,
        adapters: Mapping[torch.nn.Module, Callable[..., torch.Tensor]] | None = None,
    ) -> None:
        self.model, self.kind, self.reason, self.head = model, kind, reason, head
        self.adapters = adapters or {}
        self.fused: Fused | None = None
        self.flash3 = ""
        # These determine the dropout of adapters, together with the tokens.
        self.seed, self.step = 0, 0

    @contextlib.contextmanager
    def scope(self, batch: MicroBatch) -> Iterator[None]:
        """Prepare the model for this batch, including its backward pass, and restore it
        afterwards."""
        with contextlib.ExitStack() as stack:
            if isinstance(batch, PackedBatch) and self.adapters:
                from truetune.compute.adapter import fast_adapters

                drawn = {"seed": self.seed, "step": self.step}
                stack.enter_context(fast_adapters(self.adapters, batch.keys_T, **drawn))
            if isinstance(batch, PackedBatch) and self.fused is not None:
                from truetune.compute.fused import fused_parts

                stack.enter_context(fused_parts(self.fused))
            if isinstance(batch, PackedBatch) and self.kind == "packed":
                from truetune.compute.attention import packed_attention

                stack.enter_context(packed_attention(transformers_model(self.model)))
            yield

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Return the cross-entropy in nats, summed over the supervised positions (scalar, float32).

        It must be called inside `scope`.
        """
        if isinstance(batch, Batch):
            return padded_loss_sum(self.model, batch)
        assert isinstance(batch, PackedBatch)
        packed = batch
        if self.head is not None:
            return self.head.loss_sum(
                lambda: self.logits(packed), packed.positions_N, packed.targets_N, packed.weights_N
            )
        logits_NV = self.logits(packed)[0][packed.positions_N]
        return cross_entropy_sum(logits_NV, packed.targets_N, packed.weights_N)

    def logits(self, batch: PackedBatch, *, mask: bool = False) -> torch.Tensor:
        """Return the logits (1, T, V) of the model's own forward pass; `mask` as in
        `packed_arguments`."""
        if self.kind == "apart":
            return logits_of(self.model, batch.ids_T[None])
        from truetune.compute.attention import packed_arguments

        arguments = packed_arguments(batch.layout, batch.ids_T.device, mask=mask)
        return logits_of(self.model, batch.ids_T[None], **arguments)

    def findings(self) -> list[Finding]:
        """Report examples that run one at a time, and layers that another library computes."""
        found = []
        if self.kind == "apart":
            found.append(
                Finding(
                    "rows-apart",
                    "note",
                    "examples go through the model one at a time, unpacked: slower, but with the "
                    "same results",
                    where=type(transformers_model(self.model)).__name__,
                    why=self.reason,
                    fix="nothing to do; --no-packing pads them to the same length instead",
                )
            )
        if self.fused is not None:
            left = "; ".join(self.fused.left)
            found.append(
                Finding(
                    "fused-parts",
                    "note",
                    f"liger-kernel computes {', '.join(self.fused.taken) or 'no layer'}"
                    + (f"; left out: {left}" if left else ""),
                    why="each layer was called on random numbers: outputs and gradients by the "
                    "kernel equal those of the model's own code up to rounding",
                    fix="nothing to do; without liger-kernel installed, the model's own code "
                    "computes all layers",
                )
            )
        if self.flash3:
            found.append(
                Finding(
                    "flash-attention-3",
                    "note",
                    f"flash-attention 3 computes the attention of {self.flash3}",
                    why="with each shape, a small tree was computed forward and backward, and "
                    "compared with a softmax written out",
                    fix="nothing to do; torch's own kernels compute the other layers",
                )
            )
        return found


def transformers_model(model: Any) -> Any:
    """Return the model without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_route(
    model: torch.nn.Module,
    *,
    longest: int,
    packing: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Route:
    """Return the fastest route whose results are right for this model.

    Args:
        model: a transformers model, peft's wrapper around one, or any module.
        longest: the number of tokens of the longest row in the run.
        packing: False selects the padded reference path.
        autocast: what the run computes in.
    """
    inner = transformers_model(model)
    if not packing:
        return Route(model, "padded", reason="as asked")
    if not hasattr(inner, "set_attn_implementation") or not hasattr(inner, "get_input_embeddings"):
        return Route(model, "padded", reason="not a transformers model")
    from truetune.compute.adapter import find_adapters

    with mode_kept(model):
        model.eval()
        # A compiled forward would build masks for the test's lengths only, so it runs uncompiled.
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # FlexAttention runs uncompiled too, and would warn about it.
            warnings.filterwarnings("ignore", "flex_attention called without")
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                reason = _against_packing(model, longest)
            route = Route(model, "apart" if reason else "packed", reason=reason)
            route.head = _proved_head(route)
            route.adapters = find_adapters(model)
            route.fused = _proved_kernels(route)
            with torch.no_grad(), autocast():
                route.flash3 = _flash3(route)
    return route


def _probe_rows(model: Any) -> list[torch.Tensor]:
    """Return rows of random ids from the whole vocabulary; they are the same in every call."""
    table = transformers_model(model).get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(table.shape[0], (length,), generator=generator).to(table.device)
        for length in _PROBE
    ]


def _whole_rows(nodes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return each node with the nodes that it continues, as one row."""
    return [
        node if parent < 0 else torch.cat([nodes[parent], node])
        for node, parent in zip(nodes, _BRANCHES, strict=True)
    ]


def _own_logits(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    return Route(model, "apart").logits(_batch_of([row]))[0]


def _batch_of(rows: list[torch.Tensor], parents: tuple[int, ...] | None = None) -> PackedBatch:
    """Return a batch of rows, or of nodes of trees, without supervised tokens."""
    none = torch.zeros(0, dtype=torch.int64)
    layout = Layout(tuple(len(row) for row in rows), parents or (-1,) * len(rows))
    return PackedBatch(torch.cat(rows), layout, none, none, none.float(), (), 0, 0)


def _against_packing(model: torch.nn.Module, longest: int) -> str:
    """Return why this model's rows cannot be packed; empty if they can."""
    from truetune.compute.attention import watched_attention

    rows = _probe_rows(model)
    watched: list[Any] = []
    with _rotary_calls(model) as rotary:
        apart = [_own_logits(model, row) for row in _whole_rows(rows)]
    if rotary and _depends_on_longest(rotary, longest):
        return "the frequencies of its rotary embedding depend on the longest row of a batch"
    route, batch = Route(model, "packed"), _batch_of(rows, _BRANCHES)
    try:
        with route.scope(batch):
            packed = route.logits(batch)[0].split(list(_PROBE))
        with watched_attention(transformers_model(model), watched):
            alone = route.logits(_batch_of(rows[1:2]), mask=True)[0]
    except Exception as error:  # a model may raise anything for arguments that it does not know
        if is_out_of_memory(error):
            raise
        return f"its forward pass does not accept a packed sequence: {type(error).__name__}"
    pairs = [(a, b[-len(a) :]) for a, b in zip(packed, apart, strict=True)]
    if not all(same_to_rounding(a, b) for a, b in [*pairs, (alone, apart[1])]):
        return "a test gives different results packed and unpacked"
    if not watched:
        return "its attention does not use transformers' interface"
    if not all(seen.is_what_the_mask_shows(longest) for seen in watched):
        return "a layer's mask does not match its window"
    return ""


def same_to_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two results differ by rounding only."""
    # Rows that see each other differ by far more than this limit.
    limit = 1e-3 if a.element_size() == 4 else 5e-2
    return bool((a.float() - b.float()).norm() <= limit * b.float().norm())


@contextlib.contextmanager
def _rotary_calls(model: torch.nn.Module) -> Iterator[dict[Any, tuple[Any, Any]]]:
    """Record the arguments of each module that turns positions into angles, by module."""
    calls: dict[Any, tuple[Any, Any]] = {}

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = (args, kwargs)

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _depends_on_longest(calls: dict[Any, tuple[Any, Any]], longest: int) -> bool:
    """Return whether the angles of the first positions change if the last position of the longest
    row is present."""

    def swapped(value: Any, positions: torch.Tensor) -> Any:
        is_positions = isinstance(value, torch.Tensor) and not value.is_floating_point()
        return positions if is_positions and value.ndim == 2 else value

    for module, (args, kwargs) in calls.items():
        short = torch.arange(8)[None]
        long = torch.cat([short, torch.tensor([[max(longest - 1, 8)]])], 1)
        turned = []
        # transformers before 5.13 keeps the angles of the longest row: the model's are left alone.
        module = copy.deepcopy(module)
        for positions in (short, long):
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            positions = positions.to(given[0].device)
            made = module(
                *(swapped(a, positions) for a in args),
                **{k: swapped(v, positions) for k, v in kwargs.items()},
            )
            parts = made if isinstance(made, tuple) else (made,)
            turned.append([part[..., :8, :] for part in parts])
        if not all(torch.equal(a, b) for a, b in zip(turned[0], turned[1], strict=True)):
            return True
    return False


def _proved_head(route: Route) -> SupervisedHead | None:
    from truetune.compute.head import find_head

    batch = _batch_of(_probe_rows(route.model)[:1])
    with route.scope(batch):
        return find_head(transformers_model(route.model), lambda: route.logits(batch))


def _proved_kernels(route: Route) -> Fused | None:
    """Return the fused layers of liger-kernel that this model can use; None without a GPU."""
    batch = _batch_of(_probe_rows(route.model)[:1])
    if batch.ids_T.device.type != "cuda":
        return None
    from truetune.compute.fused import find_fused, liger

    with route.scope(batch):
        return find_fused(route.model, lambda: route.logits(batch), liger())


def _flash3(route: Route) -> str:
    """Return in how many layers flash-attention 3 computes attention, and why not in the others;
    "" if it is not installed."""
    batch = _batch_of(_probe_rows(route.model)[:1])
    if batch.ids_T.device.type != "cuda" or route.kind != "packed":
        return ""
    from truetune.compute.cuda.varlen import chosen_kernels

    with chosen_kernels() as chosen, route.scope(batch):
        route.logits(batch)
    layers = [one.why_not_3 for one in chosen if one.why_not_3 != ""]
    if not layers:
        return ""
    reasons = "; ".join(dict.fromkeys(reason for reason in layers if reason))
    return f"{layers.count(None)} of {len(layers)} layers" + (f": {reasons}" if reasons else "")
