"""liger-kernel's contract on a CPU: equal functions, which write over what its kernels write over.

`interpreted` gives its own kernels, by Triton's interpreter, in float32: it computes in bfloat16 as
if the bits were whole numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from truetune.compute.fused import Kernels, liger


class Product(torch.autograd.Function):
    """act(a) * b; the gradients stand where a and b stood."""

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, act: Any) -> Any:
        ctx.save_for_backward(a.detach(), b.detach())
        ctx.act = act
        return (act(a.float()).to(b.dtype) * b).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.float().requires_grad_() for t in (a.clone(), b.clone())]
            made = torch.autograd.grad(ctx.act(leaves[0]) * leaves[1], leaves, grad.float())
        for kept, of in zip((a, b), made, strict=True):
            kept.data.copy_(of)
        return a, b, None


class Rope(torch.autograd.Function):
    """Turned where they stand, and their gradients too."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        return turned(q, cos, sin), turned(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, of_q: Any, of_k: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return turned(of_q, cos, -sin), turned(of_k, cos, -sin), None, None


def turned(x: Any, cos: Any, sin: Any) -> Any:
    """(B, H, T, D) in place where the memory is that of (B, T, H, D)."""
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    width = cos.shape[-1]
    half = width // 2
    a, b = x[..., :half].float().clone(), x[..., half:width].float().clone()
    c, s = (t[:, None, :, :half].float() for t in (cos, sin))
    x.data[..., :half] = (a * c - b * s).to(x.dtype)
    x.data[..., half:width] = (b * c + a * s).to(x.dtype)
    return x


def rms_norm(x: Any, weight: Any, eps: float, offset: float, casting: str) -> Any:
    made = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (made.to(x.dtype) * (weight + offset)).to(x.dtype)
    return (made * (weight.float() + offset)).to(x.dtype)


def tanh_gelu(x: Any) -> Any:
    return F.gelu(x, approximate="tanh")


STAND_IN = Kernels(
    rms_norm,
    {
        "SwiGLU": (lambda a, b: Product.apply(a, b, F.silu), F.silu),
        "GeGLU": (lambda a, b: Product.apply(a, b, tanh_gelu), tanh_gelu),
    },
    Rope.apply,
)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """liger-kernel's own, in a process that was started with TRITON_INTERPRET=1."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        """Numbers too, which a compiled kernel gets as float32."""
        if not isinstance(value, float):
            return own(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    # CUDA's own functions, which the interpreter does not have.
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.math.rsqrt(x))
    gelus = importlib.import_module("liger_kernel.ops.geglu")
    monkeypatch.setattr(gelus, "tanh", lambda x: 1 - 2 / (1 + tl.math.exp(2 * x)))
    found = liger()
    assert isinstance(found, Kernels), found
    products = {
        name: (functools.partial(_in_float32, fused), act)
        for name, (fused, act) in found.products.items()
    }
    return dataclasses.replace(found, products=products)


def _in_float32(fused: Any, a: Any, b: Any) -> Any:
    return fused(a.float(), b.float()).to(a.dtype)
