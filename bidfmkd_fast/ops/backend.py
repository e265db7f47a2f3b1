"""Load the native module `_C` once, and decide for each call whether its kernels serve it.

State of the process: the loaded module or the reason why it did not load, the backend that
`use_backend` chose, and whether the warning about the slow fallback was shown.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError

_C: ModuleType | None
load_error: str | None = None
try:
    from bidfmkd_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _C = None
    load_error = f"{type(error).__name__}: {error}"
    if (Path(__file__).parents[2] / "CMakeLists.txt").is_file():
        load_error += (
            "; this is the source tree, which hides an installed package: run from another folder"
        )

BACKENDS = ("auto", "native", "reference")

CPU_LEVEL = "BIDFMKD_CPU_LEVEL"  # the environment variable that names an instruction set


def _level_problem() -> str | None:
    """Select the instruction set that the environment names; return why that is not possible.

    By default the CPU's best is used. Together with torch's ATEN_CPU_CAPABILITY and
    ONEDNN_MAX_CPU_ISA the variable lets a machine compute as an older one does.
    """
    level = os.environ.get(CPU_LEVEL, "")
    if not level or _C is None:
        return None
    known = _C.build_info()["cpu_levels"]
    if level not in known:
        return f"{CPU_LEVEL} must be one of {', '.join(known)} on this CPU; got {level!r}"
    _C.select_cpu_level(level)
    return None


_level_error = _level_problem()  # raised by the first op, so that commands report it in one line
_devices = () if _C is None else tuple(_C.build_info()["devices"])
_backend = "auto"
_warned = False


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the code that runs the ops inside the block, for the whole process.

    Args:
        name: `auto` takes the native kernel where one exists and plain torch elsewhere (float64,
            or a device that this build has no kernels for). `native` raises an error instead of
            falling back. `reference` always takes plain torch.

    Raises:
        InputError: the name is unknown, or `native` was chosen and the native module could not be
            loaded.
    """
    global _backend
    if name not in BACKENDS:
        raise InputError(f"use_backend: name must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "native" and _C is None:
        raise InputError(
            f"use_backend: the native module is not available ({load_error}); "
            "reinstall bidfmkd-fast"
        )
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def build_info() -> dict[str, Any] | None:
    """Return how `_C` was built and which kernels it runs; None if it could not be loaded.

    `load_error` then says why.
    """
    return None if _C is None else dict(_C.build_info())


def selects(op: str, *tensors: Tensor) -> bool:
    """Return True if the native kernel serves a call of `op` on `tensors`.

    Raises:
        InputError: the kernel cannot serve the call and `use_backend("native")` is in force, or
            the environment names an instruction set that this CPU lacks.
    """
    if _backend == "reference":
        return False
    if _level_error is not None:
        raise InputError(_level_error)
    reason = _why_not(*tensors)
    if reason is None:
        return True
    if _backend == "native":
        raise InputError(f"{op}: backend 'native' was asked for, but {reason}")
    _warn_once(reason)
    return False


def device_problem(device: torch.device) -> str | None:
    """Return why the kernels cannot serve float32 tensors on `device`; None if they can."""
    if _C is None:
        return f"the native module could not be loaded ({load_error})"
    if device.type not in _devices:
        hint = (
            "; install it again with BIDFMKD_CUDA=ON in the environment"
            if device.type == "cuda"
            else ""
        )
        return f"this build has no kernels for device '{device.type}'{hint}"
    return _cuda_problem(device.index or 0) if device.type == "cuda" else None


@functools.cache
def _cuda_problem(index: int) -> str | None:
    assert _C is not None
    if not (problem := _C.cuda_problem(index)):
        return None
    built = ", ".join(_C.build_info()["cuda_architectures"])
    return f"the CUDA kernels, built for {built}, do not run on cuda:{index}: {problem}"


def _why_not(*tensors: Tensor) -> str | None:
    """Return why the kernels cannot serve a call on `tensors`; None if they can."""
    for tensor in tensors:
        if (problem := device_problem(tensor.device)) is not None:
            return problem
        if tensor.dtype == torch.float64:
            return "the kernels compute in float32, and a tensor is float64"
    return None


def _warn_once(reason: str) -> None:
    """Warn about the slow fallback, once in the process, if another installation would avoid it.

    No warning is due for float64 tensors and for devices other than CUDA: there the caller chose
    plain torch.
    """
    global _warned
    if not _warned and (_C is None or "CUDA" in reason):
        _warned = True
        warnings.warn(
            f"bidfmkd_fast: {reason}; plain torch is used, which is many times slower. "
            "`python -m bidfmkd_fast` shows the details.",
            RuntimeWarning,
            stacklevel=3,
        )
