"""Check that a run asks what its plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox, OpenBox
from bidfmkd_fast.black_box.probe import PROBE_QUERIES
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.recovery.cost import Cost
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    DistillationConfig,
    ReplayConfig,
    TrainConfig,
    fit_with_control,
)
from bidfmkd_fast.training.plan import plan

N_CLASSES = 3
TINY = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=3,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=1),
    replay=ReplayConfig(final_steps=1, n_query=2, inner_steps=1),
)


def weight(number: int) -> Tensor:
    return torch.randn(256, N_CLASSES, generator=torch.Generator().manual_seed(number)) / 8


def spec(number: int, **fields: Any) -> APISpec:
    return APISpec(N_CLASSES, (1, 16, 16), name=f"api {number}", price_per_1000=1.0, **fields)


def local(number: int) -> BlackBox:
    return FunctionBlackBox(lambda images: images.flatten(1) @ weight(number), spec(number))


def top_k(number: int) -> BlackBox:
    fields = {"scores_kind": "top_k", "top_k": 2}
    return FunctionBlackBox(
        lambda images: (images.flatten(1) @ weight(number)).softmax(1), spec(number, **fields)
    )


def opened(number: int) -> BlackBox:
    """Make the same API as an open box."""
    linear = nn.Linear(256, N_CLASSES, bias=False)
    linear.weight.data = weight(number).T.contiguous()
    return OpenBox(nn.Sequential(nn.Flatten(), linear), spec(number))


def labels(number: int) -> BlackBox:
    return FunctionBlackBox(
        lambda images: (images.flatten(1) @ weight(number)).argmax(1),
        spec(number, scores_kind="labels"),
    )


CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "plain": (local, {}, False),
    "open boxes": (opened, {"num_directions": 7}, False),
    "open boxes, auto": (opened, {"mu": "auto"}, False),
    "paper_compat, q=12": (local, {"num_directions": 12}, True),
    "auto": (local, {"mu": "auto"}, False),
    "no steps": (local, {"steps": 0, "mu": "auto"}, False),
    "top-k, chunks": (top_k, {"max_images": 9}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_queries_are_those_that_are_asked(name: str) -> None:
    make, settings, paper_compat = CASES[name]
    config = replace(TINY, recovery=replace(TINY.recovery, **settings), paper_compat=paper_compat)
    apis = [make(number) for number in range(2)]
    learner = BiDfMKD(apis, config=config)
    run = learner.fit()
    assert learner.planned_queries() == run.queries == sum(api.ledger.queries for api in apis)
    planned = plan([make(number) for number in range(2)], config)
    assert planned.queries == run.queries and list(planned.spending.parts) == [
        "probes",
        "run, planned",
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_and_its_control_ask(name: str, tmp_path: Path) -> None:
    make, settings, paper_compat = CASES[name]
    config = replace(TINY, recovery=replace(TINY.recovery, **settings), paper_compat=paper_compat)
    planned = plan([make(0)], config, controls=True)
    run, control = fit_with_control([make(0)], tmp_path / "run", config)
    assert planned.queries == run.queries + control.queries != PROBE_QUERIES
    assert planned.cost == pytest.approx(sum(row.cost for row in (*run.ledger, *control.ledger)))


@pytest.mark.parametrize(("make", "first_step"), [(local, 11 * 9), (opened, 9)])
def test_a_budget_must_reach_from_the_control_into_the_run(
    make: Any, first_step: int, tmp_path: Path
) -> None:
    recovery = replace(TINY.recovery, num_directions=12)
    # With paper_compat 10 of the 12 directions are drawn.
    config = replace(TINY, recovery=recovery, paper_compat=True)
    for left_over in (-1, 0):
        apis = [make(number) for number in range(2)]
        budget = Budget(max_queries=2 * 2 * 9 + first_step + left_over)
        if left_over < 0:
            with pytest.raises(
                BudgetExhausted,
                match=f"control, survey and one recovery step ask {36 + first_step} quer",
            ):
                fit_with_control(apis, tmp_path / "run", config, budget=budget)
            assert not any(api.ledger.requests for api in apis)
        else:
            run, control = fit_with_control(apis, tmp_path / "run", config, budget=budget)
            assert control.complete and run.budget_ended and budget.remaining_queries == 0


SURVEYED = replace(TINY, survey=SurveyConfig(n_images=20, epochs=1, batch_size=8))


@pytest.mark.parametrize("makers", [(labels, labels), (labels, local)])
def test_only_the_survey_of_an_api_of_labels_is_planned_and_asked(
    makers: tuple[Any, ...], tmp_path: Path
) -> None:
    apis = [make(number) for number, make in enumerate(makers)]
    boxes = [make(number) for number, make in enumerate(makers)]
    planned = plan(boxes, SURVEYED, device="cpu", controls=True)
    learner = BiDfMKD(apis, config=SURVEYED)
    assert planned.apis[0].usable and planned.apis[0].run.queries == 20
    assert any("api 0: it gives labels only" in note for note in planned.notes)
    run, control = fit_with_control(apis, tmp_path / "run", SURVEYED)
    assert planned.queries == run.queries + control.queries == sum(a.ledger.queries for a in apis)
    assert learner.planned_queries() == run.queries
    assert (run.ledger[0].queries, control.ledger[0].queries) == (20, 0)
    assert planned.apis[0].control == Cost() and run.complete and control.complete


@pytest.mark.parametrize("left_over", [-1, 0])
def test_a_budget_reaches_into_the_recovery_of_the_first_api_with_scores(
    left_over: int, tmp_path: Path
) -> None:
    apis = [labels(0), local(1)]
    needed = 2 * 9 + 2 * SURVEYED.survey.n_images + 3 * 9  # control, survey, one step
    budget = Budget(max_queries=needed + left_over)
    if left_over < 0:
        with pytest.raises(
            BudgetExhausted, match=f"control, survey and one recovery step ask {needed} quer"
        ):
            fit_with_control(apis, tmp_path / "run", SURVEYED, budget=budget)
        assert not any(api.ledger.requests for api in apis)
    else:
        _, control = fit_with_control(apis, tmp_path / "run", SURVEYED, budget=budget)
        assert control.complete
