"""End runs by their budgets: before the first step, in the middle, and for one API alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.test_bidf_mkd import STEP, TINY, B, initial, parameters_of, pool

from bidfmkd_fast.black_box import Budget
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.training import (
    BiDfMKD,
    fit_with_control,
)


# Sets are recovered in the order support 0, query 0, support 1, ...; each takes two steps of STEP
# queries.
@pytest.mark.parametrize(
    ("queries", "n_sets", "spent"),
    [
        (STEP, 1, STEP),  # one step of the first support set
        (2 * STEP + 5, 1, 2 * STEP),  # the first support set alone
        (5 * STEP, 3, 5 * STEP),  # support 1 in part
        (12 * STEP - 1, 6, 11 * STEP),  # the last step of the last set is missing
    ],
)
def test_a_budget_that_ends_midway(queries: int, n_sets: int, spent: int, tmp_path: Path) -> None:
    apis, budget = pool(), Budget(max_queries=queries)
    run = BiDfMKD(apis, config=TINY, budget=budget).fit(tmp_path / "run")
    assert not run.complete
    assert len(run.recovered) == n_sets
    assert run.queries == budget.queries
    assert spent <= run.queries <= queries
    assert len(run.memory) == n_sets * B
    assert run.history[-1]["stage"] == "replay"
    assert not all(map(torch.equal, parameters_of(run), initial(run)))
    assert len(list((tmp_path / "run" / "recovered").iterdir())) == n_sets
    assert all(box.budget is None for box in apis), "`fit` must leave the APIs as they were"


def test_a_budget_that_is_just_enough() -> None:
    run = BiDfMKD(pool(), config=TINY, budget=Budget(max_queries=12 * STEP)).fit()
    assert run.complete
    assert run.queries == 12 * STEP


def test_a_budget_too_small_for_one_step_asks_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    apis = pool()
    with pytest.raises(BudgetExhausted, match="one step"):
        BiDfMKD(apis, config=TINY, budget=Budget(max_queries=STEP - 1)).fit(tmp_path / "run")
    assert sum(box.ledger.queries for box in apis) == 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(BudgetExhausted, match="control, survey and one recovery step"):
        fit_with_control(
            apis, tmp_path / "run", TINY, budget=Budget(max_queries=3 * 2 * B + STEP - 1)
        )
    assert sum(box.ledger.queries for box in apis) == 0
    assert not (tmp_path / "run").exists()


def test_a_budget_of_one_api_stops_that_api_only() -> None:
    apis = pool()
    apis[1].budget = Budget(max_queries=0)
    run = BiDfMKD(apis, config=TINY).fit()
    assert not run.complete
    assert {found.api_index for found in run.recovered} == {0, 2}
    assert apis[1].ledger.queries == 0
