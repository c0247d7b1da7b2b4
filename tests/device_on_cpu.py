"""A CUDA device that is not there: tensors of a CPU that say they are on it, refuse to meet those
of the CPU as a device would, and count how often the host waits for them.

By storage: what a function makes of tensors of the device is on the device; what is made of no
tensor and asks for no device is on the CPU; what autograd makes by itself may meet either.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

from truetune.compute import dropout, flex, fused
from truetune.compute.cuda import varlen
from truetune.system import lazy
from varlen_on_cpu import OnCpu

DEVICE = torch.device("cuda", 0)
# What may take a tensor of each side: copies, and indexing by numbers of the CPU.
_CROSSES = {
    "copy_",
    "__getitem__",
    "__setitem__",
    "__set__",
    "to",
    "set_",
    "result_type",
    "_has_compatible_shallow_copy_type",
}
# What hands numbers to the host, which waits for all work before.
_WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal",
          "allclose", "cpu", "numpy", "masked_select", "unique", "__contains__"}  # fmt: skip


def _is_device(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


class Device(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.sides: dict[int, str] = {}
        self.waits: list[str] = []
        self.bytes = self.most = 0

    def side(self, tensor: torch.Tensor) -> str:
        """ "cuda", "cpu", or "" where nobody knows."""
        try:
            return self.sides.get(tensor.untyped_storage()._cdata, "")
        except (NotImplementedError, RuntimeError):  # inside vmap
            return ""

    def put(self, tensor: torch.Tensor, side: str) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        key, size = storage._cdata, storage.nbytes() if side == "cuda" else 0
        if key not in self.sides:
            weakref.finalize(storage, self._freed, key, size)
            self.bytes += size
            self.most = max(self.most, self.bytes)
        self.sides[key] = side

    def _freed(self, key: int, size: int) -> None:
        del self.sides[key]
        self.bytes -= size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_parse_to" or func is torch.device:
            return func(*args, **kwargs)
        prop = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if prop in ("device", "is_cuda", "is_cpu"):
            there = self.side(args[0]) == "cuda"
            return {"device": DEVICE if there else func(*args), "is_cuda": there,
                    "is_cpu": not there}[prop]  # fmt: skip
        if name == "backward":
            # As torch does it, and with the device still there.
            with self:
                torch.autograd.Variable._execution_engine.run_backward(
                    args[:1], (torch.ones_like(args[0]),), False, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
            return None
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        sides = [self.side(t) for t in given]
        if name in ("to", "cuda", "cpu", "pin_memory"):
            return self._moved(func, name, args, kwargs, sides[0])
        if name not in _CROSSES and "cuda" in sides:
            for tensor, side in zip(given, sides, strict=True):
                if side == "cpu" and tensor.ndim:
                    raise RuntimeError(
                        f"{name}: expected all tensors to be on the same device, but found "
                        f"{DEVICE} and cpu, {tuple(tensor.shape)} of {tensor.dtype}"
                    )
        if name == "__getitem__" and sides[0] == "cpu" and "cuda" in sides:
            raise RuntimeError("indices should be on the CPU, as the tensor is")
        if name == "numpy" and sides[0] == "cuda":
            raise TypeError("can't convert a tensor of the device to numpy")
        if name in _WAITS and "cuda" in sides:
            self.waits.append(name)
        asked = [v for v in tree_leaves((args, kwargs)) if _is_device(v)]
        here = [v for v in (kwargs.get("device"),) if v is not None and not _is_device(v)]
        if asked:
            args, kwargs = tree_map(lambda v: "cpu" if _is_device(v) else v, (args, kwargs))
        if name == "histc":  # the device counts whole numbers, a CPU does not
            args = (args[0].float(), *args[1:])
        made = func(*args, **kwargs)
        side = "cuda" if asked or ("cuda" in sides and not here) else ""
        if not side and (here or (not given and name not in ("backward", "grad"))):
            side = "cpu"
        if side and name != "__set__":
            for value in tree_iter(made):
                if isinstance(value, torch.Tensor) and not self.side(value):
                    self.put(value, side)
        return made

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any, before: str) -> Any:
        target = before
        values = [*args[1:], *kwargs.values()]
        if name == "pin_memory":
            assert before != "cuda", "only memory of the CPU can be pinned"
            return args[0]
        if name == "cuda" or any(_is_device(v) for v in values):
            target = "cuda"
        elif name == "cpu" or any(str(v) == "cpu" for v in values if not _is_tensor(v)):
            target = "cpu"
        for value in values:
            if _is_tensor(value) and self.side(value):
                target = self.side(value)
        if name == "to":
            args, kwargs = tree_map(lambda v: "cpu" if _is_device(v) else v, (args, kwargs))
            made = func(*args, **kwargs)
        else:
            made = args[0]
        if before == "cuda" and target == "cpu":
            self.waits.append(name)
        if target != before and made.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
            made = made.clone()
        if target:
            self.put(made, target)
        return made


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class Flash(OnCpu):
    """The device's kernel: everything that it is given is there, and so is what it returns."""

    made: Device

    def forward(self, *given: Any) -> Any:
        return self._there(super().forward, *given)

    def backward(self, *given: Any) -> Any:
        return self._there(super().backward, *given)

    def _there(self, compute: Any, *given: Any) -> Any:
        *tensors, at, _ = given
        for tensor in (*tensors, at.q, at.k, at.cum_q, at.cum_k):
            assert tensor is None or self.made.side(tensor) != "cpu"
        with torch._C.DisableTorchFunction():
            results = compute(*given)
        for result in results:
            self.made.put(result, "cuda")
        return results


