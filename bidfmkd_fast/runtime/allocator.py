"""Keep the memory of large outputs mapped between calls.

On the CPU a fresh block of 100 MB costs more time in page faults than the kernel that fills it,
since the C allocator returns large blocks to the system. A block made here goes back to a short
list when the last tensor that uses it dies. The next caller gets this memory, which is mapped
already. A block is never handed out while a tensor still uses it, so no caller sees its values
change. On other devices torch's own caching allocator does this.

State of the process: the list of free blocks, and whether glibc was told to keep freed memory.
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

SMALLEST_BYTES = 1 << 20  # the C allocator itself keeps smaller blocks
# The most memory that waits for reuse; a larger block goes back to the system at once.
KEPT_BYTES = 1 << 29
ALIGNMENT = 64

_lock = threading.Lock()
_free: list[np.ndarray] = []


class _Handle(np.ndarray):
    """A view of a block, owned by one torch storage: it dies when the storage does."""


def _give_back(block: np.ndarray) -> None:
    """Put a block on the free list, and drop the oldest ones beyond `KEPT_BYTES`."""
    with _lock:
        _free.append(block)
        while sum(kept.nbytes for kept in _free) > KEPT_BYTES:
            del _free[0]


def _take(n_bytes: int) -> np.ndarray:
    """Return the smallest free block of at least `n_bytes`, or a new one.

    Blocks of more than twice the size are left for larger tensors.
    """
    with _lock:
        fitting = [i for i, block in enumerate(_free) if n_bytes <= block.nbytes <= 2 * n_bytes]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].nbytes))
    return np.empty(n_bytes, dtype=np.uint8)


def empty_reused(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor of `shape`, with dtype and device of `like`."""
    n_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or n_bytes < SMALLEST_BYTES:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    block = _take(n_bytes + ALIGNMENT)
    start = -block.ctypes.data % ALIGNMENT
    handle = block[start : start + n_bytes].view(_Handle)
    weakref.finalize(handle, _give_back, block).atexit = False
    return torch.frombuffer(handle, dtype=like.dtype).view(tuple(shape))


def release() -> None:
    """Return the blocks on the free list to the system."""
    with _lock:
        _free.clear()


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory in the process instead of returning it to the system.

    A training loop frees and takes the same blocks in every step, and glibc maps blocks of more
    than 32 MB anew each time: page faults took a quarter of a replay step. The price is that the
    process stays at its peak size until it ends. `fit`, `recover` and `evaluate` call this; only
    the first call in a process does anything. It does nothing with another C library, or if the
    environment configures the allocator (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`,
    `GLIBC_TUNABLES`).
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
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in glibc's malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
