"""Output memory that stays mapped between calls.

On the CPU a fresh block of 100 MB costs more in page faults than the kernel that fills it, since the allocator gives
large blocks back to the system. Blocks made here return to a short list when the last tensor that uses them dies, so
that every caller gets warm memory and none can see another's values change. On other devices torch's own caching
allocator does this.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 20  # smaller blocks are kept by the C allocator itself
KEPT_BYTES = (
    1 << 29
)  # the most that waits for reuse: a larger block goes back to the system at once
ALIGNMENT = 64

_lock = threading.Lock()
_free: list[np.ndarray] = []


class _Handle(np.ndarray):
    """A view that one torch storage owns: its end is the storage's end."""


def _give_back(block: np.ndarray) -> None:
    with _lock:
        _free.append(block)
        while sum(kept.nbytes for kept in _free) > KEPT_BYTES:
            del _free[0]


def _take(n_bytes: int) -> np.ndarray:
    with _lock:
        fitting = [i for i, block in enumerate(_free) if n_bytes <= block.nbytes <= 2 * n_bytes]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].nbytes))
    return np.empty(n_bytes, dtype=np.uint8)


def empty_reused(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of `shape` with the dtype and device of `like`."""
    n_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or n_bytes < SMALLEST_BYTES:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    block = _take(n_bytes + ALIGNMENT)
    start = -block.ctypes.data % ALIGNMENT
    handle = block[start : start + n_bytes].view(_Handle)
    weakref.finalize(handle, _give_back, block).atexit = False
    return torch.frombuffer(handle, dtype=like.dtype).view(tuple(shape))


def release() -> None:
    """Gives the kept blocks back to the system."""
    with _lock:
        _free.clear()


@functools.cache
def keep_freed_memory() -> None:
    """Tells the C allocator, once and for the whole process, to keep what is freed instead of
    giving it back.

    A training loop frees and takes the same blocks in every step, and glibc maps blocks of more
    than 32 MB anew each time: a quarter of a replay step was page faults. The process then stays at
    the size of its peak until it ends. Called by `fit`, `recover` and `evaluate`; does nothing with
    another C library, or where the environment sets the allocator itself (`MALLOC_MMAP_MAX_`,
    `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`).
    """
    if any(
        name in os.environ
        for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # glibc's M_TRIM_THRESHOLD and M_MMAP_MAX
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
