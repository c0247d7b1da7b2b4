"""flash-attention 3 in the place of torch's flash attention, for the length of a call.

torch 2.13 swaps its kernels for those of an installed package, in the whole process: also
for sampling and for other models, whose dropout or devices the package may refuse. So it is
swapped around each call and back afterwards, which takes 0.06 ms.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch.nn import attention as library

_NAME = "FA3"


@functools.cache
def why_not() -> str | None:
    """Why it is not used; "" if torch or the machine does not have it, None if it can be called."""
    own = getattr(library, "activate_flash_attention_impl", None)
    if own is None or _NAME not in library.list_flash_attention_impls():
        return ""
    if (chosen := library.current_flash_attention_impl()) is not None:
        return f"the program has chosen {chosen} for torch's flash attention"
    try:
        with active():
            pass
    except ModuleNotFoundError as error:
        # Another module is missing if the package itself is there.
        return "" if str(error.name).startswith("flash_attn") else _failed(error)
    except Exception as error:  # of a package that was built for another torch
        return _failed(error)
    return None


def _failed(error: Exception) -> str:
    return f"it cannot be loaded: {type(error).__name__}: {error}"


@contextlib.contextmanager
def active() -> Iterator[None]:
    """torch's flash attention is flash-attention 3 inside."""
    library.activate_flash_attention_impl(_NAME)
    try:
        yield
    finally:
        library.restore_flash_attention_impl()
