"""Compute in full float32 inside a block, whatever precision the process has allowed.

Zeroth-order differences are small: the rounding of TF32 or bfloat16 would drown them.

State of the process: torch's precision settings before the first block, and the number of threads
that are inside a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_users = 0
_before: list[tuple[Any, str, Any]] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Run convolutions and matrix products in full float32 inside the block, on every device.

    Torch has these settings for the whole process, so they are restored when the last thread has
    left its block.
    """
    global _users, _before
    with _lock:
        if _users == 0:
            _before = _set_full()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore(_before)


def _set_full() -> list[tuple[Any, str, Any]]:
    """Turn every reduced precision off; return the settings before, in the order to restore."""
    backends: Any = torch.backends  # its submodules are only partly typed
    if not hasattr(backends.cudnn, "conv"):
        # Before torch 2.9 cuda.matmul.allow_tf32 is a view of float32_matmul_precision. Restoring
        # the view would turn "medium" into "high".
        before = [
            (backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32),
            (torch, "float32_matmul_precision", torch.get_float32_matmul_precision()),
        ]
        backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        return before
    holders = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    holders += [backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul]
    before = [(holder, "fp32_precision", holder.fp32_precision) for holder in holders]
    try:
        # The older setting must agree with the newer ones, since parts of torch refuse to run if
        # they differ.
        before.insert(0, (torch, "float32_matmul_precision", torch.get_float32_matmul_precision()))
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # they differ already, since the caller set only the newer ones
        pass
    for holder in holders:
        holder.fp32_precision = "ieee"
    return before


def _restore(before: list[tuple[Any, str, Any]]) -> None:
    """Set the precision settings that `_set_full` returned."""
    for holder, attribute, value in before:
        if holder is torch:
            torch.set_float32_matmul_precision(value)
        else:
            setattr(holder, attribute, value)
