"""RMSNorm, SwiGLU and RoPE by liger-kernel's fused kernels, where they compute what the model does.

input   a model on a GPU, and a call of it
does    finds the layers by what they compute, never by a name: each is called on random numbers,
        by its own code and by the kernel, and its outputs and gradients must be equal to rounding
output  Fused: what is computed by kernels inside `fused_parts`, and what was left out and why

Its cross-entropy is not used: a call asks the device for numbers four times, and the host would
wait; and it returns losses rounded to bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from truetune.errors import is_out_of_memory

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """Fused functions, with gradients.

    Attributes:
        rms_norm: of x (., D), weight (D,), epsilon, what is added to the weight, and "llama" or
            "gemma": whether x is rounded to its type before or after the weight.
        products: name -> (fused act(a) * b, act); the backward pass writes over a and b.
        rope: of q (B, H, T, D), k (B, G, T, D), cos and sin (B, T, R); writes over q and k.
    """

    rms_norm: Callable[..., torch.Tensor]
    products: Mapping[str, tuple[Forward, Forward]]
    rope: Callable[..., tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def liger() -> Kernels | str:
    """Those of liger-kernel; or why there are none, empty where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return ""
    try:
        from liger_kernel import ops
    except Exception as error:  # of Triton, which looks for a compiler and a driver
        return f"liger-kernel cannot be imported: {type(error).__name__}: {error}"

    def rms_norm(x: Any, weight: Any, eps: float, offset: float, casting: str) -> Any:
        # Not in place: the gradient that it would write over may also be that of a residual.
        return ops.LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)

    return Kernels(
        rms_norm,
        {
            "SwiGLU": (ops.LigerSiLUMulFunction.apply, F.silu),
            "GeGLU": (
                ops.LigerGELUMulFunction.apply,
                functools.partial(F.gelu, approximate="tanh"),
            ),
        },
        ops.LigerRopeFunction.apply,
    )


@dataclass(frozen=True)
class Fused:
    """What kernels compute.

    Attributes:
        forwards: module -> what is called instead of its forward.
        functions: (globals of a module of code, name, what stands there instead).
        taken: what is computed by kernels, in words.
        left: what is not, and why.
    """

    forwards: Mapping[torch.nn.Module, Forward]
    functions: tuple[tuple[dict[str, Any], str, Forward], ...]
    taken: tuple[str, ...]
    left: tuple[str, ...]


def find_fused(
    model: torch.nn.Module, run: Callable[[], Any], kernels: Kernels | str
) -> Fused | None:
    """What the kernels compute as the model does; None where there are none, and nothing to tell.

    Args:
        model: in evaluation mode.
        run: calls the model on a few ids.
    """
    if isinstance(kernels, str):
        return Fused({}, (), (), (kernels,)) if kernels else None
    rotary = _rotary_functions(model)
    seen = _Seen()
    with seen.watching(model, rotary), torch.no_grad():
        run()
    forwards: dict[torch.nn.Module, Forward] = {}
    counts: dict[str, list[int]] = {}

    def count(name: str, fits: bool) -> None:
        counts.setdefault(name, [0, 0])[fits] += 1

    for module, x in seen.norms.items():
        fast = _fast_norm(module, x, kernels)
        count("RMSNorm", fast is not None)
        if fast is not None:
            forwards[module] = fast
    for module, x in seen.blocks.items():
        name, fast = _fast_block(module, x, kernels)
        if name:
            count(name, fast is not None)
        if fast is not None:
            forwards[module] = fast
    functions = []
    for place, (store, name) in enumerate(rotary):
        calls, own = seen.rotated[place], store[name]
        proved = {_key(*given) for given in calls if _is_rope(own, given, kernels)}
        if calls:
            count("RoPE", bool(proved))
        if proved:
            functions.append((store, name, _fast_rope(own, proved, kernels)))
    reason = "the kernel fails, or gives other results than the model's own code"
    return Fused(
        forwards,
        tuple(functions),
        tuple(f"{name} ({fit} of {fit + left})" for name, (left, fit) in counts.items() if fit),
        tuple(f"{name} ({left}): {reason}" for name, (left, _) in counts.items() if left),
    )


@contextlib.contextmanager
def fused_parts(fused: Fused) -> Iterator[None]:
    """The model computes by the kernels inside, recomputed activations included."""
    before = [vars(module).get("forward") for module in fused.forwards]
    own = [store[name] for store, name, _ in fused.functions]
    for module, forward in fused.forwards.items():
        module.forward = forward
    for store, name, fast in fused.functions:
        store[name] = fast
    try:
        yield
    finally:
        for module, was in zip(fused.forwards, before, strict=True):
            if was is None:
                del module.forward
            else:
                module.forward = was
        for (store, name, _), was in zip(fused.functions, own, strict=True):
            store[name] = was


