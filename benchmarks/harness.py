"""Time contenders so that the result holds on a noisy machine.

The contenders of a case take turns. The ratio of two of them is the median of the ratios within
each turn, so that a load that lasts for some turns touches both alike.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bidfmkd_fast.runtime import allocator

_libc = ctypes.CDLL(None)

Function = Callable[[], object]
OURS = "ours"
# A contender that is quicker than this runs once before it is timed in each turn, because the
# contender before it has emptied the caches.
QUICK_MS = 50


@dataclass
class Prepared:
    """One case, ready to run.

    Attributes:
        contenders: name -> function to time; "ours" among them.
        check: raises AssertionError unless ours, and what can be compared with it, is right; it
            runs before anything is timed.
        n_bytes: the least that the work must move through memory; 0 if arithmetic is the limit.
        limit: the name of the contender that is the physical limit, if there is one.
        output_bytes: the size of what a call returns, which is left out of the memory figure.
    """

    contenders: dict[str, Function]
    check: Function
    n_bytes: int = 0
    limit: str | None = None
    output_bytes: int = 0


@dataclass
class Case:
    """A named case, and the function that prepares it."""

    name: str
    prepare: Callable[[], Prepared]


CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Callable[[], Prepared]], Callable[[], Prepared]]:
    """Register a function that prepares a case."""

    def register(prepare: Callable[[], Prepared]) -> Callable[[], Prepared]:
        CASES[name] = Case(name, prepare)
        return prepare

    return register


@dataclass
class Row:
    """One contender of one case: times in ms, ratios of times, memory beyond its output in MB."""

    case: str
    contender: str
    threads: int
    median_ms: float
    iqr_ms: float
    ratio_to_ours: float
    gb_per_s: float | None
    ratio_to_limit: float | None
    extra_mb: float | None
    runs: int


def run_case(chosen: Case, runs: int, threads: int) -> list[Row]:
    """Check the case, then time its contenders turn by turn."""
    torch.set_num_threads(threads)
    prepared = chosen.prepare()
    prepared.check()
    names = list(prepared.contenders)
    memory = {}
    for name in names:  # warms up too
        _set_allocator(kept=name == OURS)
        memory[name] = extra_memory(prepared.contenders[name], prepared.output_bytes)
    times: dict[str, list[float]] = {name: [] for name in names}
    quick = {name: _milliseconds(prepared.contenders[name]) for name in names}
    for _ in range(runs):
        for name in names:
            _set_allocator(kept=name == OURS)
            for _ in range(1 + (quick[name] < QUICK_MS)):
                started = time.perf_counter()
                prepared.contenders[name]()
            times[name].append(1e3 * (time.perf_counter() - started))
    rows = []
    for name in names:
        own = torch.tensor(times[name], dtype=torch.float64)
        median, q1, q3 = (float(torch.quantile(own, p)) for p in (0.5, 0.25, 0.75))
        limit = None if prepared.limit is None else median_ratio(times[name], times[prepared.limit])
        rows.append(
            Row(
                case=chosen.name,
                contender=name,
                threads=threads,
                median_ms=median,
                iqr_ms=q3 - q1,
                ratio_to_ours=median_ratio(times[name], times[OURS]),
                gb_per_s=prepared.n_bytes / median / 1e6 if prepared.n_bytes else None,
                ratio_to_limit=limit,
                extra_mb=memory[name],
                runs=runs,
            )
        )
    return rows


def _set_allocator(kept: bool) -> None:
    """Set glibc's allocator: as this package does if `kept`, else as it is without the package.

    The package keeps freed memory (`allocator.keep_freed_memory`). Without it, the thresholds of
    the allocator grow by themselves until blocks above 32 MB are mapped anew each time, and free
    memory above 64 MB is returned to the system.
    """
    if not hasattr(_libc, "mallopt"):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    _libc.mallopt(mmap_threshold, 32 << 20)
    _libc.mallopt(trim_threshold, 2**31 - 1 if kept else 64 << 20)
    _libc.mallopt(mmap_max, 0 if kept else 65536)


def _milliseconds(function: Function) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def median_ratio(a: list[float], b: list[float]) -> float:
    """Return the median over the turns of the ratio of two times."""
    return float(torch.tensor([x / y for x, y in zip(a, b)], dtype=torch.float64).median())


def extra_memory(function: Function, output_bytes: int) -> float | None:
    """Return the peak of resident memory in a first call, in MB; None on systems other than Linux.

    Memory that was in use before, and the output of the call, are subtracted.
    """
    allocator.release()
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)  # or memory freed before would hide what this call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        function()
        return max(0.0, (_status("VmHWM") - before) / 1024 - output_bytes / 2**20)
    except OSError:
        function()
        return None


def _status(key: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key + ":")
    )
    return int(line.split()[1])
