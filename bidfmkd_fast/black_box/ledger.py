"""What asking APIs has cost (`Ledger`) and what it may cost (`Budget`), in queries and in requests."""

from __future__ import annotations

import threading

from bidfmkd_fast.errors import BudgetExhausted, InputError, InputTypeError


class Ledger:
    """Counts the queries (images scored) and requests (calls sent) of one API. Safe under threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queries = 0
        self._requests = 0

    @property
    def queries(self) -> int:
        """Images sent for scoring, those included whose answer was bad."""
        return self._queries

    @property
    def requests(self) -> int:
        """Requests sent."""
        return self._requests

    def record(self, queries: int, requests: int = 1) -> None:
        """Add to both counts (also the way to restore them from a checkpoint)."""
        _check_count("Ledger.record", "queries", queries)
        _check_count("Ledger.record", "requests", requests)
        with self._lock:
            self._queries += queries
            self._requests += requests

    def __repr__(self) -> str:
        with self._lock:
            return f"Ledger(queries={self._queries:,}, requests={self._requests:,})"


class Budget:
    """A cap on queries and requests that holds for the sum over every API it is given to. Safe under threads.

    Args:
        max_queries: most images that may be scored; None for no cap.
        max_requests: most requests that may be sent; None for no cap.

    Raises:
        InputError: a cap is negative (InputTypeError: not an int).
    """

    def __init__(self, max_queries: int | None = None, max_requests: int | None = None) -> None:
        for name, cap in (("max_queries", max_queries), ("max_requests", max_requests)):
            if cap is not None:
                _check_count("Budget", name, cap)
        self._lock = threading.Lock()
        self._caps = (max_queries, max_requests)
        self._spent = (0, 0)

    @property
    def max_queries(self) -> int | None:
        """The cap on queries; None for none."""
        return self._caps[0]

    @property
    def max_requests(self) -> int | None:
        """The cap on requests; None for none."""
        return self._caps[1]

    @property
    def queries(self) -> int:
        """Queries spent so far, over all APIs that share this budget."""
        return self._spent[0]

    @property
    def requests(self) -> int:
        """Requests spent so far, over all APIs that share this budget."""
        return self._spent[1]

    @property
    def remaining_queries(self) -> int | None:
        """Queries left; None when they are not capped."""
        return None if self.max_queries is None else self.max_queries - self.queries

    @property
    def remaining_requests(self) -> int | None:
        """Requests left; None when they are not capped."""
        return None if self.max_requests is None else self.max_requests - self.requests

    def affords(self, queries: int, requests: int = 1) -> bool:
        """Whether `reserve(queries, requests)` would go through now. Spends nothing."""
        _check_count("Budget.affords", "queries", queries)
        _check_count("Budget.affords", "requests", requests)
        with self._lock:
            return self._shortfall(queries, requests) is None

    def reserve(self, queries: int, requests: int = 1) -> None:
        """Spend both counts, or neither (also the way to restore what was spent before a checkpoint).

        Raises:
            BudgetExhausted: they would overrun a cap; nothing was spent.
            InputError: a count is negative (InputTypeError: not an int).
        """
        _check_count("Budget.reserve", "queries", queries)
        _check_count("Budget.reserve", "requests", requests)
        with self._lock:
            shortfall = self._shortfall(queries, requests)
            if shortfall is not None:
                raise BudgetExhausted(shortfall)
            self._spent = (self._spent[0] + queries, self._spent[1] + requests)

    def _shortfall(self, queries: int, requests: int) -> str | None:
        for unit, wanted, spent, cap in zip(("queries", "requests"), (queries, requests), self._spent, self._caps):
            if cap is not None and wanted and spent + wanted > cap:
                return (
                    f"budget: {wanted:,} more {unit} wanted, {cap - spent:,} of {cap:,} left; nothing was sent "
                    f"(raise Budget(max_{unit}=...) or ask for less)"
                )
        return None

    def __repr__(self) -> str:
        with self._lock:
            spent, caps = self._spent, ["no cap" if cap is None else f"{cap:,}" for cap in self._caps]
        return f"Budget(queries={spent[0]:,} of {caps[0]}, requests={spent[1]:,} of {caps[1]})"


def _check_count(operation: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(f"{operation}: {name} must be an int; got {type(value).__name__} {value!r}")
    if value < 0:
        raise InputError(f"{operation}: {name} must not be negative; got {value}")