class _Seen:
    """What a call of a model showed: inputs of its norms and of its gated layers, and of the
    functions that turn queries and keys."""

    def __init__(self) -> None:
        self.norms: dict[torch.nn.Module, torch.Tensor] = {}
        self.blocks: dict[torch.nn.Module, torch.Tensor] = {}
        self.rotated: list[list[tuple[torch.Tensor, ...]]] = []

    @contextlib.contextmanager
    def watching(
        self, model: torch.nn.Module, rotary: Sequence[tuple[dict[str, Any], str]]
    ) -> Iterator[None]:
        handles = []
        for module in model.modules():
            into = self.norms if _may_be_norm(module) else self.blocks
            if into is self.norms or len(list(module.children())) >= 3:
                hook = functools.partial(_note, into)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        own = [store[name] for store, name in rotary]
        self.rotated = [[] for _ in rotary]
        for (store, name), function, calls in zip(rotary, own, self.rotated, strict=True):
            store[name] = functools.partial(_noted, function, calls)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for (store, name), function in zip(rotary, own, strict=True):
                store[name] = function


def _note(into: dict[Any, torch.Tensor], module: Any, args: Any, kwargs: Any) -> None:
    one = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
    if one and args[0].is_floating_point():
        into[module] = args[0]


def _noted(function: Forward, calls: list[Any], *args: Any, **kwargs: Any) -> Any:
    if len(args) == 4 and not kwargs:
        calls.append(args)
    return function(*args, **kwargs)


# ------------------------------------------------------------------ norms


def _may_be_norm(module: torch.nn.Module) -> bool:
    own = dict(module.named_parameters())
    return list(own) == ["weight"] and own["weight"].ndim == 1 and not list(module.children())


def _fast_norm(module: Any, x: torch.Tensor, kernels: Kernels) -> Forward | None:
    """The kernel's best form of it; None if none has its results."""
    # Small inputs too: only there what is added to the mean square is seen.
    inputs = [_normal(x), _normal(x, 1e-3)]
    weight = (1 + 0.5 * _normal(module.weight)).requires_grad_(module.weight.requires_grad)
    own, dtype = module.forward, x.dtype
    best: tuple[float, Forward | None] = (1.0, None)
    wanted = [_results(_with(module, own, weight), [x], [weight]) for x in inputs]
    numbers = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 1}
    for eps in sorted(numbers):
        for offset, casting in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma")):

            def forward(
                x: torch.Tensor,
                *rest: Any,
                _given: tuple[float, float, str] = (eps, offset, casting),
                **named: Any,
            ) -> Any:
                if rest or named or x.dtype != dtype:
                    return own(x, *rest, **named)
                return kernels.rms_norm(x, module.weight, *_given)

            error = max(
                _apart(right, _results(_with(module, forward, weight), [x], [weight]))
                for x, right in zip(inputs, wanted, strict=True)
            )
            if error <= best[0]:
                best = (math.nextafter(error, 0), forward)
    return best[1]


def _with(module: Any, forward: Forward, weight: torch.Tensor) -> Forward:
    """The module by this forward, and with other weights."""

    def called(x: torch.Tensor) -> Any:
        was = vars(module).get("forward")
        module.forward = forward
        try:
            return torch.func.functional_call(module, {"weight": weight}, (x,))
        finally:
            if was is None:
                del module.forward
            else:
                module.forward = was

    return called


# ------------------------------------------------------------------ gated layers