def by_mask(
    q: Any, k: Any, v: Any, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Any:
    """FlexAttention's contract, which has no backward pass on a CPU; it takes what stands on one
    side alone."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    at = torch.arange(q.shape[2], device=q.device)
    seen = block_mask.mask_mod(None, None, at[:, None], at[None])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ v.float()).to(q.dtype)


@contextlib.contextmanager
def device(monkeypatch: pytest.MonkeyPatch, free: int = 2**40) -> Iterator[Device]:
    """Inside, there is one: with so many bytes free, and its flash attention by that of the CPU."""
    autocast, enabled, its_dtype = (
        torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype,
    )  # fmt: skip
    made = Device()
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a device that is not there",
        "is_bf16_supported": lambda **_: True,
        "get_device_capability": lambda *_: (7, 5),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": list,
        "set_rng_state_all": lambda _: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: made.bytes,
        "max_memory_allocated": lambda *_: made.most,
        "reset_peak_memory_stats": lambda *_: setattr(made, "most", made.bytes),
        "memory_reserved": lambda *_: made.bytes,
        "mem_get_info": lambda *_: (free, 2 * free),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # torch, and what keeps the functions that were used of it before.
    for library in (torch, lazy.torch):
        monkeypatch.setattr(library, "autocast", lambda _, *a, **k: autocast("cpu", *a, **k))
        monkeypatch.setattr(library, "is_autocast_enabled", lambda *_: enabled("cpu"))
        monkeypatch.setattr(library, "get_autocast_dtype", lambda *_: its_dtype("cpu"))
    monkeypatch.setattr(varlen, "Flash", type("Kernel", (Flash,), {"made": made}))
    # torch looks at saved tensors inside of functions, where none says that it is on the device.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(checks, "default", lambda tensor: (tensor.shape, tensor.dtype))
    # liger-kernel's would be compiled for it, where it is installed.
    monkeypatch.setattr(fused, "liger", lambda: "")
    # Not compiled for it: the form that is.
    monkeypatch.setattr(dropout, "_compiled", lambda: dropout._by_element)
    monkeypatch.setattr(flex, "_compiled", lambda: by_mask)
    with made:
        yield made
