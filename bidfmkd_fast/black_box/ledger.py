"""What asking APIs has cost (`Ledger`) and what it may cost (`Budget`): queries, requests and money."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import BudgetExhausted, InputError, InputTypeError

_SLACK = 1e-9  # relative: costs are sums of floats

_process_lock = threading.Lock()
_process_total: tuple[int, int, float] = (0, 0, 0.0)


def asked_by_this_process() -> tuple[int, int, float]:
    """Return the queries, the requests and the price of all that this process has sent, over every API it had."""
    return _process_total


def _add_to_process(queries: int, requests: int, cost: float) -> None:
    global _process_total
    with _process_lock:
        before = _process_total
        _process_total = before[0] + queries, before[1] + requests, before[2] + cost


class Ledger:
    """Counts what one API was asked and what it answered. Safe under threads.

    A request that is sent again after a failure counts again: the service may bill it twice. So there are two numbers
    of each kind, what was sent and what was answered; what the service bills lies between them.

    Args:
        price_per_1000: of 1000 queries.
    """

    def __init__(self, price_per_1000: float = 0.0) -> None:
        self._lock = threading.Lock()
        self._price = price_per_1000
        self._queries = self._requests = self._answered_queries = self._answered_requests = 0
        self._files: list[tuple[LedgerFile, int]] = []

    @property
    def queries(self) -> int:
        """Images sent for scoring, those included that were sent again or whose answer was bad."""
        return self._queries

    @property
    def requests(self) -> int:
        """Requests sent, every attempt counted."""
        return self._requests

    @property
    def answered_queries(self) -> int:
        """Images whose scores came back."""
        return self._answered_queries

    @property
    def answered_requests(self) -> int:
        """Requests that were answered with scores."""
        return self._answered_requests

    @property
    def cost(self) -> float:
        """Price of all queries sent: the most that the service can bill."""
        return self._queries * self._price / 1000

    def record(self, queries: int, requests: int = 1) -> None:
        """Count what is about to be sent."""
        self._add("record", queries, requests, answered=False)

    def record_answered(self, queries: int, requests: int = 1) -> None:
        """Count what was answered with scores."""
        self._add("record_answered", queries, requests, answered=True)

    @contextmanager
    def written_to(self, file: LedgerFile, number: int, name: str) -> Iterator[None]:
        """Inside the block every count goes to row `number` of `file` as well, before anything is sent."""
        file.begin(number, name)
        with self._lock:
            self._files.append((file, number))
        try:
            yield
        finally:
            with self._lock:
                self._files.remove((file, number))

    def _add(self, operation: str, queries: int, requests: int, answered: bool) -> None:
        _check_count(f"Ledger.{operation}", "queries", queries)
        _check_count(f"Ledger.{operation}", "requests", requests)
        with self._lock:
            if answered:
                self._answered_queries += queries
                self._answered_requests += requests
            else:
                self._queries += queries
                self._requests += requests
                _add_to_process(queries, requests, queries * self._price / 1000)
            for file, number in self._files:
                if answered:
                    file.add(number, answered_queries=queries, answered_requests=requests)
                else:
                    file.add(number, queries=queries, requests=requests, cost=queries * self._price / 1000)

    def __repr__(self) -> str:
        with self._lock:
            return f"Ledger(queries={self._queries:,}, requests={self._requests:,})"


class Budget:
    """A cap on queries, requests and money that holds for the sum over every API it is given to. Safe under threads.

    Args:
        max_queries: most images that may be scored; None for no cap.
        max_requests: most requests that may be sent; None for no cap.
        max_cost: most that may be spent, in the currency of the APIs' `price_per_1000`; None for no cap.

    Raises:
        InputError: a cap is negative or no number (InputTypeError: of the wrong type).
    """

    def __init__(
        self, max_queries: int | None = None, max_requests: int | None = None, max_cost: float | None = None
    ) -> None:
        for name, cap in (("max_queries", max_queries), ("max_requests", max_requests)):
            if cap is not None:
                _check_count("Budget", name, cap)
        if max_cost is not None:
            _check_cost("Budget", "max_cost", max_cost)
        self._lock = threading.Lock()
        self._caps = (max_queries, max_requests, max_cost)
        self._spent: tuple[int, int, float] = (0, 0, 0.0)
        self._counted: set[tuple[str, int]] = set()  # sessions of ledger files, and the APIs' numbers there

    @property
    def max_queries(self) -> int | None:
        """The cap on queries; None for none."""
        return self._caps[0]

    @property
    def max_requests(self) -> int | None:
        """The cap on requests; None for none."""
        return self._caps[1]

    @property
    def max_cost(self) -> float | None:
        """The cap on money; None for none."""
        return self._caps[2]

    @property
    def queries(self) -> int:
        """Queries spent so far, over all APIs that share this budget."""
        return self._spent[0]

    @property
    def requests(self) -> int:
        """Requests spent so far, over all APIs that share this budget."""
        return self._spent[1]

    @property
    def cost(self) -> float:
        """Money spent so far, over all APIs that share this budget."""
        return self._spent[2]

    @property
    def remaining_queries(self) -> int | None:
        """Queries left; None when they are not capped."""
        return None if self.max_queries is None else self.max_queries - self.queries

    @property
    def remaining_requests(self) -> int | None:
        """Requests left; None when they are not capped."""
        return None if self.max_requests is None else self.max_requests - self.requests

    def affords(self, queries: int, requests: int = 1, cost: float = 0.0) -> bool:
        """Whether `reserve` of the same would go through now. Spends nothing."""
        _check_amounts("Budget.affords", queries, requests, cost)
        with self._lock:
            return self._shortfall(queries, requests, cost) is None

    def reserve(self, queries: int, requests: int = 1, cost: float = 0.0) -> None:
        """Spend all of it, or nothing.

        Raises:
            BudgetExhausted: it would overrun a cap; nothing was spent.
            InputError: a number is negative (InputTypeError: of the wrong type).
        """
        _check_amounts("Budget.reserve", queries, requests, cost)
        with self._lock:
            shortfall = self._shortfall(queries, requests, cost)
            if shortfall is not None:
                raise BudgetExhausted(shortfall)
            self._spend(queries, requests, cost)

    def restore(self, queries: int, requests: int, cost: float = 0.0) -> None:
        """Count what an earlier, killed run has spent, even beyond a cap: it is gone."""
        _check_amounts("Budget.restore", queries, requests, cost)
        with self._lock:
            self._spend(queries, requests, cost)

    def restore_from(self, file: LedgerFile, number: int) -> None:
        """Count what was spent on API `number` before, as `file` tells, but for what this very budget has paid.

        It pays for what is counted in `file` from now on.
        """
        earlier = file.sessions(number)
        with self._lock:
            for session, row in earlier.items():
                if (session, number) not in self._counted and session != file.session:
                    self._spend(row.queries, row.requests, row.cost)
            self._counted |= {(session, number) for session in (*earlier, file.session)}

    def release(self, queries: int, requests: int, cost: float = 0.0) -> None:
        """Give back what was reserved and never sent."""
        _check_amounts("Budget.release", queries, requests, cost)
        with self._lock:
            self._spend(-queries, -requests, -cost)

    def _spend(self, queries: int, requests: int, cost: float) -> None:
        self._spent = (self._spent[0] + queries, self._spent[1] + requests, self._spent[2] + cost)

    def _shortfall(self, queries: int, requests: int, cost: float) -> str | None:
        wanted_of = {"queries": queries, "requests": requests, "cost": cost}
        for (unit, wanted), spent, cap in zip(wanted_of.items(), self._spent, self._caps):
            if cap is not None and wanted and spent + wanted > cap * (1 + _SLACK if unit == "cost" else 1):
                form = ",.4g" if unit == "cost" else ","
                return (
                    f"budget: {wanted:{form}} more {unit} wanted, {cap - spent:{form}} of {cap:{form}} left; nothing "
                    f"was sent (raise Budget(max_{unit}=...) or ask for less)"
                )
        return None

    def __repr__(self) -> str:
        with self._lock:
            spent, caps = self._spent, ["no cap" if cap is None else f"{cap:,}" for cap in self._caps]
        money = f", cost={spent[2]:,.4g} of {caps[2]}" if self._caps[2] is not None else ""
        return f"Budget(queries={spent[0]:,} of {caps[0]}, requests={spent[1]:,} of {caps[1]}{money})"


def _check_amounts(operation: str, queries: object, requests: object, cost: object) -> None:
    _check_count(operation, "queries", queries)
    _check_count(operation, "requests", requests)
    _check_cost(operation, "cost", cost)


def _check_count(operation: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(f"{operation}: {name} must be an int; got {type(value).__name__} {value!r}")
    if value < 0:
        raise InputError(f"{operation}: {name} must not be negative; got {value}")


def _check_cost(operation: str, name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputTypeError(f"{operation}: {name} must be a number; got {type(value).__name__} {value!r}")
    if not 0 <= value < math.inf:
        raise InputError(f"{operation}: {name} must be finite and not negative; got {value}")
