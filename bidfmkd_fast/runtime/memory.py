"""Refuse work that cannot fit into the memory of its device. This module only reads its size."""

from __future__ import annotations

import os

import torch

from bidfmkd_fast.errors import InputError


def check_memory(
    operation: str, what: str, n_bytes: int, advice: str, device: torch.device | str | None = None
) -> None:
    """Raise InputError if `n_bytes` are more than the whole memory of the device.

    Torch would end such work with a traceback, or the system would kill the process, after
    everything that came before was done and paid for.

    Args:
        operation: opens the message.
        what: what takes the memory, with the number that the user has set.
        n_bytes: a lower bound of what it takes.
        advice: how to make it smaller.
        device: where it lies; the CPU when None.
    """
    where = torch.device("cpu" if device is None else device)
    available = memory_of(where)
    if n_bytes > available:
        place = str(where) if where.type == "cuda" else "this machine"
        raise InputError(
            f"{operation}: {what} takes at least {_gigabytes(n_bytes)} of memory, and {place} has "
            f"{_gigabytes(available)}; {advice}"
        )


def memory_of(device: torch.device) -> int:
    """Return the size of the whole memory of a device in bytes, free or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gigabytes(n_bytes: int) -> str:
    return f"{-(-n_bytes // 10**9):,} GB"
