"""Choose the device and the dtypes, each with its reason."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from typing import Literal

from truetune.errors import UsageError, is_out_of_memory
from truetune.system.lazy import torch

Purpose = Literal["full", "lora", "inference"]

_DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}


@dataclass(frozen=True)
class Choice:
    """A value that was chosen for the user: its name, the value, and the reason."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where a model lives and in what types.

    Attributes:
        device: of all weights.
        parameters: dtype the base weights are loaded in.
        compute: dtype for autocast, None to compute in the parameters' own.
        choices: the same with reasons.
    """

    device: torch.device
    parameters: torch.dtype
    compute: torch.dtype | None
    choices: tuple[Choice, ...]


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """A floating dtype from its name (bfloat16, bf16, float32, fp32, float16, fp16).

    Raises:
        UsageError: another name.
    """
    key = str(name).removeprefix("torch.").lower()
    if key not in _DTYPES:
        raise UsageError(
            f"unknown dtype {name!r}",
            fix="use one of auto, bfloat16 (bf16), float32 (fp32), float16 (fp16)",
            code="dtype",
        )
    found = getattr(torch, _DTYPES[key])
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def place(
    device: str, dtype: str, purpose: Purpose, base_dtype: str, *, bf16_weights: bool = False
) -> Placement:
    """Choose device and dtypes.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, or the type to compute in.
        purpose: what the model is loaded for.
        base_dtype: the dtype of the weights on disk.
        bf16_weights: of purpose full: held and computed in bfloat16; the optimizer keeps the rest.

    Raises:
        UsageError: a device that is not there, an unknown dtype, training in float16.
    """
    where, device_choice = choose_device(device)
    if bf16_weights and purpose == "full":
        reason = "the optimizer keeps the lower half of each float32 weight"
        if base_dtype == "float32":
            reason += "; precision of the file beyond bfloat16 is lost"
        held = Choice("parameter dtype", "bfloat16", reason)
        return Placement(where, torch.bfloat16, None, (device_choice, held))
    compute, dtype_choice = _choose_compute(where, dtype, purpose, base_dtype)
    parameters, parameter_choice = _choose_parameters(compute, purpose)
    return Placement(
        device=where,
        parameters=parameters,
        compute=None if purpose == "inference" or _is_fp32(compute) else compute,
        choices=(device_choice, dtype_choice, parameter_choice),
    )


def require_device(device: str) -> None:
    """Raise now, without torch, where `choose_device` surely would later.

    Raises:
        UsageError: a GPU is asked for, and there is none, or none that the installed torch uses.
    """
    kind = device.partition(":")[0]
    why = ""
    if kind == "mps" and (sys.platform != "darwin" or platform.machine() != "arm64"):
        why = "mps is the GPU of Apple silicon"
    if kind == "cuda":
        why = _why_no_cuda()
    if why:
        raise UsageError(
            f"device {device!r} is not available",
            why=why,
            fix="use --device auto, or install a torch build for this GPU",
            code="device",
        )


def _why_no_cuda() -> str:
    """Why no GPU can be used; empty if one may be."""
    build = importlib.metadata.version("torch")
    if build.endswith("+cpu"):
        return f"torch {build} is a build without GPU support"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    # AMD's driver is different; a build of torch for it calls its devices cuda too.
    if os.path.exists("/dev/kfd") or _loads("libcuda.so.1"):
        return ""
    return "the NVIDIA driver is not installed" if sys.platform == "linux" else ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def choose_device(device: str) -> tuple[torch.device, Choice]:
    """The device and why: cuda, else mps, else cpu where `device` is auto.

    Raises:
        UsageError: it does not exist here.
    """
    if device != "cpu":
        _grow_segments()
    if device == "auto":
        if torch.cuda.is_available():
            index = torch.cuda.current_device()
            name = torch.cuda.get_device_name(index)
            return torch.device("cuda", index), Choice("device", "cuda", f"found {name}")
        if torch.backends.mps.is_available():
            return torch.device("mps"), Choice("device", "mps", "found an Apple GPU")
        return torch.device("cpu"), Choice("device", "cpu", "no GPU is visible to torch")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {device!r}",
            fix="use one of auto, cpu, cuda, cuda:N, mps",
            code="device",
        ) from error
    missing = (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()) or (
        chosen.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UsageError(
            f"device {device!r} is not available",
            why=f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
            fix="use --device auto, or install a torch build for this GPU",
            code="device",
        )
    return chosen, Choice("device", device, "as asked")


def _grow_segments() -> None:
    """Have CUDA's allocator extend its segments, so that batches of many lengths leave fewer holes
    between them. torch reads the variable when it first uses the device; what the user set stands.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    old = tuple(map(int, importlib.metadata.version("torch").split(".")[:2])) < (2, 9)
    os.environ[names[old]] = "expandable_segments:True"


