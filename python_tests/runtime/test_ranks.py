"""Let several ranks meet at a store: values, turns, locks, and ranks that fail or fall silent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from bidfmkd_fast.black_box import Budget
from bidfmkd_fast.errors import BudgetExhausted, InputError, RankLost
from bidfmkd_fast.runtime import job, joined_ranks, ranks
from bidfmkd_fast.runtime.joined_ranks import JoinedRanks
from bidfmkd_fast.runtime.ranks import ALONE, Ranks


def in_ranks(size: int, do: Callable[[JoinedRanks], Any]) -> list[Any]:
    """Call `do` in as many threads as there are ranks; return what each gave or raised."""
    store = dist.HashStore()
    begun = threading.Barrier(size)

    def one(rank: int) -> Any:
        joined = JoinedRanks(store, rank, size)
        begun.wait()
        try:
            joined.wait_for_all()
            result = do(joined)
        except (RankLost, ValueError) as error:
            joined.end(error)
            return error
        joined.end(None)
        return result

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_every_rank_gets_what_all_gave() -> None:
    def do(joined: JoinedRanks) -> list[list[Any]]:
        return [joined.exchange({"rank": joined.rank, "n": n}) for n in range(20)]

    wanted = [[{"rank": rank, "n": n} for rank in range(3)] for n in range(20)]
    assert in_ranks(3, do) == [wanted] * 3


def test_a_single_process_needs_no_store() -> None:
    assert ranks.current() is ALONE and ALONE.first
    assert ALONE.exchange(5) == [5]
    assert list(ALONE.turns(3)) == [0, 1, 2]
    assert ALONE.first_alone(lambda: 7) == 7
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]


def test_each_turn_is_taken_by_one_rank_and_a_slow_rank_holds_nothing_up() -> None:
    def do(joined: JoinedRanks) -> list[int]:
        taken = []
        for turn in joined.turns(9):
            taken.append(turn)
            if joined.rank == 0:
                time.sleep(1.0)
            time.sleep(0.02)
        return taken

    first, *others = in_ranks(3, do)
    assert sorted([*first, *others[0], *others[1]]) == list(range(9))
    assert len(first) <= 2


def test_only_rank_0_does_what_it_does_alone() -> None:
    called: list[int] = []

    def do(joined: JoinedRanks) -> list[int]:
        joined.first_alone(lambda: called.append(joined.rank))
        return list(called)

    assert in_ranks(4, do) == [[0]] * 4


def test_a_shared_budget_is_spent_to_the_last_query_and_no_further() -> None:
    def do(joined: JoinedRanks) -> tuple[int, int]:
        budget = Budget(max_queries=100)
        if joined.first:
            budget.reserve(10)  # spent before it was shared
        bought = 0
        with budget.shared_by(joined, "budget 1"):
            joined.exchange()
            for _ in range(100):
                try:
                    budget.reserve(3)
                    bought += 3
                except BudgetExhausted:
                    break
            joined.exchange()
        return bought, budget.queries

    results = in_ranks(3, do)
    assert sum(bought for bought, _ in results) == 90
    assert [queries for _, queries in results] == [100] * 3


def test_the_failure_of_a_rank_ends_the_others_with_its_reason() -> None:
    def do(joined: JoinedRanks) -> None:
        if joined.rank == 1:
            raise ValueError("no image has this shape")
        joined.exchange()

    first, _, last = in_ranks(3, do)
    for error in (first, last):
        assert isinstance(error, RankLost) and error.told
        assert str(error) == "ranks: rank 1 of 3 has failed: no image has this shape"


def test_a_silent_rank_on_another_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_ranks, "LOST_SECONDS", 1.5)

    def do(joined: JoinedRanks) -> None:
        if joined.rank == 2:
            joined.store.set("here/2", json.dumps([17, "another-machine", ""]))
            joined._ended.set()  # no beat from now on
            time.sleep(6)
        else:
            joined.exchange()

    started = time.monotonic()
    first, second, _ = in_ranks(3, do)
    assert time.monotonic() - started < 10
    for error in (first, second):
        assert isinstance(error, RankLost) and not error.told
        assert "rank 2 of 3 (process 17 on another-machine) gives no sign of life" in str(error)


def test_a_process_of_another_container_is_not_taken_for_dead() -> None:
    """Its number may be free here, under the same name of the host."""

    def do(joined: JoinedRanks) -> int:
        if joined.rank == 1:
            place = json.loads(joined.store.get("here/1").decode())
            joined.store.set("here/1", json.dumps([2**22 + 1, place[1], "other space"]))
        time.sleep(1)
        return len(joined.exchange())

    assert in_ranks(2, do) == [2, 2]


def test_a_rank_that_ends_early_is_not_waited_for() -> None:
    def do(joined: JoinedRanks) -> None:
        if joined.rank == 0:
            joined.exchange()

    first, _ = in_ranks(2, do)
    assert isinstance(first, RankLost)
    assert "rank 1 of 2 has ended and takes no part in this step" in str(first)


def test_threads_of_all_ranks_take_turns_in_the_lock() -> None:
    def do(joined: JoinedRanks) -> int:
        def count(_: int) -> None:
            for _ in range(20):
                with joined.locked():
                    joined.keep("n", (joined.kept("n") or 0) + 1)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(count, range(3)))
        joined.exchange()
        return int(joined.kept("n"))

    assert in_ranks(2, do) == [120, 120]


def test_a_rank_that_works_for_long_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_ranks, "LOST_SECONDS", 1.5)

    def do(joined: JoinedRanks) -> int:
        if joined.rank == 0:
            time.sleep(3)
        return len(joined.exchange())

    assert in_ranks(2, do) == [2, 2]


def test_one_rank_alone_speaks() -> None:
    assert sorted(in_ranks(4, lambda joined: joined.speaks())) == [False, False, False, True]


def test_missing_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(InputError, match="MASTER_PORT.*torchrun"), job.joined():
        pass


def test_work_that_is_one_ranks_own_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    several = Ranks()
    monkeypatch.setattr(ranks, "_current", several)
    with ranks.alone():
        assert ranks.current() is ALONE
    assert ranks.current() is several