def _fast_block(module: Any, x: torch.Tensor, kernels: Kernels) -> tuple[str, Forward | None]:
    """The name of the product that a layer makes of two of its children on one input, empty if it
    makes none; and the layer with that product fused, None if its results are other ones."""
    x = _normal(x)
    try:
        made = _product(module, x, kernels)
    except Exception as error:  # whatever a layer says to random numbers, or is made of
        if is_out_of_memory(error):
            raise
        return "", None
    if made is None:
        return "", None
    name, gate, up, down = made
    fused, own = kernels.products[name][0], module.forward
    proved: set[torch.dtype] = set()

    def forward(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or _computed_in(x) not in proved:
            return own(x, *rest, **named)
        return down(fused(gate(x), up(x)))

    trained = [p for p in module.parameters() if p.requires_grad]
    contexts = [torch.autocast(x.device.type, enabled=False)]
    if x.dtype == torch.float32:
        contexts.append(torch.autocast(x.device.type, dtype=torch.bfloat16))
    for context in contexts:
        with context:
            compute = _computed_in(x)
            right = _results(own, [x], trained)
            proved.add(compute)
            if _apart(right, _results(forward, [x], trained), compute) > 1:
                return name, None
    return name, forward


def _computed_in(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _product(
    module: torch.nn.Module, x: torch.Tensor, kernels: Kernels
) -> tuple[str, torch.nn.Module, torch.nn.Module, torch.nn.Module] | None:
    """The name of the product, and the children that make its sides and that take it."""
    calls: list[tuple[torch.nn.Module, Any, Any]] = []
    handles = [
        child.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
        for child in module.children()
    ]
    try:
        with torch.no_grad():
            whole = module(x)
    finally:
        for handle in handles:
            handle.remove()
    sides = [call for call in calls if call[1] is x]
    last = [call for call in calls if call[2] is whole]
    if len(sides) != 2 or len(last) != 1:
        return None
    down, taken, _ = last[0]
    for (gate, _, a), (up, _, b) in (sides, sides[::-1]):
        for name, (_, act) in kernels.products.items():
            if a.shape == b.shape == taken.shape and _apart([taken], [act(a) * b]) <= 1:
                return name, gate, up, down
    return None


# ------------------------------------------------------------------ rotary embeddings


def _rotary_functions(model: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    """(globals, name) of functions of queries, keys, cosines and sines that the model's code
    calls."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for kind in {type(module) for module in model.modules()}:
        forward: Any = inspect.unwrap(kind.forward)
        for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            value = forward.__globals__.get(name)
            if inspect.isfunction(value):
                first = list(inspect.signature(value).parameters)[:4]
                if first == ["q", "k", "cos", "sin"]:
                    found[id(forward.__globals__), name] = (forward.__globals__, name)
    return list(found.values())


def _key(*given: torch.Tensor) -> tuple[Any, ...]:
    """What decides how the kernel computes a call: all but the number of tokens."""
    return tuple((t.dtype, t.shape[:-2], t.shape[-1]) for t in given)


def _fast_rope(own: Forward, proved: set[Any], kernels: Kernels) -> Forward:
    def rope(*given: Any, **named: Any) -> Any:
        if len(given) != 4 or named or _key(*given) not in proved:
            return own(*given, **named)
        q, k, cos, sin = given
        # The kernel writes over queries and keys, and over their gradients, all of which may also
        # be somebody else's.
        made = kernels.rope(q.clone(), k.clone(), cos, sin)
        for turned in made:
            if turned.requires_grad:
                turned.register_hook(torch.clone)
        return made

    return rope


def _is_rope(own: Forward, given: tuple[torch.Tensor, ...], kernels: Kernels) -> bool:
    *turned, cos, sin = given
    fast = _fast_rope(own, {_key(*given)}, kernels)
    inputs = [_normal(t) for t in turned]
    results = [_results(lambda q, k, f=f: f(q, k, cos, sin), inputs, []) for f in (own, fast)]
    return _apart(results[0], results[1]) <= 1


# ------------------------------------------------------------------ comparing


def _normal(like: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Random numbers of the same shape, order in memory and type."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(like.shape, generator=generator) * scale
    return torch.empty_like(like).copy_(made).detach()


def _results(
    forward: Forward, inputs: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Outputs and gradients; none at all if the call fails, as a kernel may for some shapes.

    Raises:
        RuntimeError: memory ran out.
    """
    leaves = [torch.empty_like(x).copy_(x).requires_grad_() for x in inputs]
    try:
        with torch.enable_grad():
            made = forward(*leaves)
            outputs = made if isinstance(made, tuple) else (made,)
            loss = sum((out.float() * _normal(out).float()).sum() for out in outputs)
            wanted = [*leaves, *(p for p in trained if p.requires_grad)]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return []
    return [*(out.detach() for out in outputs), *gradients]


def _apart(
    right: Sequence[torch.Tensor | None],
    made: Sequence[torch.Tensor | None],
    computed: torch.dtype | None = None,
) -> float:
    """The largest distance by norm, as a share of what rounding explains; infinite where a type
    differs or one is missing."""
    if not right or len(right) != len(made):
        return math.inf
    most = 0.0
    for own, other in zip(right, made, strict=True):
        if own is None or other is None:
            most = most if own is other else math.inf
            continue
        if own.dtype != other.dtype or own.shape != other.shape:
            return math.inf
        limit = 1e-4 if (computed or own.dtype) == torch.float32 else 3e-2
        apart = float((own.float() - other.float()).norm())
        share = apart / (limit * float(own.float().norm()) + 1e-12)
        most = max(most, share) if math.isfinite(share) else math.inf
    return most
