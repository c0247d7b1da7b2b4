"""Memory of the process: freed pages to keep, the places of gradients, how to detect that memory
ran out, and the state from which a failed step is tried again."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from truetune.system.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def peak_bytes() -> int:
    """The most memory that was taken so far: of the GPU where one is used, else of the process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_cached_blocks_back(device: torch.device) -> None:
    """Free the CUDA memory that torch caches: a larger block may fit where several smaller ones
    were."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def get_random_state() -> list[torch.Tensor]:
    """Of the CPU, then of each CUDA device."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_cuda]


def set_random_state(state: list[torch.Tensor]) -> None:
    """As `get_random_state` gave it; states of devices that are not here are left out."""
    torch.set_rng_state(state[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1 : 1 + torch.cuda.device_count()])


# Of <malloc.h>: the largest top of the heap that stays, and how many blocks may be mapped.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_pages() -> bool:
    """Have the C library keep what is freed, for the next micro-batch; whether it does.

    glibc maps blocks beyond 32 MB anew each time, and every page of them faults: activations of
    4,352 tokens took a fifth more time a token than those of 1,700 (docs/log.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # other C libraries
        return False
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def give_freed_pages_back() -> None:
    """To the system, for another process."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def keep_gradients_apart(parameters: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Have every gradient stand at a place of its own, made now and once; what is returned ends it.

    Where activations are computed anew, those of one layer after the other take the same memory,
    unless gradients that are made between them stay there: then each layer takes its own, as if
    nothing were computed anew (docs/log.md). A parameter without a gradient still has none.
    """
    places = {parameter: torch.empty_like(parameter) for parameter in parameters}

    def move(parameter: torch.Tensor) -> None:
        place = places[parameter]
        if parameter.grad is not None and parameter.grad is not place:
            parameter.grad = place.copy_(parameter.grad)

    handles = [parameter.register_post_accumulate_grad_hook(move) for parameter in places]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
