"""Recover services in threads, several at once, and go on without those that take too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bidfmkd_fast.runtime.interrupt import Stop
from bidfmkd_fast.training.outcome import Outcome

# A service counts as a straggler when it takes longer than max(_LEAST_SECONDS, _PATIENCE times the
# slowest service so far). The round continues without it, and `late` picks it up.
_PATIENCE, _LEAST_SECONDS = 3.0, 60.0

MOST_THREADS = 256  # services that are asked at once; further ones wait for a thread

TimedOutcome = tuple[Outcome, float]  # the outcome, and the seconds that its recovery took


class Services:
    """Threads that recover one service each. Use it in a `with` block, which stops all of them.

    Args:
        n_services: how many services the pool has, so that each can have a thread, of
            `MOST_THREADS` at most.
        stop: set at the end of the block; the waits inside the threads end with it.
    """

    def __init__(self, n_services: int, stop: Stop) -> None:
        self._stop = stop
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
            left = None
            if self._slowest is not None:
                patience = max(_LEAST_SECONDS, _PATIENCE * self._slowest)
                left = max(0.0, started + patience - time.monotonic())
            finished, waiting = wait(waiting, left, FIRST_COMPLETED)
            if not finished:
                break
            for outcome, seconds in (future.result() for future in finished):
                if outcome.asked and outcome.error is None:
                    self._slowest = max(self._slowest or 0.0, seconds)
        futures = [*self._late, *self._under_way]
        done = [future for future in futures if future.done()]
        self._under_way, self._late = [], [future for future in futures if future not in done]
        return [future.result()[0] for future in done]

    def late(self) -> list[Outcome]:
        """Wait for all stragglers, however long they take."""
        late, self._late = self._late, []
        return [future.result()[0] for future in late]


def _timed(job: Callable[[], Outcome]) -> TimedOutcome:
    """Run a job and measure its wall time."""
    started = time.monotonic()
    return job(), time.monotonic() - started
