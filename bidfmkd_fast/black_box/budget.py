"""Cap what asking APIs may cost: queries, requests and money."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from bidfmkd_fast.black_box.ledger import check_cost, check_count
from bidfmkd_fast.errors import BudgetExhausted

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.ledger_file import LedgerFile
    from bidfmkd_fast.runtime.ranks import Ranks

_SLACK = 1e-9  # relative tolerance for money, since costs are sums of floats


class Budget:
    """A cap on the sum of queries, requests and money over all APIs that share it.

    Safe under threads.

    >>> budget = Budget(max_queries=10)
    >>> budget.reserve(8, 1, 0.0)  # a box does this before each call
    >>> budget.reserve(3, 1, 0.0)
    Traceback (most recent call last):
    ...
    bidfmkd_fast.errors.BudgetExhausted: budget: 3 more queries wanted, 2 of 10 left; ...

    Args:
        max_queries: most images that may be scored; None for no cap.
        max_requests: most requests that may be sent; None for no cap.
        max_cost: most that may be spent, in the currency of the APIs' `price_per_1000`; None for no
            cap.

    Raises:
        InputError: a cap is negative or no number (InputTypeError: of the wrong type).
    """

    def __init__(
        self,
        max_queries: int | None = None,
        max_requests: int | None = None,
        max_cost: float | None = None,
    ) -> None:
        for name, cap in (("max_queries", max_queries), ("max_requests", max_requests)):
            if cap is not None:
                check_count("Budget", name, cap)
        if max_cost is not None:
            check_cost("Budget", "max_cost", max_cost)
        self._lock: AbstractContextManager[object] = threading.Lock()
        self._caps = (max_queries, max_requests, max_cost)
        self._spent: tuple[int, int, float] = (0, 0, 0.0)
        # Sessions of ledger files that this budget has paid for, with the number of the API there.
        self._counted: set[tuple[str, int]] = set()

    @property
    def max_queries(self) -> int | None:
        """Return the cap on queries; None for none."""
        return self._caps[0]

    @property
    def max_requests(self) -> int | None:
        """Return the cap on requests; None for none."""
        return self._caps[1]

    @property
    def max_cost(self) -> float | None:
        """Return the cap on money; None for none."""
        return self._caps[2]

    @property
    def queries(self) -> int:
        """Return the queries spent so far, over all APIs that share this budget."""
        return self._spent[0]

    @property
    def requests(self) -> int:
        """Return the requests spent so far, over all APIs that share this budget."""
        return self._spent[1]

    @property
    def cost(self) -> float:
        """Return the money spent so far, over all APIs that share this budget."""
        return self._spent[2]

    @property
    def remaining_queries(self) -> int | None:
        """Return the queries left; None when they are not capped."""
        return None if self.max_queries is None else self.max_queries - self.queries

    @property
    def remaining_requests(self) -> int | None:
        """Return the requests left; None when they are not capped."""
        return None if self.max_requests is None else self.max_requests - self.requests

    def affords(self, queries: int, requests: int = 1, cost: float = 0.0) -> bool:
        """Return True if `reserve` of the same amounts would go through now. Spends nothing."""
        _check_amounts("Budget.affords", queries, requests, cost)
        with self._lock:
            return self._shortfall(queries, requests, cost) is None

    def reserve(self, queries: int, requests: int = 1, cost: float = 0.0) -> None:
        """Spend all of these amounts, or nothing.

        Raises:
            BudgetExhausted: they would overrun a cap; nothing was spent.
            InputError: a number is negative (InputTypeError: of the wrong type).
        """
        _check_amounts("Budget.reserve", queries, requests, cost)
        with self._lock:
            shortfall = self._shortfall(queries, requests, cost)
            if shortfall is not None:
                raise BudgetExhausted(shortfall)
            self._spend(queries, requests, cost)

    def restore(self, queries: int, requests: int, cost: float = 0.0) -> None:
        """Count what an earlier run has spent, even if that exceeds a cap."""
        _check_amounts("Budget.restore", queries, requests, cost)
        with self._lock:
            self._spend(queries, requests, cost)

    def restore_from(self, file: LedgerFile, number: int, paid: Iterable[str] = ()) -> None:
        """Count what `file` shows for API `number`, except sessions that this budget has paid for.

        What is counted in `file` from now on is taken from this budget as well, and so are the
        counts of the sessions `paid`.
        """
        earlier = file.sessions(number)
        with self._lock:
            for session, row in earlier.items():
                if (session, number) not in self._counted and session != file.session:
                    self._spend(row.queries, row.requests, row.cost)
            self._counted |= {(session, number) for session in (*earlier, file.session, *paid)}

    @contextmanager
    def shared_by(self, ranks: Ranks, name: str) -> Iterator[None]:
        """Let the block spend from one budget in all `ranks`: what rank 0 has left of this one.

        Every rank has to enter and leave the block, and none spends from it before all have
        entered. `name` tells this budget from others of the job.
        """
        if ranks.first:
            ranks.keep(name, self._spent)
        before, self._lock = self._lock, _SharedLock(self, ranks, name)
        try:
            yield
            with self._lock:  # reads what all ranks have spent
                pass
        finally:
            self._lock = before

    def release(self, queries: int, requests: int, cost: float = 0.0) -> None:
        """Give back what was reserved and never sent."""
        _check_amounts("Budget.release", queries, requests, cost)
        with self._lock:
            self._spend(-queries, -requests, -cost)

    def _spend(self, queries: int, requests: int, cost: float) -> None:
        self._spent = (self._spent[0] + queries, self._spent[1] + requests, self._spent[2] + cost)

    def _shortfall(self, queries: int, requests: int, cost: float) -> str | None:
        """Return the message about the first cap that the amounts would overrun, or None."""
        wanted_of = {"queries": queries, "requests": requests, "cost": cost}
        for (unit, wanted), spent, cap in zip(wanted_of.items(), self._spent, self._caps):
            if (
                cap is not None
                and wanted
                and spent + wanted > cap * (1 + _SLACK if unit == "cost" else 1)
            ):
                form = ",.4g" if unit == "cost" else ","
                return (
                    f"budget: {wanted:{form}} more {unit} wanted, {cap - spent:{form}} of "
                    f"{cap:{form}} left; nothing was sent (raise Budget(max_{unit}=...) or ask for "
                    "less)"
                )
        return None

    def __repr__(self) -> str:
        with self._lock:
            spent = self._spent
        caps = ["no cap" if cap is None else f"{cap:,}" for cap in self._caps]
        money = f", cost={spent[2]:,.4g} of {caps[2]}" if self._caps[2] is not None else ""
        return (
            f"Budget(queries={spent[0]:,} of {caps[0]}, requests={spent[1]:,} of {caps[1]}{money})"
        )


class _SharedLock(AbstractContextManager[None]):
    """The lock of a budget that several ranks spend from; inside it `_spent` is what all spent."""

    def __init__(self, budget: Budget, ranks: Ranks, name: str) -> None:
        self._budget, self._ranks, self._name = budget, ranks, name
        self._threads = threading.Lock()
        self._held = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as held:
            held.enter_context(self._threads)
            held.enter_context(self._ranks.locked())
            queries, requests, cost = self._ranks.kept(self._name)
            self._budget._spent = (queries, requests, cost)
            self._held = held.pop_all()

    def __exit__(self, *exception: object) -> None:
        with self._held:
            self._ranks.keep(self._name, self._budget._spent)


def _check_amounts(operation: str, queries: object, requests: object, cost: object) -> None:
    check_count(operation, "queries", queries)
    check_count(operation, "requests", requests)
    check_cost(operation, "cost", cost)
