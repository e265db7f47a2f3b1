"""Recover sets of several APIs side by side: one small API does not fill a large GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.recovery.objective import Student
from bidfmkd_fast.recovery.on_device import DeviceRecovery
from bidfmkd_fast.recovery.recover import Start, prepare
from bidfmkd_fast.recovery.recovered import Recovered

AT_ONCE = 8  # recoveries on a device; each takes two of torch's 32 streams


def recover_side_by_side(
    apis: Sequence[BlackBox],
    n_per_class: int,
    students: Sequence[Student | None],
    config: RecoveryConfig,
    *,
    seeds: Sequence[int],
    device: torch.device | str | None = None,
    journals: Sequence[Journal | None] | None = None,
) -> Iterator[tuple[int, Recovered | Exception]]:
    """Run `recover` for several APIs, side by side where the recoveries stay on one CUDA device.

    Yields the number of an API and its set as soon as the set is there; the set is the one that
    `recover` returns for this API alone, up to rounding. An API whose recovery fails yields the
    error in place of a set and does not disturb the others.
    """
    together: dict[int, DeviceRecovery] = {}
    kept = [None for _ in apis] if journals is None else journals
    for i, (api, student, seed, journal) in enumerate(
        zip(apis, students, seeds, kept, strict=True)
    ):
        try:
            start = Start(seed=seed, device=device)
            prepared = prepare(api, n_per_class, student, config, start, journal=journal)
            if isinstance(prepared, DeviceRecovery):
                together[i] = prepared
                continue
            result: Recovered | Exception = prepared.run()
        except Exception as error:
            result = error
        yield i, result
    yield from zip(together, run_side_by_side(list(together.values())))


def run_side_by_side(recoveries: Sequence[DeviceRecovery]) -> list[Recovered | Exception]:
    """Run recoveries of one device, at most `AT_ONCE` at a time, each on a CUDA stream of its own.

    A recovery that fails has its error in place of the set.
    """
    results = []
    for first in range(0, len(recoveries), AT_ONCE):
        results += _run_at_once(recoveries[first : first + AT_ONCE])
    return results


def _run_at_once(recoveries: Sequence[DeviceRecovery]) -> list[Recovered | Exception]:
    """Run at most `AT_ONCE` recoveries, which take turns step by step."""
    device = recoveries[0].device
    streams = [torch.cuda.Stream(device) for _ in recoveries] if device.type == "cuda" else []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    errors: dict[int, Exception] = {}
    for step in range(max(recovery.config.steps for recovery in recoveries)):
        for i, recovery in enumerate(recoveries):
            if i in errors or recovery.done < step or step >= recovery.config.steps:
                continue  # the recovery failed, ran out of budget, or is done
            try:
                with torch.cuda.stream(streams[i]) if streams else nullcontext():
                    recovery.step()
            except BudgetExhausted as error:
                if step == 0:
                    errors[i] = error
            except Exception as error:
                errors[i] = error
    for stream in streams:
        torch.cuda.current_stream(device).wait_stream(stream)
    return [
        errors[i] if i in errors else _result_or_error(recovery)
        for i, recovery in enumerate(recoveries)
    ]


def _result_or_error(recovery: DeviceRecovery) -> Recovered | Exception:
    """Return the set of a recovery, or the error that `result` raises."""
    try:
        return recovery.result()
    except Exception as error:
        return error
