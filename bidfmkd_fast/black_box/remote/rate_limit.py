"""Limit images and requests per second over all threads: a token bucket."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from bidfmkd_fast.black_box.remote.retries import DAY
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.interrupt import pause


class RateLimit:
    """Lets requests through at a given pace.

    Images and requests that were not used in the last second may be sent all at once.

    Args:
        images_per_second, requests_per_second: the pace; None for no limit.
        clock: returns the time in seconds.
        sleep: waits for a number of seconds.

    Raises:
        InputError: a pace is less than one a day, or not finite.
    """

    def __init__(
        self,
        images_per_second: float | None = None,
        requests_per_second: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = pause,
    ) -> None:
        for name, rate in (
            ("images_per_second", images_per_second),
            ("requests_per_second", requests_per_second),
        ):
            if rate is not None and not 1 / DAY <= rate < math.inf:
                raise InputError(
                    f"RateLimit: {name} must be above 0 and finite, at least one a day, or None "
                    f"for no limit; got {rate!r}"
                )
        self._rates = (images_per_second, requests_per_second)
        self._tokens = [max(1.0, rate or 1.0) for rate in self._rates]
        self._lock, self._clock, self._sleep, self._filled = threading.Lock(), clock, sleep, clock()

    def wait(self, n_images: int) -> None:
        """Wait until a request with `n_images` images may be sent.

        A request with more images than a second allows is sent as soon as the requests before it
        are within the pace; those after it wait for longer.
        """
        with self._lock:
            now = self._clock()
            # The last request may have been promised a later time than now, for which its thread
            # is still waiting. This request comes after it.
            start = max(now, self._filled)
            owed = 0.0
            for i, rate in enumerate(self._rates):
                if rate is not None:
                    self._fill(i, rate, start - self._filled)
                    owed = max(owed, -self._tokens[i] / rate)
            for i, (rate, used) in enumerate(zip(self._rates, (n_images, 1))):
                if rate is not None:
                    self._fill(i, rate, owed)
                    self._tokens[i] -= used
            self._filled = goes = start + owed
        if goes > now:
            self._sleep(goes - now)

    def _fill(self, i: int, rate: float, seconds: float) -> None:
        self._tokens[i] = min(max(1.0, rate), self._tokens[i] + rate * seconds)
