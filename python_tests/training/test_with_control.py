"""Check that a run and its control start from the same model and share a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.test_bidf_mkd import STEP, TINY, B, initial, pool, same

from bidfmkd_fast.black_box import Budget
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    fit_with_control,
)


def test_the_control_asks_for_scores_only_and_starts_where_the_run_starts() -> None:
    control = BiDfMKD(pool(), config=TINY.control())
    run = control.fit()
    assert run.queries == control.planned_queries() == 3 * 2 * B
    other = BiDfMKD(pool(), config=TINY).fit()
    assert all(torch.equal(a, b) for a, b in zip(initial(run), initial(other), strict=True))
    assert not same(run, other)


def test_run_and_control_share_a_budget(tmp_path: Path) -> None:
    budget = Budget(max_queries=6 * B + 5 * STEP)
    run, control = fit_with_control(pool(), tmp_path / "run", TINY, budget=budget, progress=False)
    assert control.complete
    assert not run.complete
    assert control.queries == 6 * B
    assert run.queries + control.queries <= 6 * B + 5 * STEP
    assert same(control, BiDfMKD(pool(), config=TINY.control()).fit())


def test_a_budget_must_pay_for_the_survey_as_well(tmp_path: Path) -> None:
    config = replace(TINY, survey=SurveyConfig(n_images=100, epochs=1, batch_size=10))
    budget = Budget(max_queries=3 * B * 2 + STEP + 3 * 100 - 1)
    with pytest.raises(BudgetExhausted, match="control, survey and one recovery step ask"):
        fit_with_control(pool(3), tmp_path, config, budget=budget, progress=False)
    assert budget.remaining_queries == budget.max_queries
