"""Recover services in threads, several at once, and go on without those that take too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bidfmkd_fast.runtime.interrupt import Stop
from bidfmkd_fast.runtime.ranks import ALONE, Ranks
from bidfmkd_fast.training.outcome import Outcome

# A service counts as a straggler when it takes longer than max(_LEAST_SECONDS, _PATIENCE times the
# slowest service so far). The round continues without it, and `late` picks it up.
_PATIENCE, _LEAST_SECONDS = 3.0, 60.0
_SLICE = 1.0  # seconds between two looks at what services of other ranks took

MOST_THREADS = 256  # services that are asked at once; further ones wait for a thread

TimedOutcome = tuple[Outcome, float]  # the outcome, and the seconds that its recovery took


class Services:
    """Threads that recover one service each. Use it in a `with` block, which stops all of them.

    Args:
        n_services: how many services the pool has, so that each can have a thread, of
            `MOST_THREADS` at most.
        stop: set at the end of the block; the waits inside the threads end with it.
        ranks: the processes that share the services out, and their times.
    """

    def __init__(self, n_services: int, stop: Stop, ranks: Ranks = ALONE) -> None:
        self._stop, self._ranks = stop, ranks
        n_threads = min(max(1, n_services), MOST_THREADS)
        self._threads = ThreadPoolExecutor(n_threads, "recovery", initializer=stop.adopt)
        self._under_way: list[Future[TimedOutcome]] = []  # those of this round
        self._late: list[Future[TimedOutcome]] = []  # those of earlier rounds
        self._slowest: float | None = None  # seconds; stragglers are not counted

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def start(self, jobs: Iterable[Callable[[], Outcome]]) -> None:
        """Start the recoveries of a round, each in a thread."""
        self._under_way = [self._threads.submit(_timed, job) for job in jobs]

    def start_late(self, jobs: Iterable[Callable[[], Outcome]]) -> None:
        """Start recoveries again that were under way as stragglers when the run was cut off."""
        self._late += [self._threads.submit(_timed, job) for job in jobs]

    def gather(self) -> list[Outcome]:
        """Wait for the recoveries of the round; return what is finished, stragglers left out.

        Stragglers of earlier rounds that have finished since are among the outcomes.
        """
        started, waiting = time.monotonic(), set(self._under_way)
        while waiting:
            left = self._left(started)
            if left is not None and left <= 0:
                break
            finished, waiting = wait(waiting, left, FIRST_COMPLETED)
            for outcome, seconds in (future.result() for future in finished):
                if outcome.asked and outcome.error is None:
                    self._slowest = max(self._slowest or 0.0, seconds)
                    self._ranks.keep(f"slowest service of {self._ranks.rank}", self._slowest)
        futures = [*self._late, *self._under_way]
        done = [future for future in futures if future.done()]
        self._under_way, self._late = [], [future for future in futures if future not in done]
        return [future.result()[0] for future in done]

    def _left(self, started: float) -> float | None:
        """Return how long to wait from now; no limit without a service that has finished.

        Among several ranks it is a second at most, since others may finish one.
        """
        ranks = self._ranks
        times = [self._slowest]
        if ranks.size > 1:
            ranks.check()
            times += [ranks.kept(f"slowest service of {rank}") for rank in range(ranks.size)]
        known = [seconds for seconds in times if seconds is not None]
        left = _SLICE if ranks.size > 1 else None
        if known:
            patience = max(_LEAST_SECONDS, _PATIENCE * max(known))
            rest = max(0.0, started + patience - time.monotonic())
            left = rest if left is None else min(left, rest)
        return left

    def late(self) -> list[Outcome]:
        """Wait for all stragglers, however long they take."""
        late, self._late = self._late, []
        return [future.result()[0] for future in late]


def _timed(job: Callable[[], Outcome]) -> TimedOutcome:
    """Run a job and measure its wall time."""
    started = time.monotonic()
    return job(), time.monotonic() - started
