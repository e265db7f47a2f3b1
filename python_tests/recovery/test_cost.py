"""Check that a recovery asks what `recovery.cost` counts: queries, requests and money."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox, OpenBox
from bidfmkd_fast.black_box.remote.service import Attempt, ServiceBlackBox
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery import RecoveryConfig, recover
from bidfmkd_fast.recovery.cost import set_cost, step_cost

N_CLASSES, N_PER_CLASS = 3, 4
CONFIG = RecoveryConfig(steps=3, num_directions=4, latent_dim=8, generator_width=4)
SPEC = APISpec(N_CLASSES, (1, 8, 8), name="one", price_per_1000=2.0)
TOP_K = replace(SPEC, scores_kind="top_k", top_k=2)


def logits(images: Tensor) -> Tensor:
    return images.flatten(1) @ torch.linspace(-1, 1, 64 * N_CLASSES).view(64, N_CLASSES)


class Service(ServiceBlackBox):
    """Stand in for a service, in this process."""

    def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
        attempt()
        return logits(images)


def local(spec: APISpec = SPEC) -> BlackBox:
    softmax = spec.scores_kind == "top_k"
    return FunctionBlackBox(
        lambda images: logits(images).softmax(1) if softmax else logits(images), spec
    )


def open_box() -> BlackBox:
    return OpenBox(nn.Sequential(nn.Flatten(), nn.Linear(64, N_CLASSES)), SPEC)


CASES = {
    "plain": (local, {}, False),
    "top-k": (lambda: local(TOP_K), {}, False),
    "no steps": (local, {"steps": 0, "mu": "auto"}, False),
    "auto": (local, {"mu": "auto"}, False),
    "open box": (open_box, {}, False),
    "open box, auto": (open_box, {"mu": "auto"}, False),
    "paper_compat": (local, {"num_directions": 12}, True),
    "paper_compat, auto, no steps": (local, {"num_directions": 12, "mu": "auto", "steps": 0}, True),
    "chunks": (local, {"max_images": 24}, False),
    "a service": (
        lambda: Service(replace(SPEC, max_batch=5)),
        {"max_images": 24, "mu": "auto"},
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_per_class", [1, N_PER_CLASS])
def test_what_a_set_costs_is_what_is_asked(name: str, n_per_class: int, seed: int) -> None:
    """Check sets with one image per class, too.

    Their 3 images are fewer than the 4 at which mu="auto" measures otherwise.
    """
    make, settings, paper_compat = CASES[name]
    api, config = make(), replace(CONFIG, **settings)
    cost = set_cost(api, config, n_per_class, paper_compat)
    api.budget = Budget(cost.queries, cost.requests, cost.price)  # the budget is exactly enough
    recovered = recover(api, n_per_class, config=config, seed=seed, paper_compat=paper_compat)
    assert recovered.complete
    assert (api.ledger.queries, api.ledger.requests) == (cost.queries, cost.requests)
    assert api.ledger.cost == pytest.approx(cost.price)


@pytest.mark.parametrize("name", CASES)
def test_one_query_less_than_the_first_step_is_refused_before_anything_is_asked(name: str) -> None:
    make, settings, paper_compat = CASES[name]
    api, config = (
        make(),
        replace(CONFIG, **settings, **({} if settings.get("steps") == 0 else {"steps": 1})),
    )
    api.budget = Budget(max_queries=set_cost(api, config, N_PER_CLASS, paper_compat).queries - 1)
    with pytest.raises(BudgetExhausted, match="one step asks one"):
        recover(api, N_PER_CLASS, config=config, paper_compat=paper_compat)
    assert api.ledger.requests == 0


def test_answers_that_a_journal_holds_are_not_counted() -> None:
    api, config = local(), replace(CONFIG, max_images=24)
    whole = step_cost(api, config, 12)  # rows of 12 images in calls of 2, 2 and 1
    assert (whole.queries, whole.requests) == (60, 3)
    assert [step_cost(api, config, 12, rows_held=rows).queries for rows in (0, 2, 4, 5)] == [
        60,
        36,
        12,
        0,
    ]
    assert [step_cost(api, config, 12, rows_held=rows).requests for rows in (0, 2, 4, 5)] == [
        3,
        2,
        1,
        0,
    ]
