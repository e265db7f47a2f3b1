"""Ledger and Budget: exact under threads, all or nothing, never overrun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidfmkd_fast.black_box import Budget, Ledger
from bidfmkd_fast.errors import BudgetExhausted, InputError, InputTypeError


class Yielding(int):
    """An int whose addition lets other threads run before its result is stored: an unlocked update loses counts."""

    def __radd__(self, other: int) -> int:
        time.sleep(1e-4)
        return int(self) + other


def in_threads(n_threads: int, work: Callable[[], None]) -> None:
    barrier = threading.Barrier(n_threads)
    errors: list[BaseException] = []

    def run() -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_ledger_counts() -> None:
    ledger = Ledger()
    ledger.record(7)
    ledger.record(1000, 3)
    assert (ledger.queries, ledger.requests) == (1007, 4)
    assert repr(ledger) == "Ledger(queries=1,007, requests=4)"


def test_ledger_loses_nothing_under_threads() -> None:
    ledger = Ledger()

    def work() -> None:
        for _ in range(50):
            ledger.record(Yielding(3), Yielding(2))

    in_threads(8, work)
    assert (ledger.queries, ledger.requests) == (8 * 50 * 3, 8 * 50 * 2)


def test_budget_is_spent_to_the_last_query_and_not_beyond() -> None:
    budget = Budget(max_queries=10, max_requests=3)
    budget.reserve(4)
    assert budget.affords(6) and not budget.affords(7)
    with pytest.raises(BudgetExhausted, match="7 more queries wanted, 6 of 10 left.*max_queries"):
        budget.reserve(7)
    assert (budget.queries, budget.requests) == (4, 1)
    assert (budget.remaining_queries, budget.remaining_requests) == (6, 2)
    budget.reserve(6)
    assert (budget.remaining_queries, budget.remaining_requests) == (0, 1)
    assert not budget.affords(1)


def test_refusal_for_requests_spends_no_queries() -> None:
    budget = Budget(max_requests=1)
    with pytest.raises(BudgetExhausted, match="2 more requests wanted, 1 of 1 left.*max_requests"):
        budget.reserve(5, 2)
    assert (budget.queries, budget.requests, budget.remaining_queries) == (0, 0, None)
    budget.reserve(10**12)
    assert (budget.queries, budget.requests) == (10**12, 1)


def test_no_cap_and_zero_cap() -> None:
    unlimited = Budget()
    unlimited.reserve(10**15, 10**6)
    assert (unlimited.remaining_queries, unlimited.remaining_requests) == (None, None)
    assert repr(Budget(5)) == "Budget(queries=0 of 5, requests=0 of no cap)"
    assert not Budget(0).affords(1) and Budget(0).affords(0)


def test_budget_under_threads_is_spent_exactly() -> None:
    cap = 1001
    budget = Budget(max_queries=cap)
    granted: list[int] = []

    def work() -> None:
        while True:
            try:
                budget.reserve(Yielding(7))
            except BudgetExhausted:
                return
            granted.append(7)

    in_threads(8, work)
    assert budget.queries == sum(granted) == cap // 7 * 7
    assert budget.requests == len(granted)


@given(st.integers(0, 60), st.integers(0, 12), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=12))
def test_budget_agrees_with_plain_arithmetic(max_queries: int, max_requests: int, calls: list[tuple[int, int]]) -> None:
    budget = Budget(max_queries, max_requests)
    spent = [0, 0]
    for queries, requests in calls:
        fits = spent[0] + queries <= max_queries and spent[1] + requests <= max_requests
        assert budget.affords(queries, requests) is fits
        if fits:
            budget.reserve(queries, requests)
            spent = [spent[0] + queries, spent[1] + requests]
        else:
            with pytest.raises(BudgetExhausted):
                budget.reserve(queries, requests)
        assert [budget.queries, budget.requests] == spent


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Budget(-1), InputError, "Budget: max_queries must not be negative; got -1"),
        (lambda: Budget(max_requests=-5), InputError, "max_requests"),
        (lambda: Budget(1e6), InputTypeError, "max_queries must be an int; got float"),  # type: ignore[arg-type]
        (lambda: Budget(True), InputTypeError, "max_queries must be an int; got bool"),
        (lambda: Budget().reserve(-1), InputError, "Budget.reserve: queries"),
        (lambda: Budget().reserve(1, -1), InputError, "Budget.reserve: requests"),
        (lambda: Budget().affords(-1), InputError, "Budget.affords: queries"),
        (lambda: Budget().affords(1, 0.5), InputTypeError, "requests must be an int"),  # type: ignore[arg-type]
        (lambda: Ledger().record(-1), InputError, "Ledger.record: queries"),
        (lambda: Ledger().record(1, "2"), InputTypeError, "Ledger.record: requests"),  # type: ignore[arg-type]
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
