"""Check devices and name the machine for a report. This module only reads the process's state."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import numpy
import torch

from bidfmkd_fast.errors import InputError


def usable_device(operation: str, device: torch.device | str) -> torch.device:
    """Return `device` with its index.

    Raises:
        InputError: torch cannot compute or keep values there; `operation` opens the message.
    """
    try:
        value = torch.zeros(1, device=device)
        value.item()  # fails on the "meta" device, which keeps no values
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = re.split(r"[.:] |\n", str(error))[0]
        raise InputError(
            f"{operation}: device must be one that torch can use here; got {str(device)!r}: "
            f"{reason}"
        ) from None
    return value.device


def cpu_name() -> str:
    """Return the model of the CPU if the system tells it, or the architecture."""
    try:
        found = re.search(
            r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine_text(device: torch.device | str) -> str:
    """Return the name of the GPU, or that of the CPU with the number of threads torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    n_threads = torch.get_num_threads()
    return f"{cpu_name()}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Return the versions of this package and of what it computes with, by name."""
    import bidfmkd_fast

    return {
        "bidfmkd_fast": bidfmkd_fast.__version__,
        "python": f"{platform.python_version()} on {platform.system()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
