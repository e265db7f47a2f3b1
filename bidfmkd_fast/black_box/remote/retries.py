"""Repeat requests, over HTTP and gRPC alike: urllib3 counts attempts and computes the pauses."""

from __future__ import annotations

import email.utils
import math
import time
from typing import Any

from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.errors import APIUnavailable, InputError
from bidfmkd_fast.runtime.interrupt import pause

DAY = 86_400  # seconds; sockets and sleeps refuse some of the larger numbers that YAML can hold
# With the default backoff, 100 repetitions wait for about an hour. A service that fails for longer
# is better asked again by a later run; without a bound the run would hang and pay without end.
MOST_RETRIES = 100


class PatientRetry(Retry):
    """The `Retry` of urllib3 with pauses that can be interrupted, and a longest pause."""

    longest_wait = 60.0

    def new(self, **kw: Any) -> PatientRetry:
        following = super().new(**kw)
        following.longest_wait = self.longest_wait
        return following

    def after(self, error: HTTPError) -> PatientRetry:
        """Count a failed attempt; raise urllib3's MaxRetryError if it was the last."""
        return self.increment("POST", "/", error=error)

    def wait(self, retry_after: str | None = None) -> None:
        """Pause before the next attempt, for the time of `Retry-After` or else the backoff time.

        Raises:
            APIUnavailable: the service asks for a longer wait than `longest_wait`.
        """
        asked = None if retry_after is None else seconds_asked(retry_after)
        if asked is not None and asked > self.longest_wait:
            raise APIUnavailable(
                f"it asks to wait {asked:.0f} s (Retry-After), longer than {self.longest_wait:g} s"
            )
        pause(asked or self.get_backoff_time())


def seconds_asked(retry_after: str) -> float | None:
    """Return the seconds that a `Retry-After` header asks for; None if it is unreadable.

    The header holds a number of seconds or a date.
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def retry_policy(name: str, retries: int, backoff: float, longest_wait: float) -> PatientRetry:
    """Return the policy for these options, which `ConnectionOptions` describes.

    Raises:
        InputError: a number is out of its range.
    """
    for what, value in (("backoff", backoff), ("longest_wait", longest_wait)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= DAY:
            raise InputError(
                f"{name}: {what} must be a number of seconds from 0 to {DAY:,}; got {value!r}"
            )
    policy = PatientRetry(
        total=check_integer(name, "retries", retries, 0, MOST_RETRIES),
        # Repeat POST requests too: asking twice for scores changes only the bill, which is counted.
        allowed_methods=None,
        backoff_factor=backoff,
        backoff_max=30,
        backoff_jitter=backoff,
    )
    policy.longest_wait = longest_wait
    return policy
