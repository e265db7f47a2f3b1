"""Time functions on a CUDA device, by events, turn by turn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import OURS, Row, median_ratio

CALLS_IN_A_GRAPH = 10

Function = Callable[[], object]


def captured(function: Function, calls: int = CALLS_IN_A_GRAPH) -> Function:
    """Return a function that replays `calls` calls of `function` as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def rows_of(
    case: str,
    contenders: dict[str, tuple[Function, int]],
    runs: int,
    n_bytes: int = 0,
    limit: str | None = None,
) -> list[Row]:
    """Time the contenders turn by turn, and return a row for each.

    A contender is a function and how often one call of it does the work. Memory is measured only if
    it does the work once. `n_bytes` is what the work moves through memory; `limit` names the
    contender that is the physical limit.
    """
    memory: dict[str, float | None] = {}
    for name, (function, calls) in contenders.items():  # warms up too
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        output = torch.cuda.memory_allocated() - before
        memory[name] = (
            (torch.cuda.max_memory_allocated() - before - output) / 2**20 if calls == 1 else None
        )
        del result
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, (function, calls) in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    rows = []
    for name, own in times.items():
        median, q1, q3 = (float(torch.tensor(own).double().quantile(p)) for p in (0.5, 0.25, 0.75))
        rows.append(
            Row(
                case=case,
                contender=name,
                threads=0,
                median_ms=median,
                iqr_ms=q3 - q1,
                ratio_to_ours=median_ratio(own, times[OURS]),
                gb_per_s=n_bytes / median / 1e6 if n_bytes else None,
                ratio_to_limit=None if limit is None else median_ratio(own, times[limit]),
                extra_mb=memory[name],
                runs=runs,
            )
        )
    return rows
