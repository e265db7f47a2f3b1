"""Split calls to a service into requests, with several in flight, each attempt paid and counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.remote.connection_options import checked_in_flight
from bidfmkd_fast.black_box.remote.http_client import MOST_BYTES
from bidfmkd_fast.black_box.remote.rate_limit import RateLimit
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import APIUnavailable
from bidfmkd_fast.runtime.interrupt import Interrupted, Stop, check, current

Attempt = Callable[[], None]

# Images per request if no limit is known: enough that scoring takes longer than sending.
_BATCH = 256
_BYTES_PER_SCORE = 256  # most bytes that an answer may take for a score and the name of its class


class BatchTooLarge(APIUnavailable):
    """The service refused a request and may take a smaller one."""


class ServiceBlackBox(BlackBox):
    """The base of all remote APIs. Subclasses define `_request`, one request with its repetitions.

    Args:
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap. Every repeated attempt is paid again.
        in_flight: most requests under way at once, from 1 to 1024.
        images_per_second, requests_per_second: most per second; None for no limit.

    Raises:
        InputError: a number is out of its range.
    """

    is_service = True

    def __init__(
        self,
        spec: APISpec,
        *,
        budget: Budget | None = None,
        in_flight: int = 4,
        images_per_second: float | None = None,
        requests_per_second: float | None = None,
    ) -> None:
        super().__init__(spec, budget=budget)
        self._in_flight = checked_in_flight(self.name, in_flight)
        self._max_batch = spec.max_batch
        self._rate = RateLimit(images_per_second, requests_per_second)

    @abstractmethod
    def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
        """Send a batch of CPU images and return its scores.

        `attempt()` must be called right before each attempt; it pays for the attempt and counts it.

        Raises:
            BatchTooLarge: the service may accept half as many images.
        """

    def score(self, images: Tensor) -> Tensor:
        """Return the scores of one batch, sent as one request that is paid for."""
        return self._send(images, paid=True)

    @property
    def in_flight(self) -> int:
        """Return the most requests under way at once."""
        return self._in_flight

    @property
    def known_batch(self) -> int:
        """Return the images per request by what is known so far; the service is not contacted."""
        return _BATCH if self._max_batch is None else self._max_batch

    def _batch(self) -> int:
        """Return the images per request. A subclass may ask the service for its limit first."""
        return self.known_batch

    def requests_for(self, n_images: int) -> int:
        """Return how many requests a call sends; this may ask the service for its batch limit."""
        return -(-n_images // self._batch())

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        # Make as many batches as requests are paid for, of nearly equal size.
        batches = images.cpu().tensor_split(n_requests)
        stop = Stop(current())
        requests: list[Future[Tensor]] = []
        with ThreadPoolExecutor(min(self._in_flight, len(batches)), initializer=stop.adopt) as pool:
            try:
                for batch in batches:
                    requests.append(pool.submit(self._send, batch, True))
                wait(requests, return_when=FIRST_EXCEPTION)
            except BaseException:
                # Ctrl-C arrives here. Leaving the block waits for the requests, so they must end.
                stop.set()
                raise
            finally:
                unsent = [batch for batch, request in zip(batches, requests) if request.cancel()]
                unsent += batches[len(requests) :]
                self._release(sum(map(len, unsent)), len(unsent))
        errors = [
            error
            for request in requests
            if not request.cancelled() and (error := request.exception())
        ]
        if errors:
            raise errors[0]
        return torch.cat([request.result() for request in requests])

    def _most_bytes(self, n_images: int) -> int:
        """Return the most bytes of an answer: enough for names and digits of all scores."""
        return MOST_BYTES + _BYTES_PER_SCORE * n_images * self._spec.n_classes

    def _release(self, n_images: int, n_requests: int) -> None:
        """Give back to the budget what was reserved and not sent."""
        if self._budget is not None:
            self._budget.release(n_images, n_requests, self.price_of(n_images))

    def _send(self, images: Tensor, paid: bool) -> Tensor:
        """Send one request. `paid`: whether the budget has reserved its first attempt already."""
        n_images = len(images)

        def attempt() -> None:
            nonlocal paid
            if not paid:
                self.reserve(n_images, 1)
            paid = False
            try:
                check()
                self._rate.wait(n_images)
            except Interrupted:
                self._release(n_images, 1)
                raise
            self._ledger.record(n_images, 1)

        try:
            answer = self._request(images, attempt)
        except BatchTooLarge:
            if n_images == 1:
                raise
            half = -(-n_images // 2)
            self._max_batch = min(self._batch(), half)
            return torch.cat([self._send(part, paid=False) for part in images.split(half)])
        answer = self._checked(answer, n_images)
        self._ledger.record_answered(n_images, 1)
        return answer