def _choose_compute(
    device: torch.device, dtype: str, purpose: Purpose, base_dtype: str
) -> tuple[torch.dtype, Choice]:
    def choice(value: torch.dtype, reason: str) -> tuple[torch.dtype, Choice]:
        return value, Choice("dtype", dtype_name(value), reason)

    if dtype != "auto":
        asked = parse_dtype(dtype)
        if asked == torch.float16 and purpose != "inference":
            raise UsageError(
                "training in float16 is not supported",
                why="gradients in float16 underflow without loss scaling",
                fix="use --dtype bfloat16, or float32 if the GPU does not support bfloat16",
                code="dtype",
            )
        return choice(asked, "as asked")
    if device.type == "cpu":
        return choice(torch.float32, "float32 is exact")
    if device.type == "mps":
        return choice(torch.float32, "bfloat16 was not measured on this GPU")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if purpose == "inference" and (
        base_dtype in ("float16", "float32") or (base_dtype == "bfloat16" and has_bf16)
    ):
        return choice(parse_dtype(base_dtype), "the dtype of the weights on disk")
    if has_bf16:
        return choice(torch.bfloat16, "the GPU computes bfloat16 in hardware")
    return choice(torch.float32, "the GPU has no bfloat16, and float16 overflows")


# Tokens of the layer that is timed, the most columns of its weights, and how often, at least.
_TIMED_TOKENS, _TIMED_COLUMNS, _TIMES, _TIMED_SECONDS = 128, 2048, 3, 0.1
# How far its results may be from those in float32, of their norm (0.005 on a CPU).
_ROUNDING = 0.05


def bf16_speedup(
    hidden_size: int, device: torch.device | None = None, *, trained: bool = False
) -> float:
    """How many times as fast a device computes in bfloat16 as in float32; 0 where it cannot, or
    gives other results.

    Of two products of a model's width with an activation between them, forward and backward: the
    shortest of a few times each, in turn, which takes about 100 ms.

    Args:
        trained: with gradients of the weights, which are float32 and rounded for each pass.
    """
    where = device or torch.device("cpu")
    held = torch.float32 if trained else None
    columns = min(4 * hidden_size, _TIMED_COLUMNS)

    def layer(dtype: torch.dtype) -> list[torch.Tensor]:
        shapes = ((_TIMED_TOKENS, hidden_size), (columns, hidden_size), (hidden_size, columns))
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(s, generator=generator) for s in shapes)
        x, *weights = (t.mul_(t.shape[-1] ** -0.5).to(where, dtype) for t in drawn)
        weights = [w.to(held or dtype).requires_grad_(trained) for w in weights]
        return [x.requires_grad_(), *weights]

    def timed(dtype: torch.dtype, tensors: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        began = time.perf_counter()
        x, up, down = (t.to(dtype) for t in tensors)
        linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
        y = linear(silu(linear(x, up)), down)
        grads = torch.autograd.grad(y, [t for t in tensors if t.requires_grad], y)
        if where.type in ("cuda", "mps"):
            getattr(torch, where.type).synchronize()
        return time.perf_counter() - began, [y, *grads]

    try:
        layers = {dtype: layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
        shortest = dict.fromkeys(layers, math.inf)
        began = time.perf_counter()
        number = 0
        made: dict[torch.dtype, list[torch.Tensor]] = {}
        # The first round of each prepares kernels, and does not count.
        while number <= _TIMES or time.perf_counter() - began < _TIMED_SECONDS:
            for dtype, tensors in layers.items():
                taken, made[dtype] = timed(dtype, tensors)
                if number:
                    shortest[dtype] = min(shortest[dtype], taken)
            number += 1
        pairs = zip(made[torch.bfloat16], made[torch.float32], strict=True)
        if not all((a.float() - b).norm() <= _ROUNDING * b.norm() for a, b in pairs):
            return 0.0
    except RuntimeError as error:  # a type that the device does not have
        if is_out_of_memory(error):
            raise
        return 0.0
    return shortest[torch.float32] / max(shortest[torch.bfloat16], 1e-9)


def _choose_parameters(compute: torch.dtype, purpose: Purpose) -> tuple[torch.dtype, Choice]:
    def choice(value: torch.dtype, reason: str) -> tuple[torch.dtype, Choice]:
        return value, Choice("parameter dtype", dtype_name(value), reason)

    if purpose == "full":
        return choice(
            torch.float32,
            "in bfloat16, an Adam step of 2e-5 on a weight of 0.02 would be rounded away",
        )
    if purpose == "lora":
        return choice(
            compute, "the frozen base is kept in the compute dtype; LoRA weights are float32"
        )
    return choice(compute, "the compute dtype")


def _is_fp32(dtype: torch.dtype) -> bool:
    return dtype_name(dtype) == "float32"
