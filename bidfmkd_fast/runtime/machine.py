"""What a report says of the machine it was made on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def cpu_name() -> str:
    """The CPU's model where the system tells it, or its architecture."""
    try:
        found = re.search(
            r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine_text(device: torch.device | str) -> str:
    """The GPU, or the CPU and the number of threads torch uses on it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    n_threads = torch.get_num_threads()
    return f"{cpu_name()}, {n_threads} thread{'s' if n_threads > 1 else ''}"
