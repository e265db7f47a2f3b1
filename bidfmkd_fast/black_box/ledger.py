"""Count what asking APIs has cost: queries, requests and money."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError, InputTypeError

_process_lock = threading.Lock()
_process_total: tuple[int, int, float] = (0, 0, 0.0)


def asked_by_this_process() -> tuple[int, int, float]:
    """Return the queries, requests and price of all that this process has sent, over all APIs."""
    return _process_total


def _add_to_process(queries: int, requests: int, cost: float) -> None:
    global _process_total
    with _process_lock:
        before = _process_total
        _process_total = before[0] + queries, before[1] + requests, before[2] + cost


class Ledger:
    """Counts what an API was asked and what it answered. Safe under threads.

    A request that is sent again after a failure counts again, because the service may bill both
    attempts. The ledger therefore keeps two numbers of each kind, what was sent and what was
    answered; what the service bills lies between them.

    Args:
        price_per_1000: price of 1000 queries.
    """

    def __init__(self, price_per_1000: float = 0.0) -> None:
        self._lock = threading.Lock()
        self._price = price_per_1000
        self._queries = self._requests = self._answered_queries = self._answered_requests = 0
        self._files: list[tuple[LedgerFile, int]] = []

    @property
    def queries(self) -> int:
        """Return the images sent for scoring; images sent again or answered badly count too."""
        return self._queries

    @property
    def requests(self) -> int:
        """Return the requests sent, every attempt counted."""
        return self._requests

    @property
    def answered_queries(self) -> int:
        """Return the images whose scores came back."""
        return self._answered_queries

    @property
    def answered_requests(self) -> int:
        """Return the requests that were answered with scores."""
        return self._answered_requests

    @property
    def cost(self) -> float:
        """Return the price of all queries sent: the most that the service can bill."""
        return self._queries * self._price / 1000

    def record(self, queries: int, requests: int = 1) -> None:
        """Count what is about to be sent."""
        self._add("record", queries, requests, answered=False)

    def record_answered(self, queries: int, requests: int = 1) -> None:
        """Count what was answered with scores."""
        self._add("record_answered", queries, requests, answered=True)

    @contextmanager
    def written_to(self, file: LedgerFile, number: int, name: str) -> Iterator[None]:
        """Write every count of the block to row `number` of `file` too, before the request goes."""
        file.begin(number, name)
        with self._lock:
            self._files.append((file, number))
        try:
            yield
        finally:
            with self._lock:
                self._files.remove((file, number))

    def _add(self, operation: str, queries: int, requests: int, answered: bool) -> None:
        check_count(f"Ledger.{operation}", "queries", queries)
        check_count(f"Ledger.{operation}", "requests", requests)
        cost = queries * self._price / 1000
        with self._lock:
            if answered:
                self._answered_queries += queries
                self._answered_requests += requests
            else:
                self._queries += queries
                self._requests += requests
                _add_to_process(queries, requests, cost)
            for file, number in self._files:
                if answered:
                    file.add(number, answered_queries=queries, answered_requests=requests)
                else:
                    file.add(number, queries=queries, requests=requests, cost=cost)

    def __repr__(self) -> str:
        with self._lock:
            return f"Ledger(queries={self._queries:,}, requests={self._requests:,})"


def check_count(operation: str, name: str, value: object) -> None:
    """Raise InputError unless `value` is a number of queries or requests, an int of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(
            f"{operation}: {name} must be an int; got {type(value).__name__} {value!r}"
        )
    if value < 0:
        raise InputError(f"{operation}: {name} must not be negative; got {value}")


def check_cost(operation: str, name: str, value: object) -> None:
    """Raise InputError unless `value` is an amount of money, finite and at least 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputTypeError(
            f"{operation}: {name} must be a number; got {type(value).__name__} {value!r}"
        )
    if not 0 <= value < math.inf:
        raise InputError(f"{operation}: {name} must be finite and not negative; got {value}")
