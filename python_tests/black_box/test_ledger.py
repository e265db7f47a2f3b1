"""Check that Ledger and Budget are exact under threads, spend all or nothing, never overrun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidfmkd_fast.black_box import Budget, Ledger
from bidfmkd_fast.black_box.ledger_file import LedgerFile, LedgerRow
from bidfmkd_fast.errors import BudgetExhausted, InputError, InputTypeError


class Yielding(int):
    """An int whose addition lets other threads run before the result is stored.

    An update without a lock therefore loses counts.
    """

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


@given(
    st.integers(0, 60),
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=12),
)
def test_budget_agrees_with_plain_arithmetic(
    max_queries: int, max_requests: int, calls: list[tuple[int, int]]
) -> None:
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


def test_cost_and_answers_are_counted_apart() -> None:
    ledger = Ledger(price_per_1000=2.0)
    ledger.record(500)
    ledger.record(500)  # the same again, after a failure
    ledger.record_answered(500)
    assert (ledger.queries, ledger.requests, ledger.answered_queries, ledger.answered_requests) == (
        1000,
        2,
        500,
        1,
    )
    assert ledger.cost == 2.0


def test_a_budget_of_money() -> None:
    budget = Budget(max_cost=1.0)
    for _ in range(10):
        budget.reserve(1, 1, 0.1)  # ten times a tenth is not exactly one
    with pytest.raises(BudgetExhausted, match="0.1 more cost wanted, .* of 1 left.*max_cost"):
        budget.reserve(1, 1, 0.1)
    assert budget.queries == 10 and budget.cost == pytest.approx(1.0)
    budget.release(1, 1, 0.1)
    assert budget.affords(1, 1, 0.1)
    assert (
        repr(Budget(max_cost=2.5))
        == "Budget(queries=0 of no cap, requests=0 of no cap, cost=0 of 2.5)"
    )


def test_what_a_killed_run_spent_counts_even_beyond_the_cap() -> None:
    budget = Budget(max_queries=10)
    budget.restore(12, 1)
    assert budget.queries == 12 and not budget.affords(1)


@pytest.mark.parametrize("cost", [-1, float("nan"), float("inf"), "1", True])
def test_costs_that_are_none(cost: object) -> None:
    with pytest.raises(InputError, match="max_cost must be"):
        Budget(max_cost=cost)  # type: ignore[arg-type]


def test_the_file_holds_every_count_before_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    file, ledger = LedgerFile(path), Ledger(price_per_1000=1.0)
    ledger.record(7)  # before the run
    with ledger.written_to(file, 3, "cats"):
        ledger.record(20, 2)
        seen = LedgerFile(path)  # another connection, as after a kill
        assert seen.rows() == [LedgerRow(3, "cats", 20, 2, 0, 0, 0.02)]
        seen.close()
        ledger.record_answered(10, 1)
    ledger.record(100)  # after the run
    file.close()
    again = LedgerFile(path)
    assert again.rows() == [LedgerRow(3, "cats", 20, 2, 10, 1, 0.02)]
    with pytest.raises(InputError, match="API 3 of .* is 'cats'; got 'dogs'; is this another pool"):
        again.begin(3, "dogs")
    again.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_the_file_loses_nothing_under_threads(tmp_path: Path) -> None:
    file, ledger = LedgerFile(tmp_path / "ledger.sqlite"), Ledger()
    with ledger.written_to(file, 0, "api"):
        in_threads(4, lambda: [ledger.record(3) for _ in range(50)] and None)
    assert [(row.queries, row.requests) for row in file.rows()] == [(600, 200)]
    file.close()


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_text("nothing of the kind" * 100)
    with pytest.raises(InputError, match=r"ledger\.sqlite cannot be used"):
        LedgerFile(tmp_path / "ledger.sqlite")
    with pytest.raises(InputError, match="cannot be used"):
        LedgerFile(tmp_path / "nowhere" / "ledger.sqlite")
